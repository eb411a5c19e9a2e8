"""Validation rows: one pass over each dataset type in source order, and all types one after the other.

Rows of several types share batches. A type with a single row would otherwise take a batch of its own, padding included.

Shapes: K dataset types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from internlm.data.loader import ValidLoader
from internlm.data.packing import Row, RowShape, padding_row
from internlm.data.rows import ValidRows
from internlm.data.sources import OneType, SampleSource


class TypedRows:
    """Rows of several dataset types, one type after the other; the type ids are indices into the types.

    Args:
        rows: Rows of each dataset type, at least one type.
        counts: Number of rows to use of each dataset type, [K].
    """

    def __init__(self, rows: Sequence[ValidRows], counts: Sequence[int]) -> None:
        self.shape: RowShape = rows[0].shape
        self._rows, self._ends = rows, np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        if index >= len(self):
            return padding_row(self.shape)
        type_id = int(np.searchsorted(self._ends, index, "right"))
        row = self._rows[type_id][index - (int(self._ends[type_id - 1]) if type_id else 0)]
        row.type_ids.fill(type_id)
        return row

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))


def rows_by_type(source: SampleSource, shape: RowShape) -> dict[str, ValidRows]:
    """Return the validation rows of each dataset type of ``source``."""
    # One sort for all types; a search for each would take a pass over all samples. It is stable, so each type keeps the
    # order of the source.
    order = np.argsort(source.type_ids, kind="stable")
    ends = np.cumsum(np.bincount(source.type_ids, minlength=len(source.types)))[:-1]
    parts = zip(source.types, np.split(order, ends), strict=True)
    return {name: ValidRows(OneType(source, name, samples), shape) for name, samples in parts}


def read_together(loaders: Sequence[ValidLoader]) -> ValidLoader:
    """Return a loader of the batches of all ``loaders``, whose rows follow one another without padding in between.

    A row belongs to the dataset type whose index in ``loaders`` is its type id. As many rows of each type are read as
    by its own loader.
    """
    first = loaders[0]
    rows = TypedRows([loader.dataset for loader in loaders], [loader.rows_used for loader in loaders])
    return first.with_rows(rows)
