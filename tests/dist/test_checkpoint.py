"""Checkpoints between layouts, in parts, and in trouble."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from internlm.core.trainer import Hook, Trainer
from tests.dist.runs import Outcome, assert_same_tensors, fit, resume

TOTAL = 6


def _overrides(folder: Path, *more: str) -> list[str]:
    return [
        f"data.total_steps={TOTAL}",
        f"log_folder={folder / 'logs'}",
        "ckpt.enable_save_ckpt=True",
        "ckpt.checkpoint_every=2",
        f"ckpt.save_ckpt_folder={folder / 'ckpts'}",
        *more,
    ]


def _saved(ranks: int, folder: Path, *more: str, stop_after: int = 2) -> Outcome:
    return fit(ranks, _overrides(folder, *more), stop_after)


def _layout(zero1: int, *more: str) -> list[str]:
    return [f"parallel.zero1.size={zero1}", *more]


# -- another layout


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize(
    ("ranks", "zero1", "other_ranks", "other_zero1"),
    [(2, -1, 1, 1), (2, -1, 4, -1), (1, 1, 4, 2), (2, 1, 2, -1), (4, -1, 2, 1), (4, 2, 4, -1)],
)
def test_another_layout(dtype: str, ranks: int, zero1: int, other_ranks: int, other_zero1: int, tmp_path: Path) -> None:
    dtype = f"model.dtype={dtype}"
    saved = _saved(ranks, tmp_path, *_layout(zero1, dtype))
    loaded = resume(other_ranks, _overrides(tmp_path, *_layout(other_zero1, dtype)))
    assert loaded.message.endswith("step-2 at step 2")
    _assert_goes_on(loaded, saved)


def test_a_number_of_ranks_that_divides_nothing(tmp_path: Path) -> None:
    saved = _saved(2, tmp_path, "data.micro_num=3")
    _assert_goes_on(resume(3, _overrides(tmp_path, "data.micro_num=2")), saved)


def _assert_goes_on(loaded: Outcome, saved: Outcome) -> None:
    assert_same_tensors(loaded.tensors, saved.tensors)
    assert (loaded.state, loaded.ranks[0].steps) == (saved.state, saved.ranks[0].steps)
    for rows, wanted in zip(loaded.samples, saved.samples, strict=True):
        assert torch.equal(rows, wanted)


def test_four_then_two_then_one_is_one(tmp_path: Path) -> None:
    straight = fit(1, _overrides(tmp_path / "straight"))
    parts = [fit(ranks, _overrides(tmp_path / "parts"), stop) for ranks, stop in ((4, 2), (2, 4), (1, TOTAL))]
    log = [entry[:3] for part in parts for entry in part.log]
    for (step, loss, norm), (wanted_step, wanted_loss, wanted_norm, *_) in zip(log, straight.log, strict=True):
        assert step == wanted_step
        assert loss == pytest.approx(wanted_loss, rel=1e-12)
        assert norm == pytest.approx(wanted_norm, rel=1e-10)
