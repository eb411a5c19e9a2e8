"""Nested dicts addressed by dotted keys: ``"model.num_layers"``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

Tree = dict[str, Any]
ABSENT = object()


def plain(value: Any) -> Any:
    """A copy of ``value`` that shares no dict with it; mappings become dicts, paths become text."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def get(tree: Any, key: str, default: Any = None) -> Any:
    """The value at ``key``; ``default`` where it, or a dict on the way to it, is absent."""
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return default
        tree = tree[name]
    return tree


def put(tree: Tree, key: str, value: Any) -> None:
    """Set ``key``, making the dicts on the way to it; whatever else stood in the way is replaced."""
    *path, last = key.split(".")
    for name in path:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def pop(tree: Tree, key: str) -> Any:
    """Remove ``key`` and return its value, or ``ABSENT``."""
    parent, _, last = key.rpartition(".")
    holder = get(tree, parent) if parent else tree
    return holder.pop(last, ABSENT) if isinstance(holder, dict) else ABSENT


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values that are not dicts, and of empty dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def with_sections(key: str) -> Iterator[str]:
    """``key``, and the sections that hold it, from the inmost."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def within(key: str, others: frozenset[str] | set[str]) -> bool:
    """Whether ``key`` or a section that holds it is one of ``others``."""
    return any(each in others for each in with_sections(key))
