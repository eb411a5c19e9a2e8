"""A resolved config as JSON: for people, logs, checkpoints and comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from internlm.config.schema import Config
from internlm.config.schema.base import Section


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


def with_sources(section: Section, sources: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Nested dict of ``section`` in which each value is ``{"value": ..., "source": ...}``."""
    return {
        name: with_sources(value, sources, f"{prefix}{name}.")
        if isinstance(value := getattr(section, name), Section)
        else {"value": value, "source": sources[f"{prefix}{name}"]}
        for name in type(section).model_fields
    }
