"""Fine-tuning with adapters of a checkpoint that was trained without, in another layout than it is loaded in."""

from __future__ import annotations

from pathlib import Path

import torch

from internlm.core.parallel.lora import is_adapter
from tests.dist.whole_runs import assert_same_tensors, fit, resume, saving

LORA = ("model.lora.rank=2", "adam.lr=0.01")


def test_a_trained_model_is_fine_tuned_and_its_weights_stay_as_they_are(tmp_path: Path) -> None:
    trained = fit(1, saving(tmp_path / "base", total=2)).tensors
    source = f"ckpt.load_ckpt_info.path={tmp_path / 'base' / 'ckpts' / 'step-2'}"
    load = (source, "ckpt.load_ckpt_info.content=('model',)")
    split = ("parallel.tensor.size=2", "parallel.tensor.mode=msp")
    tuning = saving(tmp_path / "tuned", *LORA, *load, *split, total=4)
    tuned = fit(2, tuning).tensors
    base = {name: value for name, value in trained.items() if name.startswith("model/")}
    assert_same_tensors({name: tuned[name] for name in base}, base)
    adapters = {name: value for name, value in tuned.items() if name.startswith("model/") and is_adapter(name)}
    assert all(value.any() for value in adapters.values())
    # The optimizer has states of adapters alone.
    assert all(is_adapter(name) for name in tuned if name.startswith("optimizer/"))
    # Its own checkpoint goes on, adapters and all, on one process.
    resumed = resume(1, saving(tmp_path / "tuned", *LORA, *load, total=6))
    assert_same_tensors(resumed.tensors, tuned)
    assert len(adapters) == len(tuned) - len(base) - sum(name.startswith("optimizer/") for name in tuned)
    assert torch.stack([value.abs().max() for value in adapters.values()]).min() > 0


def test_a_model_without_adapters_does_not_load_those_of_a_checkpoint(tmp_path: Path) -> None:
    fit(1, saving(tmp_path, *LORA, total=2))
    message = resume(1, saving(tmp_path, total=4)).message
    assert "model.lora: None, but" in message
    assert "was saved with" in message


def test_a_full_run_does_not_go_on_with_adapters_that_it_never_had(tmp_path: Path) -> None:
    fit(1, saving(tmp_path, total=2))
    message = resume(1, saving(tmp_path, *LORA, total=4)).message
    assert "model.lora is set, but the checkpoint has no adapters, and so no optimizer state of them." in message
    assert "load content=('model',)" in message
