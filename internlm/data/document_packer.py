"""Packer of documents: rows of all layouts, made one after the other from documents that come in their order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from internlm.data.order import Piece
from internlm.data.packing import PackingLayout, Row, RowShape, SampleSpan, fill_row
from internlm.data.shard_documents import Place, TokenizedDocument, no_such_place


class DocumentPacker:
    """Packer of the documents of a shard into rows, one after the other.

    Args:
        documents: Documents of the shard from that of ``place`` on, without an end.
        shard: Number of the shard, for errors.
        shape: Sizes and packing layout of a row.
        place: Place at which the first row begins.

    Raises:
        DataError: The document of ``place`` has not so many tokens.
    """

    def __init__(self, documents: Iterator[TokenizedDocument], shard: int, shape: RowShape, place: Place) -> None:
        self._documents, self._shape, self._first = documents, shape, place
        self._current: TokenizedDocument | None = None
        self._used = 0
        # The rest of a document that does not fit into a row: its tokens are made again.
        if place.used:
            self._current, self._used = next(self._documents), place.used
            if self._current.place.document != place.document or place.used > len(self._current.tokens):
                raise no_such_place(shard, place)

    def place(self) -> Place:
        """Return the place at which the next row begins."""
        return self._first if self._current is None else self._current.place._replace(used=self._used)

    def make(self) -> Row:
        """Return the next row."""
        documents, spans = self.spans()
        return fill_row(_Documents(documents), spans, self._shape)

    def spans(self) -> tuple[list[TokenizedDocument], list[SampleSpan]]:
        """Return the documents of the next row, and their spans, in which they are named by their index."""
        return self._padded() if self._shape.layout is PackingLayout.PADDED else self._packed()

    def _packed(self) -> tuple[list[TokenizedDocument], list[SampleSpan]]:
        """Return the next ``packed_length`` tokens: a row of the packed and windows layouts."""
        spans: list[SampleSpan] = []
        documents: list[TokenizedDocument] = []
        at = 0
        while at < self._shape.packed_length:
            current = self._unfinished()
            # A document that does not fit is continued in the next row, as tokenized samples are.
            length, begin = len(current.tokens), self._used
            self._used = min(length, begin + self._shape.packed_length - at)
            spans.append(SampleSpan(Piece(len(documents), length, begin, self._used), at))
            documents.append(current)
            at += self._used - begin
        return documents, spans

    def _padded(self) -> tuple[list[TokenizedDocument], list[SampleSpan]]:
        """Return a row of the next ``micro_bsz`` documents, each truncated to ``seq_len``."""
        spans: list[SampleSpan] = []
        documents: list[TokenizedDocument] = []
        for number in range(self._shape.micro_bsz):
            current = self._unfinished()
            self._used = len(current.tokens)
            length = min(self._used, self._shape.seq_len)
            spans.append(SampleSpan(Piece(number, length, 0, length), number * self._shape.seq_len))
            documents.append(current)
        return documents, spans

    def _unfinished(self) -> TokenizedDocument:
        """Return the document that has tokens left, the current or the next one."""
        if self._current is None or self._used == len(self._current.tokens):
            self._current, self._used = next(self._documents), 0
        return self._current


class _Documents:
    """Documents of one row, as the samples of a source."""

    def __init__(self, documents: list[TokenizedDocument]) -> None:
        self._documents = documents
        self.type_ids = np.array([document.type_id for document in documents])

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a document, int64 [stop - begin]; by default all."""
        return self._documents[sample].tokens[begin:stop].astype(np.int64)
