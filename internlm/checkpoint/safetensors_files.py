"""Reader and writer of safetensors files, which hold tensors as raw bytes after a JSON header.

Files are read box by box, and written tensor by tensor, so memory is that of one box or tensor. Files that are read are
not trusted: the header is bounded, and its tensors must cover the rest of the file exactly once. They are read rather
than mapped into memory: a file that is cut short while it is read is an error, not a signal that ends the process.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.folder_checks import reason_of, todo_at
from internlm.checkpoint.folder_files import FolderFiles
from internlm.checkpoint.storage import Sink
from internlm.checkpoint.tensor_boxes import Segments, runs_of_box
from internlm.checkpoint.tensor_writer import memory_of
from internlm.utils.errors import CheckpointError, Problem

#: Names of the dtypes whose tensors can be loaded.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Size in bits of an element of further dtypes, whose tensors are only listed.
_BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16"), 16),
    **dict.fromkeys(("U32", "I32"), 32),
    **dict.fromkeys(("U64", "I64", "C64"), 64),
}
#: Limit of the header in bytes: enough for some 200 thousand tensors.
LARGEST_HEADER = 1 << 25
_MOST_AXES = 16
_LONGEST_NAME = 200
DOWNLOAD = "Download the file again, or choose another folder"


def quoted(name: str) -> str:
    """Return the name of a tensor in quotes, with escapes, and not longer than any real one."""
    return repr(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…")


@dataclass(frozen=True)
class StoredTensor:
    """Tensor of a safetensors file."""

    file: str
    """Name of its file in the folder."""
    dtype: str
    """Name of the dtype in the format, such as ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """Position of the first byte in the file."""
    segments: Segments | None = None
    """Where the tensor lies in the fused one that begins there; None: it is all of it."""


def read_header(files: FolderFiles, name: str) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Raises:
        CheckpointError: The file cannot be read, or its header is damaged or does not describe the file.
    """
    with OpenTensors(files, name) as source:
        try:
            return _parse(name, source.size, source.header())
        except (ValueError, RecursionError) as error:
            message = f"is not a whole safetensors file ({error or 'nested too deeply'})"
            raise CheckpointError(Problem(source.path, message, DOWNLOAD)) from None


class OpenTensors:
    """Safetensors file that is open for reading, in a ``with`` block.

    Args:
        files: Files of its folder.
        name: Its name there.

    Raises:
        CheckpointError: The file is missing, is no regular file, or cannot be read.
    """

    def __init__(self, files: FolderFiles, name: str) -> None:
        self._files, self._name, self.path = files, name, files.path(name)

    def __enter__(self) -> OpenTensors:
        try:
            self._source = self._files.open(self._name)
        except OSError as error:
            raise self._unreadable(error) from None
        self.size = self._source.size
        return self

    def __exit__(self, *error: object) -> None:
        self._source.close()

    def header(self) -> bytes:
        """Read the JSON header.

        Raises:
            ValueError: There is none.
        """
        length = int.from_bytes(self._read_bytes(0, 8), "little")
        # Before memory is allocated for it: the length may be any number.
        if length > min(self.size - 8, LARGEST_HEADER):
            raise ValueError(f"its header has {length} bytes by its first 8 bytes, and the file {self.size}")
        return self._read_bytes(8, length)

    def _read_bytes(self, position: int, length: int) -> bytes:
        content = bytearray(length)
        try:
            count = self._source.read_into(position, memoryview(content))
        except OSError as error:
            raise self._unreadable(error) from None
        if count < length:
            raise ValueError(f"it ends at byte {position + count}")
        return bytes(content)

    def read_box(self, stored: StoredTensor, shape: Sequence[int], offsets: Sequence[int], target: Tensor) -> None:
        """Read a box of a tensor, and convert it to the dtype of ``target``.

        Args:
            stored: Tensor of this file, with a dtype of :data:`DTYPES`.
            shape: Shape that the tensor is viewed as.
            offsets: First index of the box, by axis of ``shape``.
            target: Memory to read into, of the sizes of the box.
        """
        dtype = DTYPES[stored.dtype]
        # Read into the target where it has the same bytes: a buffer in between would double what is held.
        is_same = target.is_contiguous() and target.dtype == dtype and target.is_cpu
        box = target if is_same else torch.empty(target.shape, dtype=dtype)
        memory, filled = memory_of(box), 0
        for first, count in runs_of_box(shape, offsets, target.shape, stored.segments):
            length = count * dtype.itemsize
            try:
                read = self._source.read_into(stored.start + first * dtype.itemsize, memory[filled : filled + length])
            except OSError as error:
                raise self._unreadable(error) from None
            if read < length:
                raise CheckpointError(Problem(self.path, "was cut short while it was read", DOWNLOAD))
            filled += length
        if not is_same:
            target.copy_(box)

    def _unreadable(self, error: OSError) -> CheckpointError:
        todo = todo_at(self.path, error.errno, DOWNLOAD)
        return CheckpointError(Problem(self.path, f"cannot be read ({reason_of(error)})", todo))


def header_of(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """Return the beginning of a file whose tensors (dtype, shape) follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text


def write_tensors(sink: Sink, header: bytes, tensors: Iterable[Tensor]) -> None:
    """Write a file: its header, then contiguous tensors on the host, each of which is made when it is written."""
    sink.write(memoryview(header))
    for tensor in tensors:
        sink.write(memory_of(tensor))
        del tensor  # before the next one is made


# -- header -----------------------------------------------------------------------------------------------------------


def _parse(file: str, size: int, header: bytes) -> dict[str, StoredTensor]:
    content = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object as header, got {reprlib.repr(content)}")
    start = 8 + len(header)
    tensors, ranges = {}, []
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = _checked(entry)
        except ValueError as error:
            raise ValueError(f"{quoted(name)}: {error}") from None
        tensors[name] = StoredTensor(file, dtype, shape, start + first)
        ranges.append((first, last, name))
    # Exactly once: bytes that no tensor has could be anything, and those of two tensors are a trick.
    end = 0
    for first, last, name in sorted(ranges):
        if first != end:
            found = "overlaps another tensor" if first < end else f"does not begin at byte {end}, where the last ends"
            raise ValueError(f"{quoted(name)} {found}")
        end = last
    if start + end != size:
        raise ValueError(f"expected {start + end} bytes by its header, got {size}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers differ in which of two entries they take, so that a folder could be two models.
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{quoted(twice)} occurs twice")
    return content


def _checked(entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Check the dtype, the shape and the range of bytes of a tensor, and return them."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {reprlib.repr(entry)}")
    dtype, shape, offsets = entry.get("dtype"), _counts(entry, "shape"), _counts(entry, "data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"unknown dtype {reprlib.repr(dtype)}")
    if len(shape) > _MOST_AXES or len(offsets) != 2:
        raise ValueError(f"shape {reprlib.repr(shape)} with data_offsets {reprlib.repr(offsets)}")
    expected = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        raise ValueError(f"{dtype} of shape {shape} has {expected} bytes, but data_offsets are {offsets}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _counts(entry: Mapping[str, Any], key: str) -> list[int]:
    numbers = entry.get(key)
    if not (isinstance(numbers, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)):
        raise ValueError(f"{key}: expected non-negative integers, got {reprlib.repr(numbers)}")
    return numbers
