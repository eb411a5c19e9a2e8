"""The loss of an epoch does not depend on how whole samples are packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from internlm.data.best_fit import pack
from tests.dist.whole_runs import fit
from tests.unit.data.files import write_bin

SAMPLES, SEQ_LEN = 12, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of at most SEQ_LEN tokens, some of which are inputs only."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    ids = [random.integers(1, 60, random.integers(2, SEQ_LEN + 1)) for _ in range(SAMPLES)]
    write_bin(root / "a.bin", [(tokens * np.where(random.random(len(tokens)) < 0.2, -1, 1)).tolist() for tokens in ids])
    return root


def test_packed_and_unpacked_epochs_have_the_same_loss_and_gradient(folder: Path) -> None:
    """One step has all samples: in sequences of their own, in rows without cuts, or in a single row."""
    padded = ("data.use_packed_dataset=False", "data.micro_bsz=2", f"data.global_batch={SAMPLES}")
    lengths = np.load(folder / "a.bin.meta")[:, 1]
    rows = len(pack(lengths, SEQ_LEN, SEQ_LEN, seed=1024))
    best_fit = ("data.pack=best_fit", "data.micro_bsz=1", f"data.global_batch={rows}")
    one_row = (f"data.micro_bsz={SAMPLES}", f"data.global_batch={SAMPLES}")
    logs = []
    for layout in (padded, best_fit, one_row):
        run = fit(1, [*layout, f"data.train_folder={folder}", f"data.seq_len={SEQ_LEN}"], stop_after=1)
        logs.append(run.log[0][1:3])
    assert logs[0][0] > 1
    torch.testing.assert_close(logs[1:], [logs[0]] * 2, rtol=1e-12, atol=0)
