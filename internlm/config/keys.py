"""Lookup of dotted config keys: schema field, description of accepted values, and value in a resolved config."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from internlm.config import nested_dict
from internlm.config.schema import Config
from internlm.config.schema.fields import Section, mask_of
from internlm.utils.secrets import mask_urls_in

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    NoneType: "None",
}


def section_of(annotation: Any) -> type[Section] | None:
    """Return the :class:`Section` subclass in a field's annotation; None if the field is a plain value."""
    # A list of sections counts as a plain value: it can only be set as a whole.
    return None if get_origin(annotation) is tuple else item_section_of(annotation)


def item_section_of(annotation: Any) -> type[Section] | None:
    """Return the :class:`Section` subclass of a field or of its list items; None if the field is a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of every entry of ``section``, recursively; a section precedes its fields.

    ``prefix`` is put before every key. Keys of list items have no index: ``optimizer.param_groups.pattern``.
    """
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if inner := item_section_of(field.annotation):
            yield from walk(inner, f"{prefix}{name}.")


# Cached: every message looks keys up, and the schema never changes.
@functools.cache
def fields() -> dict[str, FieldInfo]:
    """Return a map from every dotted key of the config, sections included, to its field."""
    return dict(walk(Config))


def is_section(key: str) -> bool:
    """Return whether ``key`` is a section rather than a value."""
    return key in fields() and section_of(fields()[key].annotation) is not None


def is_free_dict(key: str) -> bool:
    """Return whether ``key`` holds a dict with arbitrary keys, such as ``model.moe_layer_kwargs``."""
    return key in fields() and get_origin(fields()[key].annotation) is dict


def children(section: str) -> list[str]:
    """Return the names of the direct fields of ``section``, or the top-level names if ``section`` is empty."""
    prefix = f"{section}." if section else ""
    inside = (key.removeprefix(prefix) for key in fields() if key.startswith(prefix))
    return [name for name in inside if "." not in name]


def is_of_list(key: str) -> bool:
    """Return whether ``key`` is a field of the items of a list, such as ``optimizer.param_groups.pattern``.

    Such a key cannot be set by itself, only as part of the whole list.
    """
    section = fields().get(key.rpartition(".")[0])
    return section is not None and get_origin(section.annotation) is tuple


def takes(key: str, value_type: type) -> bool:
    """Return whether ``key`` accepts values of ``value_type``: bool, int, float, str or ``NoneType``."""
    annotation = fields()[key].annotation
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return value_type in map(_without_bounds, alternatives)


def takes_none(key: str) -> bool:
    """Return whether ``key`` accepts None."""
    return takes(key, NoneType)


def _without_bounds(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def expected(key: str) -> str:
    """Describe the values that ``key`` accepts, for example ``"an integer of at least 1"``."""
    field = fields()[key]
    return _in_words(field.annotation, field.metadata)


def meaning(key: str) -> str:
    """Return the first sentence of the documentation of ``key`` as plain text."""
    # Error messages quote this sentence, so it must be understandable without the rest of the documentation.
    text = (fields()[key].description or "").replace("``", "").replace("\n", " ")
    return text.partition(". ")[0].rstrip(".")


def _in_words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        # Bounds of ``Annotated[int, Field(ge=1)]`` lie in the metadata of its Field.
        return _in_words(arguments[0], [bound for field in arguments[1:] for bound in getattr(field, "metadata", ())])
    if origin in (Union, UnionType):
        return ", or ".join(_in_words(argument) for argument in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin is tuple and section_of(arguments[0]):
        return "a list of dicts"
    if origin is tuple and get_origin(arguments[0]) is not Literal:
        return f"a list of items, each {_in_words(arguments[0])}"
    if origin is tuple:
        return f"one or more of {_in_words(arguments[0]).removeprefix('one of ')}"
    if origin is dict:
        return "a dict of plain values"
    if section_of(annotation):
        return "a dict"
    return _WORDS[annotation] + _bounds(metadata)


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> str:
    phrases = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = [
        f"{phrase} {getattr(bound, name)}"
        for bound in metadata
        for name, phrase in phrases.items()
        if hasattr(bound, name)
    ]
    return f" of {' and '.join(bounds)}" if bounds else ""


# -- values of a resolved config --------------------------------------------------------------------------------------
def values(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every plain field in ``section`` and its subsections."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_json(config: Config, indent: int | None = None) -> str:
    """Return the config as canonical JSON, sorted by key; ``Config.model_validate_json`` restores an equal config."""
    # Sorted and without spaces, so that equal configs give equal text: ranks compare the hash of this text at launch.
    separators = None if indent else (",", ":")
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, indent=indent, separators=separators)


def masked_dict(config: Config) -> dict[str, Any]:
    """Return the config as a JSON-serialisable dict in which secrets, such as the token of a webhook, are masked.

    Everything that is saved or printed takes this dict. Configs that differ in secrets only give equal dicts.
    """
    return masked_values(config.model_dump(mode="json"))


def masked_values(content: dict[str, Any]) -> dict[str, Any]:
    """Return a config in the form of nested dicts, which may be of any version, with secrets masked."""
    content = copy.deepcopy(content)
    for key, field in fields().items():
        value = nested_dict.get(content, key)
        if (mask := mask_of(field)) and isinstance(value, str):
            nested_dict.put(content, key, mask(value))
    return content


def format_value(key: str, value: Any) -> str:
    """Format a valid or invalid value of ``key`` for a message: shortened, with secrets masked."""
    field = fields().get(key)
    mask = mask_of(field) if field else None
    if mask and isinstance(value, str):
        return reprlib.repr(mask(value))
    if not (mask or is_section(key)):
        return reprlib.repr(value)
    # A section, or a list in place of a text, may contain a secret anywhere; a text is masked before its middle is cut.
    return mask_urls_in(reprlib.repr(mask_urls_in(value) if isinstance(value, str) else value))


def config_hash(config: Config) -> str:
    """Return the SHA-256 of the canonical JSON in hexadecimal; configs with equal values have equal hashes."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def with_sources(config: Config, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return ``config`` as nested dicts in which each value is ``{"value": ..., "source": ...}``, secrets masked.

    Args:
        config: Resolved config.
        sources: Map from the dotted key of each value to its source, as in :class:`~internlm.config.Resolved`.
    """
    return _with_sources(masked_dict(config), sources)


def _with_sources(nested: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    return {
        name: {"value": value, "source": sources[key]}
        if (key := f"{prefix}{name}") in sources
        else _with_sources(value, sources, f"{key}.")
        for name, value in nested.items()
    }
