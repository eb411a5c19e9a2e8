"""Convert texts into tokenized files.

``X.bin`` contains one JSON line per sample; ``X.bin.meta`` contains a NumPy array [samples, 2] of byte offset and token
count.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np

from internlm.data.read_ahead import in_order
from internlm.data.text_encoder import Chunk, Recipe, Sample, encode_chunk
from internlm.utils.errors import DataError, Problem, UserError
from internlm.utils.logger import get_logger

# Characters sent to a worker at once: enough to outweigh the cost of pickling, and little beside a worker's memory.
CHUNK_CHARACTERS = 1 << 18
CHUNKS_AHEAD = 4  # per worker

#: Index of an output file, and samples for it.
_Work: TypeAlias = tuple[int, list[Sample]]


class Summary(NamedTuple):
    """Totals of a ``.bin`` file that was written."""

    samples: int
    tokens: int  # including prompt_tokens
    prompt_tokens: int  # tokens that are inputs only
    text_bytes: int  # bytes of the texts in UTF-8


def tokenize_samples(
    samples: Iterable[Sample],
    outputs: Sequence[Path],
    recipe: Recipe,
    workers: int,
    *,
    second_share: float = 0,
    progress: bool = False,
) -> list[Summary]:
    """Tokenize samples in order, and write them to one or two ``.bin`` files, each with its ``.meta``.

    All files are complete, or none exists. Their content does not depend on ``workers``.

    Args:
        samples: Prompt and text of each sample.
        outputs: Path of the ``.bin`` file, or of two.
        recipe: Tokenizer and special tokens.
        workers: Number of worker processes; with 1 the calling process tokenizes.
        second_share: Share of the samples in the second file, at equal distances: 0.1 is every tenth.
        progress: Show a progress bar if stderr is a terminal.

    Returns:
        The totals of each file.

    Raises:
        DataError: A file would have no sample, or an output lacks the suffix ``.bin`` or cannot be written.
        UserError: A worker process died.
    """
    for output in outputs:
        if output.suffix != ".bin":
            message = f"expected suffix '.bin', got {output.suffix!r}"
            raise DataError(Problem(str(output), message, f"Rename the output to {output.name}.bin"))
    with ExitStack() as stack:
        files = [stack.enter_context(_open_output(output)) for output in outputs]
        warned = _warn_of_line_ends(samples, recipe)
        for index, chunk in _show(_encode_all(_chunks(warned, second_share), recipe, workers), progress):
            files[index].append(chunk)
        # Before the first file is published, which happens when the stack unwinds.
        if not any(file.counts for file in files):
            todo = "Pass at least one file that is not blank"
            raise DataError(Problem("--text_input_path", "contains no text to tokenize", todo))
        if empty := next((output for output, file in zip(outputs, files, strict=True) if not file.counts), None):
            message = f"{second_share} of {sum(len(file.counts) for file in files)} samples leaves {empty} without any"
            raise DataError(Problem("--split-ratio", message, "Pass more samples, or another ratio"))
        return [file.summary() for file in files]


def _warn_of_line_ends(samples: Iterable[Sample], recipe: Recipe) -> Iterator[Sample]:
    """Yield ``samples``; warn at the first one with a line end that the tokenizer does not encode."""
    remaining = iter(samples)
    if recipe.loses_line_ends:
        for prompt, text in remaining:
            yield prompt, text
            if "\n" in prompt or "\n" in text:
                message = "drops line ends: it encodes them as spaces, or not at all"
                todo = "Use a tokenizer that keeps them, such as one trained without a normalization rule"
                get_logger().warning(str(Problem(recipe.tokenizer_path, message, todo)))
                break
    yield from remaining


def _encode_all(work: Iterator[_Work], recipe: Recipe, workers: int) -> Iterator[tuple[int, Chunk]]:
    encode: Callable[[_Work], tuple[int, Chunk]] = functools.partial(_encode, recipe)
    first = list(islice(work, 2))
    if workers <= 1 or len(first) < 2:  # no processes for a single chunk
        yield from map(encode, chain(first, work))
        return
    # Processes, because most tokenizers hold the GIL; spawned, because a fork copies locks that threads hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield from in_order(pool, encode, chain(first, work), ahead=CHUNKS_AHEAD * workers)
        except BrokenProcessPool as error:
            message = "a worker process died, possibly for lack of memory"
            raise UserError(Problem("--num_workers", message, f"Pass fewer than {workers}")) from error


def _end_with_parent() -> None:
    """Start a thread that ends this worker when its parent has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode(recipe: Recipe, work: _Work) -> tuple[int, Chunk]:
    index, samples = work
    return index, encode_chunk(recipe, samples)


