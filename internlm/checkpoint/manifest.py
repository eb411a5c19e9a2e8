"""Manifest of a checkpoint, which lists its files and tensors with a checksum of every piece.

Publishing the manifest commits the checkpoint. A *piece* is a box of a tensor, stored as consecutive raw bytes
(row-major, little-endian) of one file. The manifest is JSON whose first line holds the checksum of the rest:

.. code-block:: text

    {"checksum": "b7a41c…",
    "format": 2, "step": 40, "checkpoint": "step-40", "attempt": "5f2e…",
    "files": {"state.json": {"size": 2311, "checksum": "…"}, "rank-00000.bin": {"size": 12288}},
    "tensors": {"model/norm.weight": {"dtype": "float32", "shape": [64], "pieces": [
      ["rank-00000.bin", 0, [0], [64], "09d3…"]]}}}

All checksums are XXH3-128 in hexadecimal digits. A manifest is not trusted: parsing checks that every file has a plain
name, that pieces cover every byte of their file once, and that they cover every element of their tensor once.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, NamedTuple, TypeVar

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: Version of the format; increased when older versions of the framework can no longer read it.
FORMAT = 2
#: Size limit of a manifest, in bytes: enough for about a million pieces.
LARGEST_MANIFEST = 1 << 27
#: Size limit of a piece, in bytes. Writers use far smaller ones; a reader holds one in memory.
LARGEST_PIECE = 1 << 26
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_PRIME = (1 << 127) - 1
_FIRST_LINE = re.compile(rb'\{"checksum": "([0-9a-f]{32})",\n')
_FILE_NAME = r"^([0-9a-z]+/)?[A-Za-z0-9][A-Za-z0-9._-]*$"

FileName = Annotated[str, Field(pattern=_FILE_NAME, max_length=255)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Counts = Annotated[tuple[Count, ...], Field(max_length=32)]


def checksum(data: bytes | memoryview) -> str:
    """Return the XXH3-128 checksum of ``data`` in hexadecimal digits."""
    return xxhash.xxh3_128(data).hexdigest()


class Piece(NamedTuple):
    """Box of a tensor, and where its bytes are."""

    file: FileName
    position: Count
    offsets: Counts
    sizes: Counts
    checksum: Checksum


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Strict):
    """Size of a file; the checksum of the whole file if it has no pieces."""

    size: Count
    checksum: Checksum | None = None


class TensorRecord(_Strict):
    """Dtype, global shape and pieces of a tensor."""

    dtype: str
    shape: Counts
    pieces: tuple[Piece, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of torch."""
        return DTYPES[self.dtype]

    def piece_bytes(self, piece: Piece) -> int:
        """Return the size of ``piece`` in bytes."""
        return math.prod(piece.sizes) * self.torch_dtype.itemsize


class Outline(_Strict):
    """Content of the manifest apart from the tensors, for which a large manifest need not be parsed as a whole."""

    model_config = ConfigDict(extra="ignore")

    format: Count
    step: Count
    checkpoint: str
    """Name under which the checkpoint was published; a folder that was renamed by hand is refused."""
    attempt: Annotated[str, Field(pattern=r"^[0-9a-z]{1,32}$")]
    files: dict[FileName, FileRecord]


class Manifest(Outline):
    """Content of the manifest."""

    model_config = ConfigDict(extra="forbid")

    tensors: dict[str, TensorRecord]

    def to_bytes(self) -> bytes:
        """Format the manifest as JSON, with its checksum in the first line."""
        rest = json.dumps(self.model_dump(mode="json", exclude_none=True), separators=(",", ":")).encode()[1:]
        return f'{{"checksum": "{checksum(rest)}",\n'.encode() + rest


def parse_manifest(content: bytes, checkpoint: str | None) -> Manifest:
    """Parse and check the manifest of the checkpoint with the name ``checkpoint``; None: any name.

    Raises:
        ValueError: The manifest is damaged, contradicts itself, or belongs to another checkpoint.
        NewerFormatError: A newer version of the framework wrote it.
    """
    manifest = _parse(Manifest, content, checkpoint)
    for problem in contradictions(manifest):
        raise ValueError(problem)
    return manifest


def parse_outline(content: bytes, checkpoint: str | None) -> Outline:
    """Parse the manifest of the checkpoint with the name ``checkpoint``, without its tensors; None: any name.

    Raises:
        ValueError: The manifest is damaged, or belongs to another checkpoint.
        NewerFormatError: A newer version of the framework wrote it.
    """
    return _parse(Outline, content, checkpoint)


_AnyOutline = TypeVar("_AnyOutline", bound=Outline)


