"""A range of a flattened tensor as slices of the tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm.core.parallel.placement import slices_of_range

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape, and a range of its elements."""
    shape = draw(SHAPES)
    numel = torch.Size(shape).numel()
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


def slice_of(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


@given(ranges())
def test_slices_tile_the_range(elements: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = elements
    at = start
    for piece in slices_of_range(shape, start, stop):
        assert piece.start == at
        assert piece.stop - piece.start == torch.Size(piece.sizes).numel() > 0
        at = piece.stop
    assert at == stop


@given(ranges())
def test_a_slice_has_the_elements_of_its_range(elements: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = elements
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    for piece in slices_of_range(shape, start, stop):
        assert torch.equal(
            slice_of(tensor, piece.offsets, piece.sizes), tensor.flatten()[piece.start : piece.stop].view(piece.sizes)
        )


@given(ranges())
def test_slices_are_few(elements: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = elements
    assert len(list(slices_of_range(shape, start, stop))) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize(
    ("shape", "elements", "expected"),
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
def test_by_hand(
    shape: tuple[int, ...], elements: tuple[int, int], expected: list[tuple[tuple[int, ...], ...]]
) -> None:
    assert [(piece.offsets, piece.sizes) for piece in slices_of_range(shape, *elements)] == expected