def _chunks(samples: Iterable[Sample], second_share: float) -> Iterator[_Work]:
    """Distribute samples to the output files, and group them."""
    chunks: tuple[list[Sample], list[Sample]] = ([], [])
    characters = [0, 0]
    for number, sample in enumerate(samples):
        # The sum over all samples telescopes: the share is exact to one sample, without knowing their number.
        index = math.floor((number + 1) * second_share) - math.floor(number * second_share)
        chunks[index].append(sample)
        characters[index] += len(sample[0]) + len(sample[1])
        if characters[index] >= CHUNK_CHARACTERS:
            yield index, chunks[index].copy()
            chunks[index].clear()
            characters[index] = 0
    yield from ((index, chunk) for index, chunk in enumerate(chunks) if chunk)


def _show(chunks: Iterator[tuple[int, Chunk]], progress: bool) -> Iterator[tuple[int, Chunk]]:
    if not progress:
        yield from chunks
        return
    from tqdm import tqdm  # imported here, because only a terminal needs it

    with tqdm(unit=" samples", disable=None) as bar:  # None: disabled unless on a terminal
        for index, chunk in chunks:
            yield index, chunk
            bar.update(len(chunk.counts))


class _Output:
    """A ``.bin`` file that is being written, and what its ``.meta`` will contain."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sizes, self.counts = array("q"), array("q")
        self._text_bytes = self._prompt_tokens = 0

    def append(self, chunk: Chunk) -> None:
        self._stream.write(chunk.lines)
        self.sizes.extend(chunk.sizes)
        self.counts.extend(chunk.counts)
        self._text_bytes += chunk.text_bytes
        self._prompt_tokens += chunk.prompt_tokens

    def summary(self) -> Summary:
        return Summary(len(self.counts), sum(self.counts), self._prompt_tokens, self._text_bytes)


@contextmanager
def _open_output(output: Path) -> Iterator[_Output]:
    """Yield an output to append to; when the ``with`` block succeeds, write its ``.meta`` and publish both files."""
    with _both_or_none(output) as (bin_file, meta_file):
        with bin_file.open("xb") as stream:
            file = _Output(stream)
            yield file
            _to_disk(stream)
        with meta_file.open("xb") as stream:
            np.save(stream, np.stack([np.cumsum(file.sizes) - file.sizes, file.counts], axis=1))
            _to_disk(stream)


@contextmanager
def _both_or_none(output: Path) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths for ``output`` and its ``.meta``; rename both files when the ``with`` block succeeds."""
    finals = output.with_name(output.name + ".meta"), output
    meta_partial, bin_partial = partials = [path.with_name(f"{path.name}.{os.getpid()}.partial") for path in finals]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield bin_partial, meta_partial
        # The order matters: between the renames a reader finds a .meta without its .bin, never an old .bin with a new
        # .meta, which it might accept as a pair.
        output.unlink(missing_ok=True)
        for partial, final in zip(partials, finals, strict=True):
            os.replace(partial, final)
    except OSError as error:
        todo = "Choose a writable folder with free space"
        raise DataError(Problem(str(output), f"cannot be written ({error.strerror})", todo)) from error
    finally:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()


def _to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
