"""A resolved config as JSON: for people, logs, checkpoints and comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from internlm.config.schema import Config
from internlm.config.schema.fields import Section


def to_json(config: Config, indent: int | None = None) -> str:
    """Canonical JSON of every key, sorted; ``Config.model_validate_json`` makes an equal config of it."""
    separators = None if indent else (",", ":")
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, indent=indent, separators=separators)


def config_hash(config: Config) -> str:
    """SHA-256 of the canonical JSON, in hex: equal for equal configs, whatever files they came from."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def values(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in ``section`` that is no section."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def with_sources(config: Config, sources: Mapping[str, str]) -> dict[str, Any]:
    """Nested dict of ``config``, as in its JSON, in which each value is ``{"value": ..., "source": ...}``."""
    return _with_sources(config.model_dump(mode="json"), sources)


def _with_sources(tree: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    return {
        name: {"value": value, "source": sources[key]}
        if (key := f"{prefix}{name}") in sources
        else _with_sources(value, sources, f"{key}.")
        for name, value in tree.items()
    }
