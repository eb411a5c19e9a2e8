"""Flat buffers: parameters as views, and this rank's shard of them, whatever the sizes and the buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from internlm.core.parallel import ParamPlacement, place
from internlm.core.parallel.param_state import main_grad_of
from internlm.core.parallel.placement import normal
from internlm.solver.optimizer.flat_buffers import FlatParamGroup
from internlm.solver.optimizer.param_groups import NamedParameter, ParamGroupKey

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=8)
SHARDS = st.integers(1, 9)


def placed(sizes: list[int] | list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[NamedParameter]:
    """Parameters of these sizes; no two elements are equal."""
    found, count = [], 0
    for number, size in enumerate(sizes):
        placement = ParamPlacement(size if isinstance(size, tuple) else (size,), normal(1.0))
        parameter = place(placement).to(dtype) if dtype == torch.float32 else nn.Parameter(place(placement).to(dtype))
        with torch.no_grad():
            parameter.copy_(torch.arange(count, count + parameter.numel()).view_as(parameter))
        count += parameter.numel()
        found.append(NamedParameter(f"w{number}", parameter, placement, number))
    return found


def group_of(parameters: list[NamedParameter], shard: int = 0, shards: int = 1, **options: Any) -> FlatParamGroup:
    return FlatParamGroup(ParamGroupKey(parameters[0].parameter.dtype, "AdamW"), parameters, shard, shards, **options)


def side_by_side(parts: list[Tensor]) -> Tensor:
    """In the order that pieces count in."""
    return torch.cat(parts)


@given(SIZES, SHARDS, st.integers(1, 1000), st.booleans(), st.data())
def test_a_piece_is_the_same_elements_in_shard_and_parameter(
    sizes: list[int], shards: int, bucket_size: int, split_evenly: bool, data: st.DataObject
) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    group = group_of(placed(sizes), shard, shards, bucket_size=bucket_size, split_evenly=split_evenly)
    pieces, parameters = list(group.pieces()), {member.name: member.parameter for member in group.members}
    assert len(side_by_side(group.main_parts)) == group.owned == group.layout.owned(shard)
    assert [(piece.number, piece.lo) for piece in pieces] == sorted((piece.number, piece.lo) for piece in pieces)
    for piece in pieces:
        flat = parameters[piece.name].detach().flatten()
        assert torch.equal(group.main_parts[piece.number][piece.lo : piece.hi], flat[piece.start : piece.stop])
        assert split_evenly or (piece.start, piece.stop) == (0, len(flat))


@given(SIZES, SHARDS, st.integers(1, 1000), st.booleans())
def test_the_pieces_of_all_shards_are_every_element_once(
    sizes: list[int], shards: int, bucket_size: int, split_evenly: bool
) -> None:
    seen = {f"w{number}": torch.zeros(size, dtype=int) for number, size in enumerate(sizes)}
    for shard in range(shards):
        group = group_of(placed(sizes), shard, shards, bucket_size=bucket_size, split_evenly=split_evenly)
        for piece in group.pieces():
            seen[piece.name][piece.start : piece.stop] += 1
    assert all((count == 1).all() for count in seen.values())


def test_an_example() -> None:
    """Two shards of 64: the second parameter is cut."""
    found = [
        [(p.name, p.start, p.stop, p.number, p.lo, p.hi) for p in group_of(placed([40, 60]), shard, 2).pieces()]
        for shard in range(2)
    ]
    assert found == [[("w0", 0, 40, 0, 0, 40), ("w1", 0, 24, 0, 40, 64)], [("w1", 24, 60, 0, 0, 36)]]


def test_an_example_of_two_buckets() -> None:
    """Of 128 and 128 elements, of which each of two ranks owns 64."""
    group = group_of(placed([100, 100]), 1, 2, bucket_size=128)
    assert [bucket.cuts for bucket in group.buckets] == [(0, 64, 128), (128, 192, 256)]
    assert [[m.name for m in group.members_of(number)] for number in range(2)] == [["w0", "w1"], ["w1"]]
    found = [(p.name, p.start, p.stop, p.number, p.lo, p.hi) for p in group.pieces()]
    assert found == [("w0", 64, 100, 0, 0, 36), ("w1", 0, 28, 0, 36, 64), ("w1", 92, 100, 1, 0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_keep_their_values_and_become_views(dtype: torch.dtype) -> None:
    parameters = placed([(3, 4), (5,), (2, 1, 2)], dtype)
    before = [parameter.detach().clone() for _, parameter, *_ in parameters]
    group = group_of(parameters)
    for (_, parameter, *_), values in zip(parameters, before, strict=True):
        assert torch.equal(parameter, values)
        assert parameter.untyped_storage().data_ptr() == group.values.untyped_storage().data_ptr()
        assert main_grad_of(parameter).untyped_storage().data_ptr() == group.grads.untyped_storage().data_ptr()
        assert main_grad_of(parameter).shape == parameter.shape
    group.values.add_(1)
    assert torch.equal(parameters[0][1], before[0] + 1)


def test_a_transposed_parameter_is_laid_out_by_its_own_axes() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    group = group_of([NamedParameter("w", weight, ParamPlacement((3, 2), normal(1.0)))])
    assert weight.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert group.values[:6].tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_their_own_main_parameters(dtype: torch.dtype) -> None:
    group = group_of(placed([100, 100], dtype), 1, 2, bucket_size=128)
    assert not group.has_main
    for parts, whole in ((group.main_parts, group.values), (group.grad_parts, group.grads)):
        assert [part.data_ptr() for part in parts] == [whole[64:].data_ptr(), whole[192:].data_ptr()]
        assert {part.dtype for part in parts} == {dtype}


@pytest.mark.parametrize("wide_grads", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_main_parameters_and_gradients(dtype: torch.dtype, wide_grads: bool) -> None:
    """Gradients may be accumulated as they are, and are float32 once they are reduced."""
    parameters = placed([100, 100], dtype)
    group = group_of(parameters, 1, 2, bucket_size=128, wide_grads=wide_grads)
    assert (group.values.dtype, group.main_parts[0].dtype) == (dtype, torch.float32)
    assert torch.equal(side_by_side(group.main_parts), side_by_side(group.parts_of(group.values)).float())
    assert group.grads.dtype == main_grad_of(parameters[0].parameter).dtype == (torch.float32 if wide_grads else dtype)
    assert {part.dtype for part in group.grad_parts} == {torch.float32}
    assert (group.grad_parts[0].data_ptr() == group.grads[64:].data_ptr()) == wide_grads


def test_small_updates_of_half_parameters_are_not_lost() -> None:
    """256 + 1 is 256 in bfloat16; two such updates are seen."""
    parameters = placed([1], torch.bfloat16)
    group = group_of(parameters)
    with torch.no_grad():
        group.main_parts[0][0] = 256.0
        for expected in (256.0, 258.0):
            group.main_parts[0][0] += 1
            group.copy_main_to_params()
            assert parameters[0][1].item() == expected


def test_loaded_values_reach_the_main_parameters() -> None:
    parameters = placed([3], torch.bfloat16)
    group = group_of(parameters)
    with torch.no_grad():
        parameters[0][1].fill_(7)
    group.copy_params_to_main()
    assert group.main_parts[0][:3].tolist() == [7.0] * 3
