"""Conversion of a folder of token files to another format, file by file and in parallel processes.

Every file that is written is read again and compared with its source, before it gets its name.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from internlm.data.binary_tokens import BinaryTokens, write_tokens
from internlm.data.json_lines import JsonLines
from internlm.data.megatron_files import MegatronTokens
from internlm.data.sources import input_ids
from internlm.data.token_files import DataFile, OpenFile, SampleError, Span, Stamp, TokenFormat, find_files
from internlm.utils.errors import DataError, Problem

#: Formats by name. Megatron-LM's files are read, and not written.
FORMATS: dict[str, TokenFormat] = {form.name: form for form in (BinaryTokens(), JsonLines(), MegatronTokens())}


class Converted(NamedTuple):
    """One file that was converted."""

    name: str  # relative to the folder that was written
    samples: int
    tokens: int
    bytes_before: int
    bytes_after: int


def convert_folder(
    source: Path, target: Path, to: Literal["binary", "json"], reads: Sequence[str], workers: int
) -> Iterator[Converted]:
    """Convert all files below ``source`` that have one of the formats ``reads``, and yield each when it is complete.

    Each file appears below ``target`` only when it is complete, under its name with another suffix.

    Args:
        source: Folder of token files, or the path of a file without its suffix.
        target: Folder to write, which may exist, but not the files.
        to: Format to write.
        reads: Formats to read, keys of :data:`FORMATS`.
        workers: Number of processes.

    Raises:
        DataError: A file is damaged, exists already, or cannot be written.
    """
    files = find_files(source, [FORMATS[name] for name in reads])
    outputs = [target / f"{file.stem}{FORMATS[to].suffix}" for file in files]
    if taken := [path for path in outputs if path.exists()]:
        todo = "Choose another folder, or remove them"
        raise DataError(Problem(str(taken[0]), f"exists already, with {len(taken) - 1} more", todo))
    work = partial(_convert, to=to)
    pairs = list(zip(files, outputs, strict=True))
    if workers <= 1 or len(files) == 1:
        yield from map(work, pairs)
        return
    # Processes, because JSON holds the GIL; spawned, because a fork copies locks that threads hold.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, pairs)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error, the files that are not begun


def _convert(pair: tuple[DataFile, Path], to: Literal["binary", "json"]) -> Converted:
    file, output = pair
    partial_name = output.with_name(f"{output.name}.{uuid.uuid4().hex}.partial")
    form = FORMATS[to]
    side = form.side(partial_name)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[to](_Samples(file), partial_name)
        written = _as_file(partial_name, form)
        samples, tokens = _compare(file, written, output)
        # The list of the samples first: a reader finds it without the file, never a file whose list is another's.
        if side is not None:
            os.replace(side, form.side(output) or output)
        os.replace(partial_name, output)
    except ValueError as error:
        message = f"cannot be written as {to} tokens ({error})"
        raise DataError(Problem(str(output), message, f"Keep {file.path} as it is")) from error
    except OSError as error:
        todo = "Choose a writable folder with free space"
        raise DataError(Problem(str(output), f"cannot be written ({error.strerror or error})", todo)) from error
    finally:
        for path in filter(None, (partial_name, side)):
            with suppress(OSError):
                path.unlink()
    return Converted(output.name, samples, tokens, file.size, written.size)


def _as_file(path: Path, form: TokenFormat) -> DataFile:
    """Return a file that was just written."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        found = os.fstat(stream.fileno())
    return DataFile(path, path.name, Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns), form, None)


class _Samples:
    """Tokens of each sample of a file, which can be iterated over several times."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self.table = file.format.samples(file)  # [3, n]

    def __iter__(self) -> Iterator[np.ndarray]:
        row = 0
        try:
            reader = self._file.format.reader(OpenFile(self._file))
            while row < self.table.shape[1]:
                offset, length, size = self.table[:, row].tolist()
                yield reader.read(Span(offset, size, length), 0, length)
                row += 1
        except SampleError as error:
            raise error.at(self._file, row, int(self.table[0, row]) if self.table.size else 0) from error

    def largest(self) -> int:
        """Return the largest id of all samples, inputs included."""
        return max((int(input_ids(tokens).max(initial=0)) for tokens in self), default=0)


def _compare(file: DataFile, written: DataFile, output: Path) -> tuple[int, int]:
    """Compare all tokens of two files; return the numbers of samples and of tokens."""
    before, after = _Samples(file), _Samples(written)
    same = before.table.shape == after.table.shape and all(map(np.array_equal, before, after))
    if not same:
        message = f"the tokens that were written differ from those of {file.path}"
        raise DataError(Problem(str(output), message, "Check the disk and its memory, then convert again"))
    return before.table.shape[1], int(before.table[1].sum())


def _write_binary(samples: _Samples, path: Path) -> None:
    write_tokens(path, samples, samples.largest())  # a pass of its own: the bytes per id come before the first id


def _write_json(samples: _Samples, path: Path) -> None:
    sizes = []
    with path.open("xb") as stream:
        for tokens in samples:
            line = json.dumps({"tokens": tokens.tolist()}, separators=(",", ":")).encode() + b"\n"
            stream.write(line)
            sizes.append(len(line))
    offsets = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
    with JsonLines().side(path).open("xb") as stream:
        np.save(stream, np.stack([offsets, samples.table[1]], axis=1))
        stream.flush()
        os.fsync(stream.fileno())


_WRITERS: dict[str, Callable[[_Samples, Path], None]] = {"binary": _write_binary, "json": _write_json}
