"""Documents of a shard: an endless, shuffled sequence of tokenized documents that can be read from any place of it.

The units of all files are shuffled by (seed, epoch) and dealt to the shards, so that in an epoch every unit belongs to
one shard. The documents of a shard's units are shuffled in *blocks* of consecutive documents. The order of a block is a
keyed permutation. So a place in the sequence is a few numbers, reading on from there means to read one block again, and
there is no shuffle buffer whose content has to be saved.

A shard begins its next epoch when it has read its units. Shards have different amounts of text, so they do not begin an
epoch at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from internlm.data.permutation import KeyedPermutation, Purpose
from internlm.data.read_ahead import in_order
from internlm.data.text_encoder import Recipe
from internlm.data.text_reader import Document, TextReader
from internlm.data.text_rows import START
from internlm.data.text_units import Unit, divide
from internlm.data.tokenizer import Tokenizer
from internlm.utils.errors import DataError, Problem
from internlm.utils.logger import get_logger

#: Characters after which a block ends, so that long documents do not fill the memory.
BLOCK_CHARACTERS = 1 << 24
#: Characters that are tokenized at once: enough for the tokenizer's own loop, and little ahead of what a row needs.
CHUNK_CHARACTERS = 1 << 15
#: Chunks of a shard that are being tokenized, or are not used yet.
CHUNKS_AHEAD = 2
#: Epochs without a document after which a shard gives up, for each shard. With as few documents as one, each shard has
#: its turn in one of so many epochs.
EMPTY_EPOCHS = 64


class Place(NamedTuple):
    """Place in the documents of a shard: a block, a document of it, and the tokens of this document already used.

    The block is the one that begins at ``cursor`` of the ``unit``-th unit of the shard in ``epoch``; all are 0 or more,
    so ``cursor`` is that of the reader plus 1.
    """

    epoch: int = 0
    unit: int = 0
    cursor: int = 0
    document: int = 0
    used: int = 0


class TokenizedDocument(NamedTuple):
    """Tokens of a document, its dataset type, its place in the sequence, and its unit and text in the file."""

    tokens: np.ndarray  # int32
    type_id: int
    place: Place  # with used = 0
    unit: Unit
    source: Document


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings that determine the documents of each shard, besides the files."""

    seed: int
    shards: int
    shuffle_buffer: int  # documents that are shuffled together, over all shards
    recipe: Recipe  # tokenizer, and special tokens around each document
    min_length: int  # tokens; shorter documents are left out

    @property
    def block(self) -> int:
        """Documents of a block."""
        return max(1, self.shuffle_buffer // self.shards)


class StreamedDocuments:
    """Tokenized documents of all shards, each an endless sequence.

    Args:
        reader: Reader of the text files.
        types: Index of each dataset type by its name.
        tokenizer: Tokenizer of the recipe.
        settings: Settings of the stream.
        workers: Number of threads that tokenize ahead; with 0 a document is tokenized when it is needed.
    """

    def __init__(
        self,
        reader: TextReader,
        types: Mapping[str, int],
        tokenizer: Tokenizer,
        settings: StreamSettings,
        workers: int = 0,
    ) -> None:
        self.reader, self.settings, self.tokenizer = reader, settings, tokenizer
        self.units = divide(reader.layouts, settings.shards)
        self._type_of_file = [types[file.type_name] for file in reader.files]
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="internlm-tokens") if workers else None
        self._epochs, self._lock = 0, threading.Lock()  # epochs that a shard has read; threads read ahead

    def documents(self, shard: int, place: Place) -> Iterator[TokenizedDocument]:
        """Yield the documents of a shard from a place on, without an end.

        Raises:
            DataError: A file is damaged or has changed, the data has no text, or there is no such place.
        """
        empty_epochs = 0
        while empty_epochs <= EMPTY_EPOCHS * self.settings.shards:
            empty_epochs += 1
            for document in self._epoch(shard, place):
                yield document
                empty_epochs = 0
            self._log_bad_rows(place.epoch)
            place = Place(place.epoch + 1)
        message = f"contains no text, or none for shard {shard} of the stream"
        raise DataError(Problem("data.train_folder", message, "Choose another folder, or lower data.min_length"))

    def _log_bad_rows(self, epoch: int) -> None:
        """Log how many rows were left out or changed so far, when the first shard has read an epoch."""
        with self._lock:
            is_first, self._epochs = epoch >= self._epochs, max(self._epochs, epoch + 1)
        if is_first and (totals := self.reader.bad_rows.totals()):
            get_logger().info(f"texts until the end of epoch {epoch} of a shard: {'; '.join(totals)}")

    def _epoch(self, shard: int, place: Place) -> Iterator[TokenizedDocument]:
        """Yield the documents of a shard in one epoch, from a place on."""
        texts = self._texts(shard, place)
        while block := list(_block_of(texts, self.settings.block)):
            if place.document >= len(block):
                raise no_such_place(shard, place)
            yield from self._tokenized(block, shard, place)
            last = block[-1]
            place = Place(place.epoch, last.number, last.document.next + 1)
        if place.document:
            raise no_such_place(shard, place)

    def _texts(self, shard: int, place: Place) -> Iterator[_Text]:
        """Yield the texts of a shard from the beginning of a block to the end of its epoch."""
        # With fewer units than shards, each shard has its turn: in some epochs it has no unit.
        count = max(len(self.units), self.settings.shards)
        order = KeyedPermutation(count, self.settings.seed, Purpose.UNITS, place.epoch)
        indices = order(np.arange(shard, count, self.settings.shards))
        units = self.units[indices[indices < len(self.units)]].tolist()
        # The documents before the block are not read again, where the format allows to begin at a row or a byte.
        cursor = place.cursor - 1 if place.cursor else START
        for index in range(place.unit, len(units)):
            unit = Unit(*units[index])
            for document in self.reader.read(unit, cursor):
                yield _Text(document, unit, index)
            cursor = START

    def _tokenized(self, block: list[_Text], shard: int, place: Place) -> Iterator[TokenizedDocument]:
        """Tokenize the documents of a block in its order, from ``place.document`` on."""
        settings, begin = self.settings, (place.epoch, place.unit, place.cursor)
        permutation = KeyedPermutation(len(block), settings.seed, Purpose.DOCUMENTS, shard, *begin)
        order = permutation(np.arange(len(block))).tolist()
        remaining = iter(range(place.document, len(block)))
        chunks = iter(lambda: list(_chunk_of(remaining, order, block)), [])

        def encode(chunk: list[int]) -> Iterator[tuple[int, list[int]]]:
            # In batches, during which tokenizers release the interpreter's lock.
            ids = self.tokenizer.encode_batch([block[order[index]].document.text for index in chunk])
            return zip(chunk, ids, strict=True)

        # Ahead of the rows, since those of a shard wait for each other: otherwise one thread would do all the work.
        encoded = map(encode, chunks) if self._pool is None else in_order(self._pool, encode, chunks, CHUNKS_AHEAD)
        for chunk in encoded:
            for index, ids in chunk:
                tokens = np.array([*settings.recipe.before, *ids, *settings.recipe.after], np.int32)
                if len(tokens) >= max(settings.min_length, 1):
                    document, unit, _ = block[order[index]]
                    yield TokenizedDocument(tokens, self._type_of_file[unit.file], Place(*begin, index), unit, document)


class _Text(NamedTuple):
    document: Document
    unit: Unit
    number: int  # of the unit in the shard


def _block_of(texts: Iterator[_Text], most: int) -> Iterator[_Text]:
    """Yield the texts of the next block: at most so many, with about :data:`BLOCK_CHARACTERS` at most."""
    characters = 0
    for text in islice(texts, most):
        yield text
        characters += len(text.document.text)
        if characters >= BLOCK_CHARACTERS:
            return


def _chunk_of(remaining: Iterator[int], order: list[int], block: list[_Text]) -> Iterator[int]:
    """Yield the next indices, whose texts have about :data:`CHUNK_CHARACTERS` at most."""
    characters = 0
    for index in remaining:
        yield index
        characters += len(block[order[index]].document.text)
        if characters >= CHUNK_CHARACTERS:
            return


def no_such_place(shard: int, place: Place) -> DataError:
    """Return the error for a place of a checkpoint that the data does not have."""
    message = f"the checkpoint's place {tuple(place)} in shard {shard} does not exist in the data"
    todo = "Restore the data that the checkpoint was saved with, or set ckpt.allow_data_changes=True"
    return DataError(Problem("data.train_folder", message, todo))
