"""A checkpoint is loaded into a model that fuses its projections in another way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from internlm.checkpoint import compatibility
from internlm.checkpoint.fused_tensors import as_stored, names_as_stored
from internlm.checkpoint.logical_tensors import LogicalTensor, model_tensors
from internlm.checkpoint.manager import load_weights
from internlm.train.saved_model import load_model
from internlm.utils.errors import CheckpointError
from tests.unit.checkpoint.hf_samples import checkpoint_of
from tests.unit.checkpoint.samples import in_ranges, save
from tests.unit.model.samples import decoder
from tests.unit.model.test_unfused import BIASES, UNFUSED, assert_same, fuse, pair, values_of

FUSION = [
    {"enable_qkv_fusion": qkv, "mlp_layer_fusion": mlp} for qkv, mlp in itertools.product([True, False], repeat=2)
]
#: Tensors of a fused block, with two kv heads of three query heads, and a bias.
FUSED = {
    "optimizer/exp_avg/layers.1.attention.wqkv.weight": (2, 5, 4, 3),
    "model/layers.1.attention.wqkv.bias": (2, 5, 4),
    "model/layers.1.feed_forward.w13.weight": (2, 6, 3),
    "model/layers.1.feed_forward.w2.weight": (3, 6),
}


def stored_as(tensors: dict[str, Tensor]) -> dict[str, TensorStorageMetadata]:
    properties = TensorProperties(dtype=torch.float64)
    return {name: TensorStorageMetadata(properties, tensor.shape, []) for name, tensor in tensors.items()}


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split fused tensors into those of an unfused decoder."""
    found = {}
    for name, tensor in tensors.items():
        parts = {name: tensor}
        if "wqkv" in name:
            rows = zip("qkv", tensor.split([tensor.shape[1] - 2, 1, 1], 1), strict=True)
            parts = {name.replace("wqkv", f"w{x}"): part for x, part in rows}
        elif "w13" in name:
            parts = {name.replace("w13", f"w{x}"): part for x, part in zip("13", tensor.split(1), strict=True)}
        found |= {key: part.clone() for key, part in parts.items()}
    return found


def whole(tensor: LogicalTensor) -> Tensor:
    """Assemble the slices of a tensor; what is in none of them is NaN."""
    found = torch.full(tensor.global_shape, torch.nan, dtype=tensor.dtype)
    for offsets, part in tensor.slices.items():
        found[tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))] = part
    return found


@given(st.booleans(), st.lists(st.integers(1, 200), max_size=4))
def test_slices_of_any_rank_are_views_at_the_right_places(is_fused: bool, split_at: list[int]) -> None:
    """ZeRO splits a tensor at any element; a slice of a rank may be in several parts, or in none."""
    fused = {name: torch.arange(torch.Size(shape).numel()).view(shape).double() for name, shape in FUSED.items()}
    of_run, of_checkpoint = (fused, split(fused)) if is_fused else (split(fused), fused)
    mine = {name: in_ranges(tensor, [at for at in split_at if at < tensor.numel()]) for name, tensor in of_run.items()}
    found = as_stored(mine, stored_as(of_checkpoint))
    assert_same({name: whole(tensor) for name, tensor in found.items()}, of_checkpoint)
    assert names_as_stored(mine, stored_as(of_checkpoint)) == of_checkpoint.keys()
    for tensor in found.values():
        for part in tensor.slices.values():
            part.neg_()
    assert_same({name: whole(tensor) for name, tensor in mine.items()}, {name: -x for name, x in of_run.items()})


@pytest.mark.parametrize("keys", FUSION, ids=str)
def test_any_model_loads_what_any_other_saved(keys: dict[str, Any], tmp_path: Path) -> None:
    one, other = pair("QWEN2", BIASES)
    for source in (one, other):
        checkpoint = checkpoint_of(source, "QWEN2", tmp_path / type(source).__name__ / str(id(source)))
        target = decoder("QWEN2", **BIASES, **keys)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.zero_()
        load_weights(target, checkpoint)
        assert_same(fuse(values_of(target)), values_of(one))
        overrides = ["model.dtype=torch.float64", *(f"model.{key}={value}" for key, value in keys.items())]
        assert_same(values_of(load_model(checkpoint, overrides)), values_of(target))


def test_other_sizes_are_other_shapes(tmp_path: Path) -> None:
    save(tmp_path / "step-3", model_tensors(decoder()))
    with pytest.raises(CheckpointError) as caught:
        load_weights(decoder(**UNFUSED, num_kv_attention_heads=2), tmp_path / "step-3")
    problems = str(caught.value)
    assert "model/layers.0.attention.wqkv.weight: expected shape [2, 4, 8, 32], got [4, 3, 8, 32]" in problems
    assert problems.count("expected shape") == len(caught.value.problems) == 2


def test_tensors_of_another_model_are_left_alone() -> None:
    """Names alone do not make a projection: these have no such axis."""
    of_run = {
        "model/mine.wq.bias": LogicalTensor.whole(torch.zeros(4)),
        "model/mine.wk.bias": LogicalTensor((2, 1), torch.float64),
    }
    assert as_stored(of_run, stored_as({"model/mine.wqkv.bias": torch.zeros(12)})) == of_run
    assert as_stored({"w1": LogicalTensor((), torch.float64)}, {}).keys() == {"w1"}


def test_adapters_of_a_fused_projection_are_others() -> None:
    model = {"lora": {"rank": 3, "targets": ["w13", "wo"]}, "enable_qkv_fusion": True, "mlp_layer_fusion": True}
    found = compatibility.other_architecture("step-1", {"model": model}, {"model": {**model, **UNFUSED}})
    assert [str(problem) for problem in found] == [
        "model.mlp_layer_fusion: False, but step-1 was saved with True, by which w13 has other adapters. "
        "Use the config of the checkpoint"
    ]
