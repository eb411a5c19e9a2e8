"""Dense families of published configs, at small sizes, train."""

from __future__ import annotations

import math

import pytest

from internlm.verify.run import run_rank
from tests.harness.pool import run_ranks
from tests.unit.config.published_sections import DENSE, published


def _losses(rank: int, world_size: int) -> dict[str, list[float]]:
    return {family: run_rank(rank, world_size, published(DENSE[family]), 1024, 2).losses for family in DENSE}


def test_dense_families_train() -> None:
    (losses,) = run_ranks(1, _losses)
    vocab_size = published({})["model"]["vocab_size"]
    for family, of_steps in losses.items():
        # The first model guesses evenly, the second one differs from it by a small update.
        assert of_steps == pytest.approx([math.log(vocab_size)] * 2, abs=0.05), family
        assert of_steps[0] != of_steps[1]
    assert losses["LLAMA"] == losses["LLAMA2"]
