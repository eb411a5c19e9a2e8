"""Messages and activations of pipeline stages, computed by hand. tests/dist compares them with running pipelines."""

from __future__ import annotations

from typing import Any

import pytest

from internlm.config import Config, load_config
from internlm.core.context import ParallelMode
from internlm.costs import Symbols, expected_traffic
from internlm.costs.activations import kept_after_each_action, kept_for_weights, peak_saved, saved_for_backward
from internlm.train import build_inventory

STAGES, MICRO_BATCHES, TENSOR = 4, 6, 2
WORLD = STAGES * TENSOR
MESSAGE = 64 // TENSOR * 32 * 2  # S · H · e


def pipeline(model: dict[str, Any] | None = None, micro_batches: int = MICRO_BATCHES, **keys: Any) -> Config:
    """Return the config of a model of nine layers under fsp."""
    sizes = dict(num_layers=9, hidden_size=32, num_attention_heads=4, vocab_size=64, dtype="torch.bfloat16")
    data = dict(seq_len=64, micro_bsz=1, micro_num=micro_batches, total_steps=1)
    parallel = dict(tensor=dict(mode="fsp", size=TENSOR), pipeline=dict(size=STAGES, **keys))
    sections = dict(model=sizes | (model or {}), data=data, adam=dict(lr=1e-4), parallel=parallel)
    return load_config(dict(model_type="LLAMA2", **sections), world_size=WORLD, device_type="cpu")


SCHEDULES = {
    "1F1B": pipeline(),
    "ZB-H1": pipeline(mode="ZBH1"),
    "interleaved": pipeline(dict(num_chunks=2), micro_batches=8),
    "ZB-V": pipeline(mode="ZBV"),
}


@pytest.mark.parametrize(
    ("schedule", "borders"),
    [("1F1B", STAGES - 1), ("ZB-H1", STAGES - 1), ("interleaved", 2 * STAGES - 1), ("ZB-V", 2 * STAGES - 2)],
)
def test_every_border_between_ranks_is_crossed_twice(schedule: str, borders: int) -> None:
    config = SCHEDULES[schedule]
    for forward_only, crossings in ((True, 1), (False, 2)):
        steps = [
            expected_traffic(build_inventory(config, WORLD, stage), forward_only=forward_only)
            for stage in range(STAGES)
        ]
        entries = [step[ParallelMode.PIPELINE, "send"] for step in steps if (ParallelMode.PIPELINE, "send") in step]
        messages = crossings * borders * config.data.micro_num
        assert sum(entry.calls for entry in entries) == messages
        assert sum(entry.sent for entry in entries) == messages * MESSAGE


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_hold_the_model_once(schedule: str) -> None:
    stages = [Symbols.of(SCHEDULES[schedule], WORLD, stage) for stage in range(STAGES)]
    assert sum(s.layers for s in stages) == 9
    assert [sum(getattr(s.stage_layers, end) for s in stages) for end in ("has_embedding", "has_head")] == [1, 1]


def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_to_come() -> None:
    for stage in range(STAGES):
        one = sum(saved_for_backward(SCHEDULES["1F1B"], WORLD, stage=stage).values())
        assert peak_saved(SCHEDULES["1F1B"], WORLD, stage=stage) == (STAGES - stage) * one


def test_gpipe_keeps_all_micro_batches() -> None:
    config = pipeline(mode="GPIPE")
    assert peak_saved(config, WORLD) == MICRO_BATCHES * sum(saved_for_backward(config, WORLD).values())


def test_deferred_weight_gradients_keep_their_inputs_until_w() -> None:
    """The last stage of ZB-H1 runs F0 B0 F1 B1 … and all its W at the end, but for those that fit in between."""
    config, stage = SCHEDULES["ZB-H1"], STAGES - 1
    f = sum(saved_for_backward(config, WORLD, stage=stage).values())
    w = sum(kept_for_weights(config, WORLD, stage=stage).values())
    kept = kept_after_each_action(config, WORLD, stage=stage)
    assert kept[:8] == [f, w, w + f, 2 * w, 2 * w + f, 3 * w, 3 * w + f, 4 * w]
    assert kept[-1] == 0


def test_chunks_add_up_to_their_stage() -> None:
    for formula in (saved_for_backward, kept_for_weights):
        whole, *chunks = (formula(SCHEDULES["ZB-V"], WORLD, stage=1, chunk=chunk) for chunk in (None, 0, 1))
        assert whole == {name: sum(chunk[name] for chunk in chunks) for name in whole}


def test_a_tied_embedding_is_summed_over_both_ends() -> None:
    """One stage of ZB-V has both ends, so there nothing is summed."""
    tied = dict(tie_word_embeddings=True)
    for config, ends in ((pipeline(tied), {0, STAGES - 1}), (pipeline(tied, mode="ZBV"), set())):
        calls = [
            expected_traffic(build_inventory(config, WORLD, stage))[ParallelMode.PIPELINE, "all-reduce"].calls
            for stage in range(STAGES)
        ]
        assert calls == [2 + (stage in ends) for stage in range(STAGES)]
