"""What every section of the config shares.

Settings that are written as short strings.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section: frozen once resolved, no unknown keys, no guessing at types (text is never taken for a number).

    Each field is documented by the string beneath it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )


Count = Annotated[int, Field(ge=1)]  # at least one of something
CountOrZero = Annotated[int, Field(ge=0)]
LastStep = Annotated[int, Field(ge=-1)]  # counted from 0; -1: none yet
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MoreThanOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Shrinking = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]  # a factor
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # an exponential average's coefficient


class Rampup(NamedTuple):
    """Growth of the micro-batches per step: ``start``, then ``increment`` more every so many batches."""

    start: int
    increment: int
    every: int


def parse_rampup(text: str) -> Rampup | None:
    """``"start increment every"`` as three counts; None for an empty string. Raises ValueError saying what is wrong."""
    words = text.split()
    if not words:
        return None
    if len(words) != 3 or not all(_is_count(word) and int(word) for word in words):
        raise ValueError(f"{text!r} isn't three counts of at least 1, 'start increment every'")
    return Rampup(*map(int, words))


def parse_skip_batches(text: str) -> tuple[tuple[int, int], ...]:
    """``"a-b,c"`` as inclusive ranges, in order and merged. Raises ValueError saying what is wrong."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(_parse_range(part.strip()) for part in text.split(",") if text.strip()):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def _parse_range(part: str) -> tuple[int, int]:
    first, dash, last = (word.strip() for word in part.partition("-"))
    if not _is_count(first) or (dash and not _is_count(last)):
        raise ValueError(f"{part!r} is neither a batch number nor a range 'first-last'")
    if dash and int(last) < int(first):
        raise ValueError(f"the range {part!r} ends before it begins")
    return int(first), int(last or first)


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdigit()
