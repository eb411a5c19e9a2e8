"""Provenance of rows: the file, the sample and the tokens that each piece of a row was read from.

It is found again from the index of a row. Nothing is recorded while rows are read, so that reading costs no more.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from internlm.data.sources import SampleSource


class Origin(NamedTuple):
    """Place where a sample is stored."""

    file: str  # path of the file; empty if the sample is generated
    row: int  # index of the sample in the file, counted from 0
    byte: int | None = None  # offset of the sample in the file
    bytes: int | None = None  # bytes of the sample in the file


class TracedSpan(NamedTuple):
    """Tokens [``begin``, ``stop``) of a sample, which are at offset ``at`` of a row."""

    at: int
    begin: int
    stop: int
    length: int  # tokens of the sample that the order uses
    type_name: str
    origin: Origin

    def clipped(self, start: int, stop: int) -> TracedSpan | None:
        """Return the part of the span at offsets [``start``, ``stop``) of the row, placed at offsets from ``start``."""
        first, last = max(self.at, start), min(self.at + self.stop - self.begin, stop)
        if first >= last:
            return None
        begin = self.begin + first - self.at
        return self._replace(at=first - start, begin=begin, stop=begin + last - first)


class TraceableRows(Protocol):
    """Protocol for training rows whose pieces can be traced to their files."""

    def trace(self, index: int) -> list[TracedSpan]:
        """Return the pieces of row ``index``, counted from 0 over all epochs, in the order of their offsets."""


def origin_of(source: SampleSource, sample: int) -> Origin:
    """Return where a sample of ``source`` is stored; of a source without files, only the index of the sample."""
    find = getattr(source, "origin", None)
    return Origin("", sample) if find is None else find(sample)
