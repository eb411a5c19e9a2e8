"""Placements: which part of a parameter is held here, and what its values are."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import ParamPlacement, place, place_replicated, placement_of
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.param_state import placed_parameters, set_placement
from internlm.core.parallel.placement import ShardSpec, constant, normal
from internlm.utils.errors import UserError

NORMAL = normal(1.0)


class Holder(nn.Module):
    """Parameters by name."""

    def __init__(self, **placements: ParamPlacement) -> None:
        super().__init__()
        for name, placement in placements.items():
            self.register_parameter(name, place(placement))


def part(whole: ParamPlacement, axis: int | None, index: int, count: int) -> ParamPlacement:
    """``whole``, split."""
    return replace(whole, shard=ShardSpec(ParallelMode.TENSOR, index, count, axis))


def drawn(seed: int = 1, **placements: ParamPlacement) -> dict[str, torch.Tensor]:
    module = Holder(**placements)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    initialize_parameters(module, seed)
    return dict(module.named_parameters())


def slices(placement: ParamPlacement, start: int = 0, stop: int | None = None) -> list[tuple[tuple[int, ...], ...]]:
    """Offsets and sizes of the boxes of [start, stop); of all that is held where ``stop`` is None."""
    stop = math.prod(placement.local_shape) if stop is None else stop
    return [(box.offsets, box.sizes) for box in placement.slices(start, stop)]


# -- arithmetic


def test_a_whole_parameter() -> None:
    whole = ParamPlacement((4, 6), NORMAL)
    assert whole.local_shape == (4, 6)
    assert slices(whole) == [((0, 0), (4, 6))]
    assert slices(whole, 3, 13) == [((0, 3), (1, 3)), ((1, 0), (1, 6)), ((2, 0), (1, 1))]
    values = torch.arange(24).view(4, 6)
    assert whole.shard_of(values) is values


def test_a_part_of_one() -> None:
    third = part(ParamPlacement((4, 6), NORMAL), axis=1, index=2, count=3)
    assert third.local_shape == (4, 2)
    assert slices(third) == [((0, 4), (4, 2))]
    assert slices(third, 3, 6) == [((1, 5), (1, 1)), ((2, 4), (1, 2))]
    values = torch.arange(24).view(4, 6)
    assert torch.equal(third.shard_of(values), values[:, 4:])


def test_a_run_of_rows() -> None:
    """Four rows of two matrices of three: the second half begins within the second matrix."""
    halves = [part(ParamPlacement((2, 4, 3), NORMAL), None, index, 2) for index in range(2)]
    assert [half.local_shape for half in halves] == [(4, 3), (4, 3)]
    assert [slices(half) for half in halves] == [[((0, 0, 0), (1, 4, 3))], [((1, 0, 0), (1, 4, 3))]]
    thirds = [part(ParamPlacement((2, 4, 3), NORMAL), None, index, 3) for index in range(3)]
    assert [third.local_shape for third in thirds] == [(3, 3)] * 3
    assert slices(thirds[1]) == [((0, 3, 0), (1, 1, 3)), ((1, 0, 0), (1, 2, 3))]
    assert slices(thirds[2]) == [((1, 2, 0), (1, 2, 3))], "the last row that it has room for is padding"
    assert slices(thirds[2], 5, 9) == [((1, 3, 2), (1, 1, 1))]
    assert slices(thirds[2], 6, 9) == []


def test_the_last_parts_may_hold_nothing() -> None:
    """Five rows on four ranks: two, two, one and none."""
    parts = [part(ParamPlacement((5, 3), NORMAL), None, index, 4) for index in range(4)]
    assert [held.local_shape for held in parts] == [(2, 3)] * 4
    assert [slices(held) for held in parts] == [[((0, 0), (2, 3))], [((2, 0), (2, 3))], [((4, 0), (1, 3))], []]
    values = torch.arange(15).view(5, 3)
    assert [held.shard_of(values).tolist() for held in parts] == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
        [[12, 13, 14]],
        [],
    ]


@st.composite
def splits(draw: st.DrawFn) -> list[ParamPlacement]:
    """A parameter in parts, of any kind; where rows are split there may be fewer of them than parts."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = draw(st.integers(1, 7))
    axis = draw(st.none() | st.integers(0, len(shape) - 1)) if len(shape) > 1 else 0
    if axis is not None:
        shape[axis] *= count
    return [part(ParamPlacement(tuple(shape), NORMAL), axis, index, count) for index in range(count)]


def numbered(placement: ParamPlacement) -> torch.Tensor:
    """The whole parameter; no two elements are equal, and none is 0."""
    return 1 + torch.arange(math.prod(placement.global_shape)).view(placement.global_shape)


def padded_part(placement: ParamPlacement, whole: torch.Tensor) -> torch.Tensor:
    """What a rank holds of ``whole``, flat, zeros behind it where it is padded."""
    held = placement.shard_of(whole).reshape(-1)
    return torch.cat([held, held.new_zeros(math.prod(placement.local_shape) - len(held))])


@given(splits())
def test_parts_side_by_side_are_the_whole(parts: list[ParamPlacement]) -> None:
    whole, axis = numbered(parts[0]), parts[0].shard.axis
    pieces = [placement.shard_of(whole) for placement in parts]
    if axis is None:
        assert torch.equal(torch.cat(pieces).flatten(), whole.flatten())
        assert all(piece.shape[0] <= parts[0].local_shape[0] for piece in pieces)
        assert all(piece.shape[1:] == parts[0].local_shape[1:] for piece in pieces)
    else:
        assert torch.equal(torch.cat(pieces, axis), whole)
        assert all(piece.shape == parts[0].local_shape for piece in pieces)
    assert len({placement.local_shape for placement in parts}) == 1