def _parse(model: type[_AnyOutline], content: bytes, checkpoint: str | None) -> _AnyOutline:
    first = _FIRST_LINE.match(content)
    if not first:
        raise ValueError("expected a first line with a checksum")
    rest = content[first.end() :]
    if checksum(rest) != first[1].decode():
        raise ValueError(f"expected the checksum {first[1].decode()}, got {checksum(rest)}")
    _check_format(rest)
    try:
        manifest = model.model_validate_json(b"{" + rest)
    except ValidationError as error:
        first_error = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first_error["loc"]))
        raise ValueError(f"{where}: {first_error['msg']}") from None
    if checkpoint not in (None, manifest.checkpoint):
        raise ValueError(f"is the manifest of {manifest.checkpoint}, not of {checkpoint}")
    return manifest


def step_of(beginning: bytes) -> int | None:
    """Return the step of the manifest that starts with ``beginning``, unverified; None if there is no manifest."""
    found = re.match(_FIRST_LINE.pattern + rb'"format":\d+,"step":(\d{1,18}),', beginning)
    return int(found[2]) if found else None


class NewerFormatError(ValueError):
    """Error for a checkpoint that a newer version of the framework wrote."""


def _check_format(rest: bytes) -> None:
    # Other formats may have other keys, so this one is read on its own.
    found = re.match(rb'"format": ?(\d{1,9}),', rest)
    if not found:
        raise ValueError("expected the format version in the second line")
    if int(found[1]) > FORMAT:
        raise NewerFormatError(f"expected a format version of at most {FORMAT}, got {int(found[1])}")


# -- consistency ------------------------------------------------------------------------------------------------------


def contradictions(manifest: Manifest) -> Iterator[str]:
    """Yield what is inconsistent: unknown dtypes, pieces outside of their tensor or file, gaps and overlaps."""
    used: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.files}
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in DTYPES:
            yield f"{name}: unknown dtype {tensor.dtype!r}"
            continue
        for piece in tensor.pieces:
            size = tensor.piece_bytes(piece)
            if piece.file not in used:
                yield f"{name}: a piece lies in {piece.file}, which is not listed"
            elif size > LARGEST_PIECE:
                yield f"{name}: a piece has {size} bytes, at most {LARGEST_PIECE} are allowed"
            else:
                used[piece.file].append((piece.position, size))
        if problem := uncovered(tensor.shape, [(piece.offsets, piece.sizes) for piece in tensor.pieces]):
            yield f"{name}: {problem}"
    for name, ranges in used.items():
        if manifest.files[name].checksum is None and (problem := _gap(ranges, manifest.files[name].size)):
            yield f"{name}: {problem}"


def _gap(ranges: Iterable[tuple[int, int]], size: int) -> str:
    """Return where consecutive ``ranges`` (position, size) do not cover a file once, or an empty string."""
    end = 0
    for position, length in sorted(ranges):
        if position != end:
            return f"bytes {min(position, end)} to {max(position, end)} have {'no' if position > end else 'two'} pieces"
        end += length
    return "" if end == size else f"pieces end at byte {end}, but the file has {size} bytes"


Box = tuple[Sequence[int], Sequence[int]]


def uncovered(shape: Sequence[int], boxes: Sequence[Box]) -> str:
    """Return why ``boxes`` (offsets, sizes) do not cover a tensor of ``shape`` once, or an empty string."""
    if len(boxes) == 1 and tuple(boxes[0][1]) == tuple(shape) and not any(boxes[0][0]):
        return ""  # as most tensors are
    for offsets, sizes in boxes:
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= limit for offset, size, limit in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            return f"a piece of sizes {list(sizes)} at {list(offsets)} is outside of the shape {list(shape)}"
    total, elements = sum(math.prod(sizes) for _, sizes in boxes), math.prod(shape)
    if total != elements:
        return f"pieces have {total} elements, expected {elements}"
    return "" if _covers_once(boxes, shape) else "some pieces overlap, and others leave a gap"


def _covers_once(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Return whether ``boxes`` within ``shape`` cover every element once, in linear time.

    An element weighs the product of a random number for each of its coordinates, modulo a prime. The weight of a box is
    then a product of differences of prefix sums, which are drawn where a box begins or ends. If some element is in no
    box or in several, the boxes weigh as much as the tensor with a probability of at most dimensions / prime
    (Schwartz-Zippel lemma; Schwartz, J. ACM 27(4), 1980).
    """
    draw = random.Random()  # seeded by the system, so that nobody can make a file for its numbers
    prefix_sums = [defaultdict[int, int](lambda: draw.randrange(_PRIME)) for _ in shape]

    def weight(offsets: Sequence[int], sizes: Sequence[int]) -> int:
        product = 1
        for sums, offset, size in zip(prefix_sums, offsets, sizes, strict=True):
            product = product * (sums[offset + size] - sums[offset]) % _PRIME
        return product

    return sum(weight(*box) for box in boxes) % _PRIME == weight([0] * len(shape), shape)
