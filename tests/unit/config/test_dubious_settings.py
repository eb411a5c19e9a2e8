"""Warnings about settings that have no effect or were hardly meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from internlm.config import resolve
from tests.unit.config.samples import config_of

PACKED_ONLY = "data.pack_sample_into_one: no effect, since data.use_packed_dataset is False"
NOTHING_TO_VALIDATE = "data.valid_every: no effect, since data.valid_folder is not given"
NOTHING_TO_FILL = "parallel.pipeline.mode: a pipeline with parallel.pipeline.size = 1 has no bubble to reduce"
RISES = "lr_scheduler.eta_min: the learning rate rises to 0.1 after its peak, since adam.lr is 0.001"
NO_DROPOUT = "model.dropout_selective_checkpoint: no effect, since model.drop_rate is 0"
NO_WINDOWS = (
    "model.sliding_window, model.global_layers, model.local_rope_base: no effect, since model.use_sliding_window is "
    "False"
)
ALL_WINDOWS = "model.rope_base: no effect, since all layers have a window, and model.local_rope_base is set"
TIED = "model.out_head_init_std: no effect, since model.tie_word_embeddings is True: model.embedding_init_std applies"
FROZEN = "model.embed_grad_scale: no effect, since model.lora freezes the embedding"
DENSE = "model.top_k, model.moe_type: no effect, since model.num_experts is 1"
NO_BIAS = "model.mlp_bias: no effect, since model.no_bias is True"
NO_MUON = "no effect, since Muon updates no parameter"
KEEPS_ALL = "ckpt.keep_every: no effect, since ckpt.keep_last is not set: all checkpoints are kept"
SAVES_NOTHING = "nothing is saved, since neither ckpt.checkpoint_every nor ckpt.enable_save_ckpt is set"
MUON_OF_SOME = {"pattern": "wo", "type": "Muon"}
ROWS: tuple[tuple[Mapping[str, Any], list[str]], ...] = (
    ({}, []),
    ({"data.pack_sample_into_one": True}, []),
    ({"data.pack_sample_into_one": True, "data.use_packed_dataset": False}, [PACKED_ONLY]),
    ({"parallel.pipeline.mode": "zbh1"}, [NOTHING_TO_FILL]),
    ({"parallel.pipeline": {"size": 1, "mode": "ZBV"}}, [NOTHING_TO_FILL]),
    ({"parallel.pipeline": {"size": 2, "mode": "ZBV"}}, []),
    ({"parallel.pipeline.mode": "1f1b"}, []),
    ({"data.valid_every": 10}, []),  # random data validate on random data
    ({"data.valid_every": 10, "data.train_folder": "x"}, [NOTHING_TO_VALIDATE]),
    ({"data.valid_every": 10, "data.train_folder": "x", "data.valid_folder": "y"}, []),
    ({"lr_scheduler.eta_min": 1e-3}, []),
    ({"lr_scheduler.eta_min": 0.1}, [RISES]),
    ({"lr_scheduler": {"eta_min": 0.1, "type": "constant"}}, []),
    ({"model.dropout_selective_checkpoint": False}, [NO_DROPOUT]),
    ({"model.dropout_selective_checkpoint": False, "model.drop_rate": 0.1}, []),
    ({"model.sliding_window": 4, "model.local_rope_base": 10.0, "model.global_layers": [1]}, [NO_WINDOWS]),
    ({"model_type": "GEMMA3", "model.use_sliding_window": False}, []),  # nobody has asked for the family's defaults
    ({"model_type": "GEMMA3", "model.rope_base": 10.0}, [ALL_WINDOWS]),  # the sixth layer would be the first without
    ({"model_type": "GEMMA3", "model.rope_base": 10.0, "model.global_layers": [1]}, []),
    ({"model.out_head_init_std": 0.1, "model.tie_word_embeddings": True}, [TIED]),
    ({"model.lora.rank": 2, "model.embed_grad_scale": 0.1}, [FROZEN]),
    ({"model.top_k": 4, "model.moe_type": "Dropless"}, [DENSE]),
    ({"model.no_bias": True, "model.mlp_bias": True, "model.o_bias": False}, [NO_BIAS]),
    ({"optimizer.nesterov": False}, [f"optimizer.nesterov: {NO_MUON}"]),
    (
        {"optimizer": {"type": "Lion", "momentum": 0.9, "ns_steps": 3, "adjust_lr": "original"}},
        [f"optimizer.momentum, optimizer.ns_steps, optimizer.adjust_lr: {NO_MUON}"],
    ),
    ({"ckpt.save_ckpt_folder": "local:x"}, [f"ckpt.save_ckpt_folder: {SAVES_NOTHING}"]),
    (
        {"ckpt": {"save_ckpt_folder": "local:x", "oss_snapshot_freq": 2, "keep_last": 2, "async_upload": True}},
        [f"ckpt.save_ckpt_folder, ckpt.oss_snapshot_freq, ckpt.keep_last: {SAVES_NOTHING}"],
    ),
    ({"ckpt": {"save_ckpt_folder": "local:x", "checkpoint_every": 0}}, []),
    ({"ckpt": {"save_ckpt_folder": "local:x", "checkpoint_every": 5, "enable_save_ckpt": False}}, []),
    ({"ckpt.keep_every": 100}, [KEEPS_ALL]),
    ({"ckpt": {"keep_every": 100, "keep_last": 2, "save_ckpt_folder": "local:x", "checkpoint_every": 5}}, []),
    ({"optimizer": {"type": "Muon", "momentum": 0.9}}, []),
    ({"optimizer": {"momentum": 0.9, "param_groups": [MUON_OF_SOME]}}, []),
)


@pytest.mark.parametrize(("keys", "warnings"), ROWS)
def test_warnings(keys: Mapping[str, Any], warnings: list[str]) -> None:
    assert resolve(config_of(keys)).warnings == warnings
