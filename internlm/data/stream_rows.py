"""Rows of streamed data: texts that are tokenized and packed while the run trains.

Row n of the run is row n // V of shard n % V, of V shards. Each shard is packed on its own: its rows are the same,
whichever rank makes them. By default a step has V rows, so a data-parallel rank always reads the same shards. A row is
made after the rows before it, or from a *place* in the documents of its shard. A checkpoint has the places of all
shards.

Threads tokenize ahead: tokenizers release the interpreter's lock, so the training thread is not held up.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from internlm.data.batch_plan import BatchPlan
from internlm.data.document_packer import DocumentPacker
from internlm.data.fingerprint import ORDER, FileDigest, Level, file_list
from internlm.data.packing import Row, RowShape, SampleSpan
from internlm.data.provenance import TracedSpan
from internlm.data.shard_documents import Place, StreamedDocuments, TokenizedDocument, no_such_place
from internlm.data.text_folder import digest_files, fingerprint
from internlm.utils.errors import DataError, Problem

STREAM_VERSION = 1  # part of the fingerprint: a run must not continue in another order
SHARDS = "shards"  # entry of a state with the number of shards
MARKS = 4  # places that are kept of a shard, as a multiple of the rows that are read ahead

Value = TypeVar("Value")


class StreamRows:
    """Training rows of streamed data; row n is a function of (seed, data, settings, n).

    Rows are made in the order of their indices. If a row that was skipped is asked for, or one that was made before, it
    is made again from the nearest place before it that is known.

    Args:
        documents: Documents of all shards.
        types: Names of the dataset types.
        shape: Sizes and packing layout of a row.
        ahead: Largest number of rows of a shard that are read before the run trains on the first of them.
        level: What the fingerprint covers of the files.
    """

    state_is_sharded = True

    def __init__(
        self, documents: StreamedDocuments, types: list[str], shape: RowShape, ahead: int, level: Level = "sampled"
    ) -> None:
        self.documents, self.types, self.shape = documents, types, shape
        self._level = level
        self.shards = documents.settings.shards
        self._ahead = ahead
        self._origins: dict[int, _Mark] = {}  # by shard: where the run was resumed
        self._shards: dict[int, _Shard] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        raise TypeError("the number of rows of streamed data is unknown until all texts have been tokenized")

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``, counted from 0 over all epochs."""
        if index < 0:
            raise IndexError(f"rows are counted from 0, got index {index}")
        row, shard = divmod(index, self.shards)
        return self._shard(shard).read(row)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over all rows, without an end."""
        index = 0
        while True:
            yield self[index]
            index += 1

    def fingerprint(self) -> str:
        """Return digests of the order, the tokenizer and the files."""
        recipe = self.documents.settings.recipe
        tokenizer = _digest_of_tokenizer(Path(recipe.tokenizer_path), recipe.before, recipe.after)
        files = fingerprint(self.documents.reader.files, self._digests, self._level)
        return f"{ORDER}:stream-{STREAM_VERSION} tokenizer:{tokenizer} {files}"

    def files(self) -> str:
        """Return the list of the files for checkpoints."""
        return file_list(self.documents.reader.files, self._digests, self._level)

    @functools.cached_property
    def _digests(self) -> list[FileDigest]:
        return digest_files(self.documents.reader.files, self._level)

    def trace(self, index: int) -> list[TracedSpan]:
        """Return the pieces of row ``index``, counted from 0 over all epochs, with the files that they are from."""
        row, shard = divmod(index, self.shards)
        documents, spans = self._shard(shard).trace(row)
        origins = [self.documents.reader.origin(document.unit, document.source) for document in documents]
        return [
            TracedSpan(at, begin, stop, length, self.types[documents[number].type_id], origins[number])
            for (number, length, begin, stop), at in spans
        ]

    def state(self, row: int) -> dict[str, list[int]]:
        """Return the places in the documents from which the rows ``row`` and later are made, of the shards read here.

        A place is named by its shard and its row in the shard. Of a shard that this rank has not read since the run was
        resumed, it is the place at which the run was resumed.
        """
        # A few numbers for each shard: the checkpoint's state is text that is read as a whole.
        state = {SHARDS: [self.shards]}
        for shard in {*self._shards, *self._origins}:
            wanted = _row_of(shard, row, self.shards)
            mark = self._shard(shard).mark(wanted)
            # An earlier place is of use where no rank has made the row before: its batch may have been skipped.
            if mark.row and (mark.row == wanted or mark == self._origins.get(shard)):
                state[f"shard {shard} row {mark.row}"] = list(mark.place)
        return state

    def follow(self, plan: BatchPlan) -> None:
        """Do nothing: rows do not depend on their steps."""

    def resume(self, row: int, state: Mapping[str, list[int]], has_changed: bool = False) -> None:
        """Read on from ``row``, with the :meth:`state` of all ranks there.

        Without a state, or with that of other data, each shard begins an epoch that the run cannot have reached.

        Raises:
            DataError: The state is that of another number of shards, or damaged.
        """
        if row and (has_changed or not state):
            # Epoch 0 would repeat what the run has seen. It has begun fewer epochs than it has made rows.
            starts = {shard: _row_of(shard, row, self.shards) for shard in range(self.shards)}
            self._origins = {shard: _Mark(start, Place(epoch=start)) for shard, start in starts.items()}
        else:
            self._origins = dict(self._marks(row, state))
        self._shards = {}

    def _marks(self, row: int, state: Mapping[str, list[int]]) -> Iterator[tuple[int, _Mark]]:
        """Yield the last place of each shard that is not after ``row``, from a state that is not trusted."""
        saved = state.get(SHARDS, [self.shards])
        if saved != [self.shards]:
            message = f"{self.shards}, but the checkpoint was saved with {', '.join(map(str, saved))}"
            todo = "Set data.stream_shards to the saved number, which determines the rows"
            raise DataError(Problem("data.stream_shards", message, todo))
        found: dict[int, _Mark] = {}
        for name in state.keys() - {SHARDS}:
            numbers = state[name]
            words = name.split()
            shape = [word.isascii() and word.isdigit() for word in words]
            if shape != [False, True, False, True] or len(numbers) != len(Place._fields) or max(numbers) >= 1 << 62:
                todo = "Choose another checkpoint"
                raise DataError(Problem(f"sampler_state: {name!r}", f"is damaged, got {numbers}", todo))
            shard, mark = int(words[1]), _Mark(int(words[3]), Place(*numbers))
            if min(numbers) < 0 or shard >= self.shards or mark.row > _row_of(shard, row, self.shards):
                raise no_such_place(shard, mark.place)
            found[shard] = max(mark, found.get(shard, mark))
        yield from found.items()

    def _shard(self, shard: int) -> _Shard:
        with self._lock:
            if shard not in self._shards:
                origin = self._origins.get(shard, _Mark(0, Place()))
                documents = self.documents

                def open_at(place: Place) -> Iterator[TokenizedDocument]:
                    return documents.documents(shard, place)

                self._shards[shard] = _Shard(open_at, shard, self.shape, origin, self._ahead)
            return self._shards[shard]


class _Mark(NamedTuple):
    """Place in the documents of a shard at which one of its rows begins."""

    row: int
    place: Place


class _Shard:
    """Rows of one shard.

    Args:
        open_at: Function that returns the documents from a place on.
        number: Number of the shard, for errors.
        shape: Sizes and packing layout of a row.
        origin: First row that is made, and its place.
        ahead: Largest number of rows that are read ahead.
    """

    def __init__(
        self,
        open_at: Callable[[Place], Iterator[TokenizedDocument]],
        number: int,
        shape: RowShape,
        origin: _Mark,
        ahead: int,
    ) -> None:
        self._open_at, self._number, self._shape = open_at, number, shape
        self._origin, self._ahead = origin, ahead
        self._marks = OrderedDict({origin.row: origin.place})  # of rows that were made, and of the next one
        self._passed: OrderedDict[int, Row] = OrderedDict()  # rows that were made before a later one, and not returned
        self._lock = threading.Lock()
        self._packer: DocumentPacker | None = None
        self._next = 0

    def read(self, row: int) -> Row:
        """Return a row of the shard."""
        with self._lock:
            if row in self._passed:
                return self._passed.pop(row)
            # A thread that reads a later step may come first. What it passes over is kept for the others.
            if self._packer is None or row < self._next:
                self._start_at(self._nearest(row))
            while True:
                assert self._packer is not None
                try:
                    made = self._packer.make()
                except BaseException:
                    self._packer = None  # its generators have ended; the next call starts them again
                    raise
                index, self._next = self._next, self._next + 1
                _keep(self._marks, self._next, self._packer.place(), MARKS * self._ahead)
                if index == row:
                    return made
                _keep(self._passed, index, made, self._ahead)

    def mark(self, row: int) -> _Mark:
        """Return the last known place at which a row begins that is not after ``row``."""
        with self._lock:
            return self._nearest(row)

    def trace(self, row: int) -> tuple[list[TokenizedDocument], list[SampleSpan]]:
        """Return the documents of a row of the shard, and their spans; the next row that is read stays the same."""
        mark = self.mark(row)
        # Another packer: that of training is where the next row begins, and may be in use by a thread.
        packer = self._open(mark.place)
        for _ in range(mark.row, row):
            packer.spans()
        return packer.spans()

    def _nearest(self, row: int) -> _Mark:
        known = [_Mark(index, place) for index, place in self._marks.items() if index <= row]
        # A row before the origin, which only a script asks for, is made from the beginning of the data.
        return max(known, default=self._origin if self._origin.row <= row else _Mark(0, Place()))

    def _open(self, place: Place) -> DocumentPacker:
        return DocumentPacker(self._open_at(place._replace(used=0)), self._number, self._shape, place)

    def _start_at(self, mark: _Mark) -> None:
        self._packer, self._next = self._open(mark.place), mark.row


def _keep(kept: OrderedDict[int, Value], index: int, value: Value, most: int) -> None:
    """Keep a value as the last one, and drop the first ones beyond a number."""
    kept[index] = value
    kept.move_to_end(index)
    while len(kept) > most:
        kept.popitem(last=False)


def _row_of(shard: int, row: int, shards: int) -> int:
    """Return the index, in its shard, of the shard's first row that is not before row ``row`` of the run."""
    return max(0, -((shard - row) // shards))


def _digest_of_tokenizer(path: Path, *special: tuple[int, ...]) -> str:
    """Return a digest of the files of a tokenizer that determine its tokens, and of ``special`` tokens."""
    files = [path / name for name in ("tokenizer.json", "tokenizer.model")] if path.is_dir() else [path]
    digest = hashlib.blake2b(repr(special).encode(), digest_size=12)
    for file in filter(Path.is_file, files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
