"""Nested dicts addressed by dotted keys such as ``"model.num_layers"``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from internlm.utils.compat import DictAccess
from internlm.utils.errors import ConfigError, Problem

NestedDict = dict[str, Any]
ABSENT = object()


def plain(value: Any, where: str = "", outer: tuple[int, ...] = ()) -> Any:
    """Copy ``value``, recursively converting mappings and config sections to dicts and path objects to strings.

    Items of lists and tuples are converted too.

    Args:
        value: Value of any type.
        where: Dotted key of the value, for errors.
        outer: Identities of the containers that contain the value.

    Raises:
        ConfigError: A dict or a list contains itself, or a key is not a string.
    """
    if not isinstance(value, (Mapping, DictAccess, list, tuple)):
        # The schema is strict: for a path it accepts a string, but no path object.
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    if id(value) in outer:
        kind = "list" if isinstance(value, list) else "dict"
        raise ConfigError(Problem(where, f"is the {kind} that contains it", f"Remove it, or copy the inner {kind}"))
    if isinstance(value, (list, tuple)):
        items = (plain(item, where, (*outer, id(value))) for item in value)
        return list(items) if isinstance(value, list) else tuple(items)
    if strangers := [key for key in value if not isinstance(key, str)]:
        message = f"contains the key {strangers[0]!r}, which is not a string"
        raise ConfigError(Problem(where or "config", message, "Write keys as strings"))
    prefix = f"{where}." if where else ""
    return {key: plain(inner, f"{prefix}{key}", (*outer, id(value))) for key, inner in value.items()}


def get(nested: Any, key: str, default: Any = None) -> Any:
    """Return the value at the dotted ``key``, or ``default`` if a part of the key is absent."""
    for name in key.split("."):
        if not isinstance(nested, dict) or name not in nested:
            return default
        nested = nested[name]
    return nested


def put(nested: NestedDict, key: str, value: Any) -> None:
    """Set the dotted ``key`` to ``value``; absent or plain values on its path are replaced by dicts."""
    *path, last = key.split(".")
    for name in path:
        if not isinstance(nested.get(name), dict):
            nested[name] = {}
        nested = nested[name]
    nested[last] = value


def pop(nested: NestedDict, key: str) -> Any:
    """Remove the dotted ``key`` and return its value; return ``ABSENT`` if the key is absent."""
    parent, _, last = key.rpartition(".")
    section = get(nested, parent) if parent else nested
    return section.pop(last, ABSENT) if isinstance(section, dict) else ABSENT


def leaves(nested: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values that are not dicts, and of empty dicts."""
    for name, value in nested.items():
        # An empty dict is a value: a section that is given, with nothing set in it.
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def with_sections(key: str) -> Iterator[str]:
    """Yield ``key`` and the sections that contain it, innermost first."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def within(key: str, others: frozenset[str] | set[str]) -> bool:
    """Return whether ``key`` or a section that contains it is in ``others``."""
    return any(candidate in others for candidate in with_sections(key))
