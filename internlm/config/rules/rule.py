"""What a rule is: a small function that looks at keys which must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from internlm.config.schema import Config
from internlm.config.support import Facts
from internlm.utils.errors import Problem

Check = Callable[[Config, Facts], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """``check`` reads exactly the keys and facts in ``reads``, and is skipped where one of them is not to be had."""

    reads: tuple[str, ...]
    check: Check


def at(section: str, *names: str) -> tuple[str, ...]:
    """Dotted keys of ``names`` in ``section``."""
    return tuple(f"{section}.{name}" for name in names)
