"""Types and helpers shared by all config rules: ``Rule``, ``RunInfo``, and formatting of numbers in messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from internlm.config.schema import Config
from internlm.utils.errors import Problem

#: Names by which rules and derivations declare that they read a field of :class:`RunInfo`.
WORLD_SIZE = "world_size"
DEVICE_TYPE = "device_type"


@dataclass(frozen=True)
class RunInfo:
    """Properties of a run that its config does not contain: world size and device type.

    None means unknown: rules and derivations that read the field are skipped.
    """

    world_size: int | None = None  # processes
    device_type: str | None = None  # "cpu" or "cuda"

    def unknown(self) -> set[str]:
        """Return the names of the fields that are None."""
        return {name for name in (WORLD_SIZE, DEVICE_TYPE) if getattr(self, name) is None}


Check = Callable[[Config, RunInfo], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """Consistency check of config keys: ``check`` yields one problem per mistake.

    A rule is skipped if a key or a :class:`RunInfo` field in ``reads`` is invalid or unknown. ``reads`` must name
    exactly the keys and fields that ``check`` reads, which a test verifies.
    """

    reads: tuple[str, ...]
    check: Check


def at(section: str, *names: str) -> tuple[str, ...]:
    """Return the dotted keys of ``names`` in ``section``."""
    return tuple(f"{section}.{name}" for name in names)


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number`` in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(numbers: Iterable[int]) -> str:
    """Format numbers as a comma-separated list."""
    return ", ".join(map(str, numbers))
