"""Tokenized files for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_bin(path: Path, samples: Sequence[Sequence[int]]) -> Path:
    """Write ``path`` (a ``.bin`` file) and its ``.meta``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"tokens": list(sample)}) + "\n" for sample in samples]
    path.write_text("".join(lines))
    sizes = [len(line) for line in lines]
    write_meta(path, [(sum(sizes[:i]), len(sample)) for i, sample in enumerate(samples)])
    return path


def write_meta(path: Path, rows: Sequence[tuple[int, int]]) -> None:
    """Write the ``.meta`` of ``path``."""
    with path.with_name(path.name + ".meta").open("wb") as stream:
        np.save(stream, np.array(rows, np.int64).reshape(-1, 2))
