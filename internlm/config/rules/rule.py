"""Types that every rule uses: the rule itself, what is known about the run, and lists of numbers in messages."""

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
    """Facts about the run that are not in its config. None: unknown, and whatever reads it is skipped."""

    world_size: int | None = None  # processes
    device_type: str | None = None  # "cpu" or "cuda"

    def unknown(self) -> set[str]:
        """Return the names of unknown facts."""
        return {name for name in (WORLD_SIZE, DEVICE_TYPE) if getattr(self, name) is None}


Check = Callable[[Config, RunInfo], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """A check across keys, skipped where one of the keys or facts in ``reads`` is invalid or unknown.

    ``reads`` must name exactly what ``check`` reads; a test holds the two together.
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
    """Join numbers with commas."""
    return ", ".join(map(str, numbers))