@given(splits(), st.data())
def test_boxes_of_all_parts_are_the_whole_once_wherever_they_are_cut(
    parts: list[ParamPlacement], data: st.DataObject
) -> None:
    whole = numbered(parts[0])
    found, times = torch.zeros_like(whole), torch.zeros_like(whole)
    for placement in parts:
        held, at = padded_part(placement, whole), 0
        cuts = data.draw(st.lists(st.integers(0, len(held)), max_size=4))
        for start, stop in pairwise(sorted([0, *cuts, len(held)])):
            for box in placement.slices(start, stop):
                assert at <= box.start < box.stop <= stop
                at = box.stop
                where = tuple(slice(o, o + size) for o, size in zip(box.offsets, box.sizes, strict=True))
                found[where] = held[box.start : box.stop].view(box.sizes)
                times[where] += 1
        assert held[at:].eq(0).all(), "only padding is in no box"
    assert times.eq(1).all()
    assert torch.equal(found, whole)


@given(splits())
def test_parts_hold_little_padding(parts: list[ParamPlacement]) -> None:
    """Less than a row on each rank, and none at all where an axis is split."""
    whole = numbered(parts[0])
    rows = (len(parts) * math.prod(parts[0].local_shape) - whole.numel()) / whole.shape[-1]
    assert 0 <= rows < len(parts)
    assert rows == 0 or parts[0].shard.axis is None


@pytest.mark.parametrize("axis", [0, None])
def test_the_local_part_is_a_view(axis: int | None) -> None:
    values = torch.zeros(4, 1)
    part(ParamPlacement((4, 1), NORMAL), axis, 1, 2).shard_of(values).fill_(1)
    assert values.flatten().tolist() == [0, 0, 1, 1]


def test_a_parameter_has_its_local_shape_and_its_placement() -> None:
    half = part(ParamPlacement((4, 6), NORMAL), 0, 1, 2)
    parameter = place(half)
    assert parameter.shape == (2, 6)
    assert placement_of(parameter, "x") is half


# -- values


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_part_is_drawn_as_the_slice_of_the_whole(axis: int | None, index: int) -> None:
    whole = ParamPlacement((6, 9), NORMAL)
    third = part(whole, axis, index, 3)
    assert torch.equal(drawn(w=third)["w"], third.shard_of(drawn(w=whole)["w"]))


@settings(max_examples=30)
@given(splits())
def test_parts_are_drawn_as_slices_of_the_whole_and_padding_is_zero(parts: list[ParamPlacement]) -> None:
    whole = drawn(w=replace(parts[0], shard=None))["w"].detach()
    for placement in parts:
        held = drawn(w=placement)["w"]
        assert held.shape == placement.local_shape
        assert torch.equal(held.flatten(), padded_part(placement, whole))


def test_values_depend_on_seed_and_name_alone() -> None:
    w = ParamPlacement((5, 5), NORMAL)
    alone, among_others = drawn(w=w), drawn(a=w, w=w, z=ParamPlacement((3,), NORMAL))
    assert torch.equal(alone["w"], among_others["w"])
    assert not torch.equal(among_others["a"], among_others["w"])
    assert not torch.equal(drawn(seed=2, w=w)["w"], alone["w"])


def test_values_do_not_depend_on_what_was_drawn_before() -> None:
    w = ParamPlacement((5, 5), NORMAL)
    torch.manual_seed(0)
    first = drawn(w=w)["w"]
    torch.manual_seed(1)
    assert torch.equal(drawn(w=w)["w"], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_values_of_other_types_are_those_of_float32(dtype: torch.dtype) -> None:
    module = Holder(w=ParamPlacement((5, 5), NORMAL)).to(dtype)
    set_placement(module.w, ParamPlacement((5, 5), NORMAL))
    initialize_parameters(module, 1)
    assert torch.equal(module.w, drawn(w=ParamPlacement((5, 5), NORMAL))["w"].to(dtype))


def test_drawing_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    drawn(w=ParamPlacement((5, 5), NORMAL))
    assert torch.equal(torch.get_rng_state(), before)


def test_distributions() -> None:
    values = drawn(w=ParamPlacement((200, 200), normal(0.02)), one=ParamPlacement((3,), constant(1.0)))
    assert values["w"].std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(values["w"].mean().item()) < 0.001
    assert values["one"].tolist() == [1.0] * 3


# -- modules that are not ours


def test_a_parameter_without_a_placement_is_an_error() -> None:
    with pytest.raises(UserError, match=r"model parameter 'fc\.weight': has no ParamPlacement.*place_replicated"):
        list(placed_parameters(nn.ModuleDict({"fc": nn.Linear(2, 2)})))


def test_place_replicated_keeps_the_values() -> None:
    linear = nn.Linear(3, 2)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    assert place_replicated(linear) is linear
    initialize_parameters(linear, seed=1)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)


def test_place_replicated_tells_matrices_from_biases() -> None:
    placements = {name: placement for name, _, placement in placed_parameters(place_replicated(nn.Linear(3, 2)))}
    assert placements["weight"].is_matrix
    assert not placements["bias"].is_matrix
    assert placements["weight"].local_shape == (2, 3)


def test_place_replicated_leaves_our_own_parameters_alone() -> None:
    module = Holder(w=ParamPlacement((5, 5), NORMAL))
    module.fc = place_replicated(nn.Linear(2, 2))
    before = placement_of(module.w)
    assert placement_of(place_replicated(module).w) is before


def test_a_shared_parameter_is_listed_once() -> None:
    module = Holder(w=ParamPlacement((5, 5), NORMAL))
    module.tied = module.w
    assert [name for name, _, _ in placed_parameters(module)] == ["w"]
