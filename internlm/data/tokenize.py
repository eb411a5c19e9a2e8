"""Texts to tokenized files.

``X.bin`` holds one JSON line per sample, ``X.bin.meta`` a NumPy array [samples, 2] of byte offset and token count.
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

CHUNK_CHARACTERS = 1 << 18  # texts that go to a worker at once
CHUNKS_AHEAD = 4  # per worker


class Recipe(NamedTuple):
    """How a text becomes token ids."""

    tokenizer_path: str
    before: tuple[int, ...]  # ids put before each sample
    after: tuple[int, ...]  # ids put after each sample


class Chunk(NamedTuple):
    """Some samples, tokenized."""

    lines: bytes  # of the .bin file
    sizes: list[int]  # bytes of each line
    counts: list[int]  # tokens of each


class Summary(NamedTuple):
    """What was written."""

    samples: int
    tokens: int


def make_recipe(tokenizer_path: str, bos: bool | None = False, eos: bool | None = None) -> Recipe:
    """How to tokenize: with bos before and eos after each sample where True; where None, if the tokenizer has it.

    Raises :class:`DataError` where the tokenizer can't be read or lacks a token that was asked for.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    before = _special(tokenizer_path, "bos", bos, tokenizer.bos_id)
    return Recipe(tokenizer_path, before, _special(tokenizer_path, "eos", eos, tokenizer.eos_id))


def _special(path: str, name: str, wanted: bool | None, token_id: int | None) -> tuple[int, ...]:
    if wanted and token_id is None:
        raise DataError(Problem(path, f"has no {name} token", f"Leave out --{name}."))
    return () if wanted is False or token_id is None else (token_id,)


def tokenize_texts(texts: Iterable[str], output: Path, recipe: Recipe, workers: int, progress: bool = False) -> Summary:
    """Write the samples to ``output`` (a ``.bin`` file) and its ``.meta``, in order, by that many processes.

    Both files appear at the end, and whole; the number of processes doesn't change them. ``progress`` shows a bar
    where stderr is a terminal. Raises :class:`DataError` where there is nothing to write, or the place can't be
    written to.
    """
    if output.suffix != ".bin":
        raise DataError(Problem(str(output), "isn't the name of a .bin file", f"Call it {output.name}.bin."))
    sizes, counts = array("q"), array("q")
    with _both_or_none(output) as (bin_file, meta_file):
        with bin_file.open("xb") as stream:
            for chunk in _show(_encode_all(texts, recipe, workers), progress):
                stream.write(chunk.lines)
                sizes.extend(chunk.sizes)
                counts.extend(chunk.counts)
            _to_disk(stream)
        if not counts:
            raise DataError(Problem(str(output), "the input holds no text, so nothing was tokenized"))
        with meta_file.open("xb") as stream:
            np.save(stream, np.stack([np.cumsum(sizes) - sizes, counts], axis=1))
            _to_disk(stream)
    return Summary(len(counts), sum(counts))


def _encode_all(texts: Iterable[str], recipe: Recipe, workers: int) -> Iterator[Chunk]:
    work: Callable[[list[str]], Chunk] = functools.partial(encode_chunk, recipe)
    if workers <= 1:
        yield from map(work, _chunks(texts))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from in_order(pool, work, _chunks(texts), ahead=CHUNKS_AHEAD * workers)


def encode_chunk(recipe: Recipe, texts: list[str]) -> Chunk:
    """Tokenize some texts."""
    encode = _tokenizer(recipe.tokenizer_path).encode
    samples = [[*recipe.before, *encode(text), *recipe.after] for text in texts]
    lines = [json.dumps({"tokens": tokens}, separators=(",", ":")).encode() + b"\n" for tokens in samples]
    return Chunk(b"".join(lines), list(map(len, lines)), list(map(len, samples)))


@functools.cache
def _tokenizer(path: str) -> Tokenizer:
    """Loaded once in each process."""
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
    from tqdm import tqdm

    with tqdm(unit=" samples", disable=None) as bar:  # None: shown on a terminal alone
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk.counts))


@contextmanager
def _both_or_none(output: Path) -> Iterator[tuple[Path, Path]]:
    """Temporary names for ``output`` and its ``.meta``, which take their places when the block succeeds."""
    finals = output.with_name(output.name + ".meta"), output
    meta_part, bin_part = partials = [path.with_name(f"{path.name}.{os.getpid()}.partial") for path in finals]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield bin_part, meta_part
        output.unlink(missing_ok=True)  # an old .bin is never seen beside a new .meta
        for partial, final in zip(partials, finals, strict=True):
            os.replace(partial, final)
    except OSError as error:
        todo = "Choose a place that is writable and has room."
        raise DataError(Problem(str(output), f"can't be written ({error.strerror})", todo)) from error
    finally:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()


def _to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
