"""Flat buffers: parameters as views, and this rank's shard of them, whatever the sizes and the buckets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from internlm.config.schema import HybridZeroConfig
from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import ParamPlacement
from internlm.core.parallel.param_state import NamedParameter, main_grad_of, named_parameters, set_placement
from internlm.core.parallel.placement import normal
from internlm.solver.optimizer.flat_buffers import FlatParamGroup
from internlm.solver.optimizer.param_groups import ParamGroupKey

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=8)
SHARDS = st.integers(1, 9)


def placed(sizes: list[int] | list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[NamedParameter]:
    """Parameters of these sizes; no two elements are equal."""
    module, count = nn.ParameterDict(), 0
    for index, size in enumerate(sizes):
        shape = size if isinstance(size, tuple) else (size,)
        values = torch.arange(count, count + math.prod(shape), dtype=dtype).view(shape)
        count += values.numel()
        module[f"w{index}"] = nn.Parameter(values)
        set_placement(module[f"w{index}"], ParamPlacement(shape, normal(1.0)))
    return named_parameters(module)


def group_of(parameters: list[NamedParameter], rank: int = 0, ranks: int = 1, **options: Any) -> FlatParamGroup:
    key = ParamGroupKey(dtype=parameters[0].parameter.dtype, rule="AdamW")
    group = FlatParamGroup(key, parameters, Group(ParallelMode.ZERO1, None, rank, ranks), HybridZeroConfig(**options))
    group.attach_grads()
    return group


def shared(sizes: list[int], rank: int, ranks: int, bucket_size: int, split_evenly: bool) -> FlatParamGroup:
    options = {"reduce_bucket_size": bucket_size, "use_split_tensor_optim": split_evenly}
    return group_of(placed(sizes), rank, ranks, **options)


def side_by_side(shards: list[Tensor]) -> Tensor:
    """The shard as one tensor."""
    return torch.cat(shards)


@given(SIZES, SHARDS, st.integers(1, 1000), st.booleans(), st.data())
def test_a_slice_is_the_same_elements_in_shard_and_parameter(
    sizes: list[int], shards: int, bucket_size: int, split_evenly: bool, data: st.DataObject
) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    group = shared(sizes, shard, shards, bucket_size, split_evenly)
    slices = list(group.shard_slices())
    parameters = {entry.named.name: entry.named.parameter for entry in group.entries}
    assert len(side_by_side(group.main_shards)) == group.owned == group.layout.owned(shard)
    assert [(part.index, part.lo) for part in slices] == sorted((part.index, part.lo) for part in slices)
    for part in slices:
        flat = parameters[part.name].detach().flatten()
        assert torch.equal(group.main_shards[part.index][part.lo : part.hi], flat[part.start : part.stop])
        assert split_evenly or (part.start, part.stop) == (0, len(flat))


@given(SIZES, SHARDS, st.integers(1, 1000), st.booleans())
def test_the_slices_of_all_shards_are_every_element_once(
    sizes: list[int], shards: int, bucket_size: int, split_evenly: bool
) -> None:
    seen = {f"w{number}": torch.zeros(size, dtype=int) for number, size in enumerate(sizes)}
    for shard in range(shards):
        group = shared(sizes, shard, shards, bucket_size, split_evenly)
        for part in group.shard_slices():
            seen[part.name][part.start : part.stop] += 1
    assert all((count == 1).all() for count in seen.values())


def test_an_example() -> None:
    """Two shards of 64: the second parameter is cut."""
    found = [
        [(p.name, p.start, p.stop, p.index, p.lo, p.hi) for p in group_of(placed([40, 60]), shard, 2).shard_slices()]
        for shard in range(2)
    ]
    assert found == [[("w0", 0, 40, 0, 0, 40), ("w1", 0, 24, 0, 40, 64)], [("w1", 24, 60, 0, 0, 36)]]


def test_an_example_of_two_buckets() -> None:
    """Two buckets of 128 elements, of which each of two ranks owns 64."""
    group = group_of(placed([100, 100]), 1, 2, reduce_bucket_size=128)
    assert [bucket.bounds for bucket in group.buckets] == [(0, 64, 128), (128, 192, 256)]
    assert [[entry.named.name for entry in group.entries_of(number)] for number in range(2)] == [["w0", "w1"], ["w1"]]
    found = [(p.name, p.start, p.stop, p.index, p.lo, p.hi) for p in group.shard_slices()]
    assert found == [("w0", 64, 100, 0, 0, 36), ("w1", 0, 28, 0, 36, 64), ("w1", 92, 100, 1, 0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_keep_their_values_and_become_views(dtype: torch.dtype) -> None:
    parameters = placed([(3, 4), (5,), (2, 1, 2)], dtype)
    before = [parameter.detach().clone() for _, parameter, _, _ in parameters]
    group = group_of(parameters)
    for (_, parameter, _, _), values in zip(parameters, before, strict=True):
        assert torch.equal(parameter, values)
        assert parameter.untyped_storage().data_ptr() == group.values.untyped_storage().data_ptr()
        assert main_grad_of(parameter).untyped_storage().data_ptr() == group.grads.untyped_storage().data_ptr()
        assert main_grad_of(parameter).shape == parameter.shape
    group.values.add_(1)
    assert torch.equal(parameters[0][1], before[0] + 1)


def test_a_transposed_parameter_is_laid_out_by_its_own_axes() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    set_placement(weight, ParamPlacement((3, 2), normal(1.0)))
    group = group_of(named_parameters(nn.ParameterDict({"w": weight})))
    assert weight.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert group.values[:6].tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_their_own_main_parameters(dtype: torch.dtype) -> None:
    group = group_of(placed([100, 100], dtype), 1, 2, reduce_bucket_size=128)
    assert not group.has_main
    for parts, whole in ((group.main_shards, group.values), (group.grad_shards, group.grads)):
        assert [part.data_ptr() for part in parts] == [whole[64:].data_ptr(), whole[192:].data_ptr()]
        assert {part.dtype for part in parts} == {dtype}


@pytest.mark.parametrize("wide_grads", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_main_parameters_and_gradients(dtype: torch.dtype, wide_grads: bool) -> None:
    """Gradients may be accumulated as they are, and are float32 once they are reduced."""
    parameters = placed([100, 100], dtype)
    group = group_of(parameters, 1, 2, reduce_bucket_size=128, fp32_grad_accum=wide_grads)
    assert (group.values.dtype, group.main_shards[0].dtype) == (dtype, torch.float32)
    assert torch.equal(side_by_side(group.main_shards), side_by_side(group.shards_of(group.values)).float())
    assert group.grads.dtype == main_grad_of(parameters[0].parameter).dtype == (torch.float32 if wide_grads else dtype)
    assert {part.dtype for part in group.grad_shards} == {torch.float32}
    assert (group.grad_shards[0].data_ptr() == group.grads[64:].data_ptr()) == wide_grads


def test_small_updates_of_half_parameters_are_not_lost() -> None:
    """256 + 1 is 256 in bfloat16; two such updates are seen."""
    parameters = placed([1], torch.bfloat16)
    group = group_of(parameters)
    with torch.no_grad():
        group.main_shards[0][0] = 256.0
        for expected in (256.0, 258.0):
            group.main_shards[0][0] += 1
            group.copy_main_to_model_params()
            assert parameters[0][1].item() == expected


def test_loaded_values_reach_the_main_parameters() -> None:
    parameters = placed([3], torch.bfloat16)
    group = group_of(parameters)
    with torch.no_grad():
        parameters[0][1].fill_(7)
    group.copy_model_to_main_params()
    assert group.main_shards[0][:3].tolist() == [7.0] * 3
