"""A run of a flattened tensor as boxes of the tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm.core.parallel.placement import slices_of_range

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape, and a run of its elements."""
    shape = draw(SHAPES)
    numel = torch.Size(shape).numel()
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


def slice_of(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


@given(runs())
def test_boxes_tile_the_run(run: tuple[tuple[int, ...], int, int]) -> None:
    """One after another, from its first element to its last."""
    shape, start, stop = run
    at = start
    for box in slices_of_range(shape, start, stop):
        assert box.start == at
        assert box.stop - box.start == torch.Size(box.sizes).numel() > 0
        at = box.stop
    assert at == stop


@given(runs())
def test_a_box_is_a_slice_of_the_tensor(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    for box in slices_of_range(shape, start, stop):
        assert torch.equal(
            slice_of(tensor, box.offsets, box.sizes), tensor.flatten()[box.start : box.stop].view(box.sizes)
        )


@given(runs())
def test_boxes_are_few(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    assert len(list(slices_of_range(shape, start, stop))) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize(
    ("shape", "run", "expected"),
    [
        ((3, 4), (0, 12), [((0, 0), (3, 4))]),
        ((3, 4), (4, 8), [((1, 0), (1, 4))]),
        ((3, 4), (5, 7), [((1, 1), (1, 2))]),
        ((3, 4), (3, 9), [((0, 3), (1, 1)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]),
        ((3, 4), (3, 5), [((0, 3), (1, 1)), ((1, 0), (1, 1))]),
        (
            (2, 2, 2),
            (1, 7),
            [((0, 0, 1), (1, 1, 1)), ((0, 1, 0), (1, 1, 2)), ((1, 0, 0), (1, 1, 2)), ((1, 1, 0), (1, 1, 1))],
        ),
        ((7,), (2, 5), [((2,), (3,))]),
        ((), (0, 1), [((), ())]),
        ((3, 4), (5, 5), []),
        ((3, 0), (0, 0), []),
    ],
    ids=str,
)
def test_by_hand(shape: tuple[int, ...], run: tuple[int, int], expected: list[tuple[tuple[int, ...], ...]]) -> None:
    assert [(box.offsets, box.sizes) for box in slices_of_range(shape, *run)] == expected
