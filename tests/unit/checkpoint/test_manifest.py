"""Manifests: what they list, and which are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.checkpoint.manifest import (
    FileRecord,
    Manifest,
    NewerFormatError,
    Piece,
    TensorRecord,
    checksum,
    parse_manifest,
    parse_outline,
    step_of,
    uncovered,
)
from internlm.core.parallel.placement import slices_of_range

SUM = "0" * 32
FILE = "rank-00000.bin"


def manifest() -> Manifest:
    """Of a tensor of 3 × 4 bfloat16 in two pieces, and a scalar."""
    return Manifest(
        format=2,
        step=40,
        checkpoint="step-40",
        attempt="a1",
        files={"state.json": FileRecord(size=3, checksum=SUM), FILE: FileRecord(size=28)},
        tensors={
            "model/w": TensorRecord(
                dtype="bfloat16",
                shape=(3, 4),
                pieces=(Piece(FILE, 0, (0, 0), (1, 4), SUM), Piece(FILE, 8, (1, 0), (2, 4), SUM)),
            ),
            "model/scale": TensorRecord(dtype="float32", shape=(), pieces=(Piece(FILE, 24, (), (), SUM),)),
        },
    )


def test_a_manifest_is_read_as_it_was_written() -> None:
    content = manifest().to_bytes()
    assert parse_manifest(content, "step-40") == parse_manifest(content, None) == manifest()
    assert parse_outline(content, "step-40").files == manifest().files
    assert json.loads(content)["step"] == step_of(content[:256]) == 40


def test_every_flipped_bit_is_found() -> None:
    content = manifest().to_bytes()
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            with pytest.raises(ValueError, match=r"expected"):
                parse_manifest(bytes(flipped), "step-40")


@pytest.mark.parametrize("length", [0, 1, 30, 49, 300])
def test_a_manifest_that_was_cut_off(length: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_manifest(manifest().to_bytes()[:length], "step-40")


def test_the_manifest_of_another_checkpoint() -> None:
    with pytest.raises(ValueError, match="is the manifest of step-40, not of step-20"):
        parse_manifest(manifest().to_bytes(), "step-20")


def signed(content: dict[str, Any]) -> bytes:
    """The manifest with ``content``, and a valid checksum."""
    rest = json.dumps(content, separators=(",", ":")).encode()[1:]
    return f'{{"checksum": "{checksum(rest)}",\n'.encode() + rest


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(manifest().to_bytes())
    del content["checksum"]
    change(content)
    return signed(content)


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Set a value at a path such as ``tensors/w/shape``, with ``:`` for the slashes of names."""

    def change(content: Any) -> None:
        *outer, last = [int(key) if key.isdigit() else key.replace(":", "/") for key in path.split("/")]
        for key in outer:
            content = content[key]
        content[last] = value

    return change


PIECES = "tensors/model:w/pieces"
CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a file outside": (put(f"{PIECES}/0/0", "../secret"), "String should match pattern"),
    "an absolute file": (put("files", {"/etc/passwd": {"size": 28}}), "String should match pattern"),
    "a file that is not listed": (put(f"{PIECES}/0/0", "rank-00007.bin"), "lies in rank-00007.bin, which is not"),
    "a file that is not used": (put("files/rank-00001.bin", {"size": 4}), "pieces end at byte 0, but the file has 4"),
    "a hole in a file": (put(f"{PIECES}/1/1", 9), "bytes 8 to 9 have no pieces"),
    "an overlap in a file": (put(f"{PIECES}/1/1", 7), "bytes 7 to 8 have two pieces"),
    "bytes after the last piece": (put(f"files/{FILE}/size", 30), "pieces end at byte 28, but the file has 30"),
    "a missing piece": (lambda c: c["tensors"]["model/w"]["pieces"].pop(), "pieces have 4 elements, expected 12"),
    "a piece that covers another": (put(f"{PIECES}/1/2", [0, 0]), "some pieces overlap, and others leave a gap"),
    "a piece outside of its tensor": (put(f"{PIECES}/1/2", [2, 0]), "is outside of the shape"),
    "a piece of other dimensions": (put(f"{PIECES}/1/2", [1]), "is outside of the shape"),
    "an unknown dtype": (put("tensors/model:w/dtype", "float7"), "unknown dtype 'float7'"),
    "an absurd shape": (put("tensors/model:w/shape", [1 << 61, 1 << 61]), "expected"),
    "an absurd piece": (
        lambda c: c["tensors"].update(
            {"x": {"dtype": "int8", "shape": [1 << 40], "pieces": [[FILE, 28, [0], [1 << 40], SUM]]}}
        ),
        "a piece has 1099511627776 bytes, at most",
    ),
    "a negative size": (put(f"files/{FILE}/size", -1), "greater than or equal to 0"),
    "a number as text": (put("step", "40"), "valid integer"),
    "a missing key": (lambda c: c.pop("tensors"), "tensors: Field required"),
    "an unknown key": (put("more", 1), "more: Extra inputs"),
    "no checksum": (put(f"{PIECES}/0/4", ""), "String should match pattern"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(name: str) -> None:
    change, expected = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=expected):
        parse_manifest(edited(change), None)


def test_a_newer_format_is_told_whatever_its_keys() -> None:
    with pytest.raises(NewerFormatError, match="expected a format version of at most 2, got 3"):
        parse_manifest(signed({"format": 3, "all": "new"}), "step-40")


# -- coverage

SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(SHAPES, st.lists(st.integers(0, 125), max_size=4))
def test_pieces_of_flat_ranges_cover_their_tensor(shape: list[int], cuts: list[int]) -> None:
    elements = math.prod(shape)
    bounds = sorted({0, elements, *(cut for cut in cuts if cut < elements)})
    boxes = [
        (box.offsets, box.sizes) for start, stop in pairwise(bounds) for box in slices_of_range(shape, start, stop)
    ]
    assert uncovered(shape, boxes) == ""
    if boxes:
        assert uncovered(shape, boxes[1:])
        assert uncovered(shape, [*boxes[1:], boxes[-1]]) or len(boxes) == 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_what_is_called_covered_is_covered(shape: list[int], data: st.DataObject) -> None:
    """Compared with counting element by element."""
    box = st.tuples(*(st.tuples(st.integers(0, size - 1), st.integers(1, size)) for size in shape))
    chosen = data.draw(st.lists(box, max_size=4))
    boxes = [
        (
            [offset for offset, _ in dims],
            [min(size, limit - offset) for (offset, size), limit in zip(dims, shape, strict=True)],
        )
        for dims in chosen
    ]
    counts: dict[tuple[int, ...], int] = {}
    for offsets, sizes in boxes:
        for index in range(math.prod(sizes)):
            element, rest = [], index
            for offset, size in zip(reversed(offsets), reversed(sizes), strict=True):
                element.append(offset + rest % size)
                rest //= size
            counts[tuple(element)] = counts.get(tuple(element), 0) + 1
    once = len(counts) == math.prod(shape) and set(counts.values()) <= {1}
    assert (uncovered(shape, boxes) == "") == once


def test_many_pieces_are_checked_in_time() -> None:
    """Also if each begins and ends at rows of its own; the time of comparing neighbours would be quadratic."""
    size = 20_000
    boxes = [
        box
        for column in range(size)
        for box in (([0, column], [column + 1, 1]), ([column + 1, column], [size - column - 1, 1]))
    ]
    assert uncovered((size, size), boxes) == ""
    boxes[2] = ([0, 0], [2, 1])
    assert uncovered((size, size), boxes) == "some pieces overlap, and others leave a gap"
