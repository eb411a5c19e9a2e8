"""Settings that are written as short strings."""

from __future__ import annotations

from typing import NamedTuple


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
