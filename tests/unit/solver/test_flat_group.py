"""Flat buffers: every element once, whatever the sizes and the number of shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from internlm.core.parallel import ParamPlacement, place
from internlm.core.parallel.placement import normal
from internlm.solver.optimizer.flat_group import ALIGNMENT, FlatGroup, Member, lay_out, padded, pieces_of_shard

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=8)
SHARDS = st.integers(1, 9)
Placed = tuple[str, nn.Parameter, ParamPlacement]


def placed(sizes: list[int] | list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Placed]:
    """Parameters of these sizes; no two elements are equal."""
    found, count = [], 0
    for number, size in enumerate(sizes):
        placement = ParamPlacement(size if isinstance(size, tuple) else (size,), normal(1.0))
        parameter = place(placement).to(dtype) if dtype == torch.float32 else nn.Parameter(place(placement).to(dtype))
        with torch.no_grad():
            parameter.copy_(torch.arange(count, count + parameter.numel()).view_as(parameter))
        count += parameter.numel()
        found.append((f"w{number}", parameter, placement))
    return found


def members(sizes: list[int]) -> list[Member]:
    return lay_out(placed(sizes))


@given(SIZES)
def test_members_lie_side_by_side(sizes: list[int]) -> None:
    laid = members(sizes)
    assert laid[0].start == 0
    assert [member.stop - member.start for member in laid] == sizes
    assert [member.start for member in laid[1:]] == [member.stop for member in laid[:-1]]


@given(st.integers(1, 10**12), st.integers(1, 4096))
def test_padding_makes_equal_aligned_shards(numel: int, shards: int) -> None:
    total = padded(numel, shards)
    assert total % (shards * ALIGNMENT) == 0
    assert 0 <= total - numel < shards * ALIGNMENT


@given(SIZES, SHARDS)
def test_the_pieces_of_all_shards_are_every_element_once(sizes: list[int], shards: int) -> None:
    laid = members(sizes)
    size = padded(laid[-1].stop, shards) // shards
    seen = {member.name: torch.zeros(member.stop - member.start, dtype=int) for member in laid}
    for shard in range(shards):
        used = torch.zeros(size, dtype=int)
        for piece in pieces_of_shard(laid, shard * size, (shard + 1) * size):
            seen[piece.member.name][piece.start : piece.stop] += 1
            used[piece.lo : piece.hi] += 1
            assert piece.hi - piece.lo == piece.stop - piece.start > 0
            assert piece.member.start + piece.start == shard * size + piece.lo
        assert (used <= 1).all()
    assert all((count == 1).all() for count in seen.values())


@given(SIZES, SHARDS, st.data())
def test_a_piece_is_the_same_elements_in_shard_and_parameter(
    sizes: list[int], shards: int, data: st.DataObject
) -> None:
    group = FlatGroup(placed(sizes), 0.0, data.draw(st.integers(0, shards - 1)), shards)
    for piece in group.pieces():
        flat = piece.member.parameter.detach().flatten()
        assert torch.equal(group.main[piece.lo : piece.hi], flat[piece.start : piece.stop])


def test_an_example() -> None:
    """Two shards of 64: the second parameter is cut."""
    laid = members([40, 60])
    assert [(p.member.name, p.start, p.stop, p.lo, p.hi) for p in pieces_of_shard(laid, 0, 64)] == [
        ("w0", 0, 40, 0, 40),
        ("w1", 0, 24, 40, 64),
    ]
    assert [(p.member.name, p.start, p.stop, p.lo, p.hi) for p in pieces_of_shard(laid, 64, 128)] == [
        ("w1", 24, 60, 0, 36)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_keep_their_values_and_become_views(dtype: torch.dtype) -> None:
    parameters = placed([(3, 4), (5,), (2, 1, 2)], dtype)
    before = [parameter.detach().clone() for _, parameter, _ in parameters]
    group = FlatGroup(parameters, 0.0, 0, 1)
    for (_, parameter, _), values in zip(parameters, before, strict=True):
        assert torch.equal(parameter, values)
        assert parameter.untyped_storage().data_ptr() == group.values.untyped_storage().data_ptr()
        assert parameter.main_grad.untyped_storage().data_ptr() == group.grads.untyped_storage().data_ptr()
        assert parameter.main_grad.shape == parameter.shape
    group.values.add_(1)
    assert torch.equal(parameters[0][1], before[0] + 1)


def test_a_transposed_parameter_is_laid_out_by_its_own_axes() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    group = FlatGroup([("w", weight, ParamPlacement((3, 2), normal(1.0)))], 0.0, 0, 1)
    assert weight.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert group.values[:6].tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_their_own_main_parameters(dtype: torch.dtype) -> None:
    group = FlatGroup(placed([100], dtype), 0.0, 1, 2)
    assert group.main.data_ptr() == group.value_shard.data_ptr()
    assert (group.main.dtype, group.grads.dtype) == (dtype, dtype)
    assert group.main.grad is group.grad_shard


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_main_parameters_and_gradients(dtype: torch.dtype) -> None:
    group = FlatGroup(placed([100], dtype), 0.0, 0, 1)
    assert (group.values.dtype, group.main.dtype, group.grads.dtype) == (dtype, torch.float32, torch.float32)
    assert torch.equal(group.main, group.values.float())


def test_small_updates_of_half_parameters_are_not_lost() -> None:
    """256 + 1 is 256 in bfloat16; two such updates are seen."""
    parameters = placed([1], torch.bfloat16)
    group = FlatGroup(parameters, 0.0, 0, 1)
    with torch.no_grad():
        group.main[0] = 256.0
        for expected in (256.0, 258.0):
            group.main[0] += 1
            group.main_to_values()
            assert parameters[0][1].item() == expected


def test_loaded_values_reach_the_main_parameters() -> None:
    parameters = placed([3], torch.bfloat16)
    group = FlatGroup(parameters, 0.0, 0, 1)
    with torch.no_grad():
        parameters[0][1].fill_(7)
    group.values_to_main()
    assert group.main[:3].tolist() == [7.0] * 3
