"""What the schema says about each key: its field, its section, and in words what it takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from internlm.config.schema import Config
from internlm.config.schema.fields import Section

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "None",
}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, directly or as ``Section | None``; None for a plain value."""
    return None if get_origin(annotation) is tuple else _section_in(annotation)


def _section_in(annotation: Any) -> type[Section] | None:
    """The same, and of a field that holds a list of sections that of its items."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of everything in ``section``, each section before its own fields. Those of the items of a
    list have no number."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if inner := _section_in(field.annotation):
            yield from walk(inner, f"{prefix}{name}.")


@functools.cache
def fields() -> dict[str, FieldInfo]:
    """Every key of the config, sections included."""
    return dict(walk(Config))


def is_section(key: str) -> bool:
    """Whether ``key`` is a section rather than a value."""
    return key in fields() and section_of(fields()[key].annotation) is not None


def is_free_dict(key: str) -> bool:
    """Whether ``key`` holds a dict in which any name is allowed."""
    return key in fields() and get_origin(fields()[key].annotation) is dict


def children(section: str) -> list[str]:
    """Names of the fields directly in ``section``; ``""`` is the whole config."""
    prefix = f"{section}." if section else ""
    inside = (key.removeprefix(prefix) for key in fields() if key.startswith(prefix))
    return [name for name in inside if "." not in name]


def is_of_list(key: str) -> bool:
    """Whether ``key`` is one of a dict in a list, which can't be given by itself."""
    holder = fields().get(key.rpartition(".")[0])
    return holder is not None and get_origin(holder.annotation) is tuple


def takes_none(key: str) -> bool:
    """Whether None is a value of ``key``."""
    return NoneType in get_args(fields()[key].annotation)


def expected(key: str) -> str:
    """In words, what ``key`` takes: ``"a whole number of at least 1"``."""
    field = fields()[key]
    return _in_words(field.annotation, field.metadata)


def meaning(key: str) -> str:
    """The first sentence of what the schema says about ``key``, without markup."""
    text = (fields()[key].description or "").replace("``", "").replace("\n", " ")
    return text.partition(". ")[0].rstrip(".")


def _in_words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0], [m for field in arguments[1:] for m in field.metadata])
    if origin in (Union, UnionType):
        return ", or ".join(_in_words(argument) for argument in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin is tuple and section_of(arguments[0]):
        return "a list of dicts"
    if origin is tuple:
        return f"one or more of {_in_words(arguments[0]).removeprefix('one of ')}"
    if origin is dict:
        return "a dict of plain values"
    if section_of(annotation):
        return "a dict"
    return _WORDS[annotation] + _bounds(metadata)


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> str:
    limits = {name: getattr(m, name) for m in metadata for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}
    phrases = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    said = [f"{phrases[name]} {limit}" for name, limit in limits.items()]
    return f" of {' and '.join(said)}" if said else ""
