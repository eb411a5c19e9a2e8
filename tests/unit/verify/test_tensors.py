from __future__ import annotations

import math

import pytest
import torch

from internlm.verify.record import TensorShards
from internlm.verify.tensors import assemble, join_shards, relative, relative_l2

WHOLE = torch.arange(12.0).view(3, 4)


def _part(rows: slice, values: torch.Tensor = WHOLE) -> dict[str, TensorShards]:
    return {"w": TensorShards((3, 4), {(rows.start, 0): values[rows].clone()})}


def test_parts_make_the_whole() -> None:
    result = assemble([_part(slice(0, 2)), _part(slice(2, 3))])
    assert torch.equal(result.tensors["w"], WHOLE)
    assert (result.shared, result.disagreements, result.holes) == (0, [], [])


def test_what_several_hold_must_agree() -> None:
    other = WHOLE.clone()
    other[1, 2] += 1
    other[1, 3] -= 4
    result = assemble([_part(slice(0, 3)), _part(slice(0, 3)), _part(slice(1, 3), other)])
    (found,) = result.disagreements
    assert (found.name, found.rank, found.elements, found.largest) == ("w", 2, 2, 4)
    assert torch.equal(result.tensors["w"], WHOLE)
    assert result.shared == 1
    assert "rank 2" in str(found)


def test_equal_nans_agree() -> None:
    nans = torch.full((3, 4), math.nan)
    assert assemble([_part(slice(0, 3), nans)] * 2).disagreements == []
    (found,) = assemble([_part(slice(0, 3)), _part(slice(0, 3), nans)]).disagreements
    assert found.elements == 12


def test_holes_are_told() -> None:
    assert assemble([_part(slice(0, 1)), _part(slice(2, 3))]).holes == ["w"]


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_along_an_axis(axis: int) -> None:
    tensor = torch.arange(20.0).view(5, 4)
    (whole,) = join_shards(list(tensor.tensor_split(2, axis)), tensor.shape)  # of 5: 3 and 2
    assert torch.equal(whole, tensor)


def test_whole_parts_are_compared_one_by_one() -> None:
    assert len(join_shards([WHOLE, WHOLE], WHOLE.shape)) == 2


@pytest.mark.parametrize("shapes", [[(3, 4), (3, 5)], [(1, 2), (2, 2)], [(3,), (3,)], [(1, 4), (1, 4)]])
def test_what_does_not_fit(shapes: list[tuple[int, ...]]) -> None:
    assert join_shards([torch.zeros(shape) for shape in shapes], WHOLE.shape) == []


def test_relative_differences() -> None:
    assert relative(1.1, 1.0) == pytest.approx(0.1)
    assert relative(0.0, 0.0) == 0
    assert relative(1.0, 0.0) == math.inf
    assert math.isnan(relative(math.nan, 1.0))
    assert relative_l2(WHOLE * 1.25, WHOLE) == 0.25
    assert relative_l2(WHOLE * 0, WHOLE * 0) == 0
    assert relative_l2(WHOLE, WHOLE * 0) == math.inf
    assert relative_l2(WHOLE, WHOLE[0]) == math.inf
    assert math.isnan(relative_l2(WHOLE * math.nan, WHOLE))
