"""Best-fit packing of a source's samples, made by one process of a machine and kept beside the index.

Shapes: N samples in the source, B rows, Q pieces in all rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from internlm.data.best_fit import Bins, joined, pack
from internlm.data.index_cache import CachedIndex
from internlm.data.packing import RowShape
from internlm.data.sources import SampleSource
from internlm.data.tokenized_source import TokenizedSource

VERSION = 1  # of the packing: with another one, samples are packed again
#: Samples from which a packing is kept; fewer take a tenth of a second at most.
LEAST_SAMPLES = 1 << 17
_COLUMNS = ("starts", "samples", "tokens", "parts")  # the narrow one last, so that all are aligned


def pack_source(
    source: SampleSource, shape: RowShape, seed: int, groups: Mapping[str, np.ndarray | None]
) -> tuple[Bins, list[int]]:
    """Divide samples among rows, each of which has samples of one group.

    Args:
        source: Source of the samples.
        shape: Sizes of a row.
        seed: Seed of the order in which samples are taken.
        groups: Indices of the samples of each group, which follow from its name; None: all of the source.

    Returns:
        The rows, group after group, and the number of rows of each group.
    """
    sizes = shape.seq_len, shape.packed_length

    def build() -> CachedIndex:
        parts = [pack(source.lengths, *sizes, seed, members) for members in groups.values()]
        bins = joined(parts)
        return CachedIndex({"rows": [len(part) for part in parts]}, {name: getattr(bins, name) for name in _COLUMNS})

    if isinstance(source, TokenizedSource) and len(source.lengths) >= LEAST_SAMPLES:
        key = repr((source.index.key, VERSION, sizes, seed, list(groups)))
        found = source.index.cache.beside("rows").load_or_build(key, build)
    else:
        found = build()
    return Bins(**found.columns, lengths=source.lengths, seq_len=shape.seq_len), found.header["rows"]
