"""Convert texts into tokenized files.

``X.bin`` contains one JSON line per sample; ``X.bin.meta`` contains a NumPy array [samples, 2] of byte offset and token
count.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from internlm.data.loader import in_order
from internlm.data.tokenizer import Tokenizer, load_tokenizer
from internlm.utils.errors import DataError, Problem

# Characters sent to a worker at once: enough to outweigh the cost of pickling, and little beside a worker's memory.
CHUNK_CHARACTERS = 1 << 18
CHUNKS_AHEAD = 4  # per worker


class Recipe(NamedTuple):
    """Recipe for converting texts into token ids: a tokenizer, and special tokens around each sample."""

    tokenizer_path: str
    before: tuple[int, ...]  # ids put before each sample
    after: tuple[int, ...]  # ids put after each sample


class Chunk(NamedTuple):
    """Tokenized samples, encoded for the ``.bin`` and ``.meta`` files."""

    lines: bytes  # lines of the .bin file
    sizes: list[int]  # bytes of each line
    counts: list[int]  # tokens of each line


class Summary(NamedTuple):
    """Numbers of samples and of tokens written to a ``.bin`` file."""

    samples: int
    tokens: int


def make_recipe(tokenizer_path: str, bos: bool | None = False, eos: bool | None = None) -> Recipe:
    """Load a tokenizer, and select the special tokens to put around each sample.

    Args:
        tokenizer_path: Path that :func:`~internlm.data.tokenizer.load_tokenizer` accepts.
        bos: Put the bos token before each sample; None: only if the tokenizer has one.
        eos: Put the eos token after each sample; None: only if the tokenizer has one.

    Raises:
        DataError: The tokenizer cannot be read, or lacks a requested token.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    before = _special(tokenizer_path, "bos", bos, tokenizer.bos_id)
    return Recipe(tokenizer_path, before, _special(tokenizer_path, "eos", eos, tokenizer.eos_id))


def _special(path: str, name: str, wanted: bool | None, token_id: int | None) -> tuple[int, ...]:
    if wanted and token_id is None:
        raise DataError(Problem(path, f"tokenizer has no {name} token", f"Omit --{name}"))
    return () if wanted is False or token_id is None else (token_id,)


def tokenize_texts(texts: Iterable[str], output: Path, recipe: Recipe, workers: int, progress: bool = False) -> Summary:
    """Tokenize texts in order, and write them to the file ``output`` and its ``.meta``.

    Either both files are complete or neither exists. Their content does not depend on ``workers``.

    Args:
        texts: Texts, one per sample.
        output: Path of the ``.bin`` file.
        recipe: Tokenizer and special tokens.
        workers: Number of worker processes; with 1 the calling process tokenizes.
        progress: Show a progress bar if stderr is a terminal.

    Returns:
        The numbers of samples and of tokens written.

    Raises:
        DataError: There are no samples, or ``output`` lacks the suffix ``.bin`` or cannot be written.
    """
    if output.suffix != ".bin":
        message = f"expected suffix '.bin', got {output.suffix!r}"
        raise DataError(Problem(str(output), message, f"Rename the output to {output.name}.bin"))
    sizes, counts = array("q"), array("q")
    with _both_or_none(output) as (bin_file, meta_file):
        with bin_file.open("xb") as stream:
            for chunk in _show(_encode_all(texts, recipe, workers), progress):
                stream.write(chunk.lines)
                sizes.extend(chunk.sizes)
                counts.extend(chunk.counts)
            _to_disk(stream)
        if not counts:
            todo = "Pass at least one file that is not blank"
            raise DataError(Problem("--text_input_path", "contains no text to tokenize", todo))
        with meta_file.open("xb") as stream:
            np.save(stream, np.stack([np.cumsum(sizes) - sizes, counts], axis=1))
            _to_disk(stream)
    return Summary(len(counts), sum(counts))


def _encode_all(texts: Iterable[str], recipe: Recipe, workers: int) -> Iterator[Chunk]:
    work: Callable[[list[str]], Chunk] = functools.partial(encode_chunk, recipe)
    if workers <= 1:
        yield from map(work, _chunks(texts))
        return
    # Processes, because JSON and most tokenizers hold the GIL; spawned, because a fork copies locks that threads hold.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from in_order(pool, work, _chunks(texts), ahead=CHUNKS_AHEAD * workers)


def encode_chunk(recipe: Recipe, texts: list[str]) -> Chunk:
    """Tokenize a list of texts, and encode the samples for the ``.bin`` and ``.meta`` files."""
    encode = _tokenizer(recipe.tokenizer_path).encode
    samples = [[*recipe.before, *encode(text), *recipe.after] for text in texts]
    lines = [json.dumps({"tokens": tokens}, separators=(",", ":")).encode() + b"\n" for tokens in samples]
    return Chunk(b"".join(lines), list(map(len, lines)), list(map(len, samples)))


@functools.cache
def _tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer once per process, instead of pickling it with every chunk."""
    return load_tokenizer(path)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _show(chunks: Iterator[Chunk], progress: bool) -> Iterator[Chunk]:
    if not progress:
        yield from chunks
        return
    from tqdm import tqdm  # imported here, because only a terminal needs it

    with tqdm(unit=" samples", disable=None) as bar:  # None: disabled unless on a terminal
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk.counts))


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
