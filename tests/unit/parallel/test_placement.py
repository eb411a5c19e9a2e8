"""Placements: which part of a parameter is held here, and what its values are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from internlm.core.context.parallel_mode import ParallelMode
from internlm.core.parallel import ParamPlacement, place, place_replicated, placement_of
from internlm.core.parallel.placement import constant, initialize_parameters, normal, placed_parameters
from internlm.utils.errors import UserError

NORMAL = normal(1.0)


class Holder(nn.Module):
    """Parameters by name."""

    def __init__(self, **placements: ParamPlacement) -> None:
        super().__init__()
        for name, placement in placements.items():
            self.register_parameter(name, place(placement))


def part(whole: ParamPlacement, dim: int, index: int, count: int) -> ParamPlacement:
    """``whole``, split."""
    return replace(whole, shard_dim=dim, shard_mode=ParallelMode.TENSOR, shard_index=index, shard_count=count)


def drawn(seed: int = 1, **placements: ParamPlacement) -> dict[str, torch.Tensor]:
    module = Holder(**placements)
    initialize_parameters(module, seed)
    return dict(module.named_parameters())


# -- arithmetic


def test_a_whole_parameter() -> None:
    whole = ParamPlacement((4, 6), NORMAL)
    assert (whole.local_shape, whole.offset) == ((4, 6), (0, 0))


def test_a_part_of_one() -> None:
    third = part(ParamPlacement((4, 6), NORMAL), dim=1, index=2, count=3)
    assert (third.local_shape, third.offset) == ((4, 2), (0, 4))
    values = torch.arange(24).view(4, 6)
    assert torch.equal(third.local_part(values), values[:, 4:])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_parts_side_by_side_are_the_whole(shape: list[int], count: int, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= count
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [part(ParamPlacement(tuple(shape), NORMAL), dim, index, count) for index in range(count)]
    pieces = [placement.local_part(values) for placement in parts]
    assert all(piece.shape == placement.local_shape for piece, placement in zip(pieces, parts, strict=True))
    assert torch.equal(torch.cat(pieces, dim), values)


def test_the_local_part_is_a_view() -> None:
    values = torch.zeros(4)
    part(ParamPlacement((4,), NORMAL), 0, 1, 2).local_part(values).fill_(1)
    assert values.tolist() == [0, 0, 1, 1]


def test_a_parameter_has_its_local_shape_and_its_placement() -> None:
    half = part(ParamPlacement((4, 6), NORMAL), 0, 1, 2)
    parameter = place(half)
    assert parameter.shape == (2, 6)
    assert placement_of(parameter, "x") is half


# -- values


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_part_is_drawn_as_the_slice_of_the_whole(dim: int, index: int) -> None:
    whole = ParamPlacement((6, 9), NORMAL)
    third = part(whole, dim, index, 3)
    assert torch.equal(drawn(w=third)["w"], third.local_part(drawn(w=whole)["w"]))


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
    module.w.placement = ParamPlacement((5, 5), NORMAL)
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
    before = module.w.placement
    assert place_replicated(module).w.placement is before


def test_a_shared_parameter_is_listed_once() -> None:
    module = Holder(w=ParamPlacement((5, 5), NORMAL))
    module.tied = module.w
    assert [name for name, _, _ in placed_parameters(module)] == ["w"]
