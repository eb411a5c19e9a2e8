"""Rows of streamed data: each document once in an epoch, the same rows for any ranks, read-ahead and restarts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.batch_plan import BatchPlan
from internlm.data.fingerprint import file_changes, same_data
from internlm.data.loader import TrainLoader
from internlm.data.order import EpochOrder
from internlm.data.packing import PackingLayout, Row, RowShape, make_row
from internlm.data.shard_documents import Place, StreamedDocuments
from internlm.data.stream_rows import StreamRows
from internlm.data.text_encoder import make_recipe
from internlm.data.tokenized_source import TokenizedSource
from internlm.data.tokenized_writer import tokenize_samples
from internlm.data.tokenizer import load_tokenizer
from internlm.utils.errors import DataError
from tests.unit.data.streams import VOCABULARY, open_stream, write_texts

#: Files of different formats, each with texts of its own.
FILES = ("en/1.parquet", "en/2.jsonl", "cn/stream.arrow", "cn/1.jsonl.gz", "1.txt")
TEXTS = {name: [f"{name} {i} " + "fox jumps " * (i * i % 11) for i in range(15)] for name in FILES}
#: Layouts that need no lengths of samples in advance.
STREAMED = (PackingLayout.PACKED, PackingLayout.WINDOWS, PackingLayout.PADDED)
LAYOUTS: tuple[dict[str, Any], ...] = ({}, {"pack_sample_into_one": True}, {"use_packed_dataset": False})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, texts in TEXTS.items():
        write_texts(folder / name, texts)
    return folder


@pytest.fixture(scope="module")
def stream(corpus: Path, hugging_face_folder: Path) -> StreamRows:
    return open_stream(corpus, hugging_face_folder)


def changed(
    stream: StreamRows, shape: RowShape | None = None, ahead: int = 9, workers: int = 0, **settings: Any
) -> StreamRows:
    """A stream of the same files with other settings, from its beginning."""
    old = stream.documents
    types = {name: index for index, name in enumerate(stream.types)}
    documents = StreamedDocuments(old.reader, types, old.tokenizer, replace(old.settings, **settings), workers)
    return StreamRows(documents, stream.types, shape or stream.shape, ahead)


def assert_same_rows(one: Row, other: Row) -> None:
    assert all(map(np.array_equal, one, other))


@given(shards=st.integers(1, 9), shuffle_buffer=st.integers(0, 200), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_has_every_document_once(
    stream: StreamRows, shards: int, shuffle_buffer: int, seed: int, epoch: int
) -> None:
    rows = changed(stream, seed=seed, shards=shards, shuffle_buffer=shuffle_buffer)
    tokenizer: Any = rows.documents.tokenizer
    found: Counter[tuple[str, str]] = Counter()
    for shard in range(shards):
        documents = rows.documents.documents(shard, Place(epoch))
        for document in takewhile(lambda x: x.place.epoch == epoch, documents):
            assert document.tokens[-1] == tokenizer.eos_id
            found[rows.types[document.type_id], tokenizer.decode(document.tokens[:-1].tolist())] += 1
    types = {name: name.split("/")[0] if "/" in name else "default" for name in FILES}
    assert found == Counter((types[name], text) for name, texts in TEXTS.items() for text in texts)


def test_every_shard_has_rows_of_a_single_text(tmp_path: Path, hugging_face_folder: Path) -> None:
    write_texts(tmp_path / "a.txt", ["the fox"])
    rows = open_stream(tmp_path, hugging_face_folder, stream_shards=8)
    assert all(rows[shard].labels.size for shard in range(8))


@given(st.data())
def test_rows_are_the_same_for_any_ranks_read_ahead_and_restarts(stream: StreamRows, data: st.DataObject) -> None:
    shape = RowShape(16, 2, data.draw(st.sampled_from(STREAMED)))
    shards, step_rows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    shuffle_buffer, ahead_of_shard = data.draw(st.sampled_from((0, 8, 64))), 3 * -(-step_rows // shards)
    draw = random.Random(data.draw(st.integers(0, 999)))

    def opened() -> StreamRows:
        return changed(stream, shape, ahead_of_shard, shards=shards, shuffle_buffer=shuffle_buffer)

    straight = opened()
    plan, position = BatchPlan(step_rows=step_rows, data_size=1), None
    for _ in range(data.draw(st.integers(1, 4))):
        ranks, steps, ahead = (data.draw(st.integers(low, high)) for low, high in ((1, 4), (0, 3), (0, 2)))
        loaders = [
            TrainLoader(opened(), BatchPlan(step_rows=step_rows, data_size=ranks), rank, 99, 0) for rank in range(ranks)
        ]
        for loader in loaders:
            if position is not None:
                loader.resume(position)
        start = 0 if position is None else position.step
        for loader in loaders:
            read = list(range(start, start + steps + ahead))
            draw.shuffle(read)  # threads that read ahead finish in any order
            for step in read:
                for row in loader.plan.rows(step, loaders.index(loader)):
                    assert_same_rows(loader.rows[row], straight[row])
        states = [loader.position(start + steps) for loader in loaders]
        position = states[0]._replace(state={k: v for state in states for k, v in state.state.items()})
        assert position[:3] == plan.position(start + steps)[:3]
        # The place of every shard is known where its rows go on, so that a restart makes no row again.
        rows_of = [sum(row % shards == shard for row in range(position.row)) for shard in range(shards)]
        assert {f"shard {shard} row {rows}" for shard, rows in enumerate(rows_of) if rows} <= {*position.state}


@pytest.mark.parametrize("workers", [1, 4])
def test_threads_that_read_ahead_change_nothing(stream: StreamRows, workers: int) -> None:
    # Fewer shards than rows of a step: each thread needs every shard, and they come to it in any order.
    read, position = [], None
    for threads in (0, workers):
        rows = changed(stream, ahead=5 * 6, workers=threads, shards=2)
        loader = TrainLoader(rows, BatchPlan(step_rows=6, data_size=1), 0, 20, threads)
        read.append([batch["input_ids"].tolist() for batch, _ in loader])
        assert position in (None, loader.position(20))
        position = loader.position(20)
    assert read[0] == read[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_damaged_during_the_run_ends_it(tmp_path: Path, hugging_face_folder: Path, workers: int) -> None:
    for name in ("1.txt", "2.txt"):
        write_texts(tmp_path / name, ["fox jumps " * 9] * 50)
    rows = open_stream(tmp_path, hugging_face_folder, num_worker=workers, shuffle_buffer=8)
    batches = iter(TrainLoader(rows, BatchPlan(step_rows=4, data_size=1), 0, 999, workers))
    next(batches)
    (tmp_path / "2.txt").write_text("fox")
    with pytest.raises(DataError, match=r"2\.txt: the file has changed since it was opened \(\d+ bytes then, 3 bytes"):
        list(batches)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("packed", "windows", "padded"))
def test_streamed_rows_equal_rows_of_tokenized_files(
    tmp_path: Path, corpus: Path, sentencepiece_model: Path, layout: Mapping[str, Any]
) -> None:
    rows = open_stream(corpus / "en", sentencepiece_model, stream_shards=1, shuffle_buffer=9, **layout)
    tokenizer = load_tokenizer(str(sentencepiece_model))
    epoch = list(takewhile(lambda x: x.place.epoch == 0, rows.documents.documents(0, Place())))
    texts = [tokenizer.decode(document.tokens[:-1].tolist()) for document in epoch]
    (tmp_path / "default").mkdir()
    samples, output = [("", text) for text in texts], tmp_path / "default" / "1.bin"
    tokenize_samples(samples, [output], make_recipe(str(sentencepiece_model)), workers=1)
    source = TokenizedSource(str(tmp_path), 0, VOCABULARY)
    order = EpochOrder(source.lengths, rows.shape.longest_sample, permutation=None)
    whole = (
        len(epoch) // rows.shape.micro_bsz if layout else sum(map(len, (d.tokens for d in epoch))) // 32
    )  # rows that have nothing of the next epoch
    for index in range(min(whole, 8)):
        assert_same_rows(rows[index], make_row(source, order, rows.shape, index))


class CountingTokenizer:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.texts = inner, 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.texts += len(texts)
        return self.inner.encode_batch(texts)


@pytest.mark.parametrize("name", ["1.parquet", "1.jsonl", "stream.arrow", "file.arrow", "1.txt.gz"])
def test_what_a_resumed_stream_reads_does_not_depend_on_what_was_consumed(
    tmp_path: Path, hugging_face_folder: Path, name: str
) -> None:
    block, group, most = 16, 50, 400
    write_texts(tmp_path / name, [f"{i} " + "fox jumps " * (i % 5) for i in range(most)], block=group)

    def opened() -> StreamRows:
        return open_stream(tmp_path, hugging_face_folder, stream_shards=1, shuffle_buffer=block)

    straight = opened()
    for consumed in (40, 150, 400):
        expected = [straight[row] for row in range(consumed + 1)][-1]
        resumed = opened()
        resumed.resume(consumed, straight.state(consumed))
        tokenizer: Any = CountingTokenizer(resumed.documents.tokenizer)
        resumed.documents.tokenizer = tokenizer
        assert_same_rows(resumed[consumed], expected)
        counts = resumed.documents.reader.counts
        # A row of 32 tokens and its block end within the next block.
        assert (counts["rows"] <= 2 * block, counts["units"] <= 2, tokenizer.texts <= 2 * block) == (True, True, True)


@pytest.mark.parametrize("layout", STREAMED)
def test_the_tokens_of_a_row_are_those_of_the_texts_that_are_traced(
    corpus: Path, stream: StreamRows, layout: PackingLayout
) -> None:
    rows = changed(stream, RowShape(16, 2, layout), shards=3, shuffle_buffer=20)
    tokenizer = rows.documents.tokenizer
    for index in (0, 7, 40, 3):
        row, ids = rows[index], np.zeros(32, np.int64)
        for span in rows.trace(index):
            name = Path(span.origin.file).relative_to(corpus).as_posix()
            text = TEXTS[name][span.origin.row]
            if span.origin.byte is not None:
                assert text.encode() in Path(span.origin.file).read_bytes()[span.origin.byte :][: span.origin.bytes]
            (tokens,) = tokenizer.encode_batch([text])
            ids[span.at : span.at + span.stop - span.begin] = [*tokens, 1][span.begin : span.stop]
            assert set(row.type_ids[span.at : span.at + span.stop - span.begin]) == {rows.types.index(span.type_name)}
        assert ids.tolist() == row.input_ids.tolist()


def test_changed_files_are_named(tmp_path: Path, hugging_face_folder: Path) -> None:
    def opened() -> StreamRows:
        return open_stream(tmp_path, hugging_face_folder)

    for name in ("1.txt", "2.txt", "3.txt"):
        write_texts(tmp_path / name, ["one", "two"])
    before = opened()
    old = before.fingerprint(), before.files()
    write_texts(tmp_path / "2.txt", ["one", "six"])
    (tmp_path / "3.txt").rename(tmp_path / "4.txt")
    after = opened()
    assert not same_data(old[0], after.fingerprint())
    changes = file_changes(old[1], after.files())
    assert str(changes) == "changed: 2.txt; added: 4.txt; removed: 3.txt"


def test_another_number_of_shards_is_refused(corpus: Path, hugging_face_folder: Path) -> None:
    saved = open_stream(corpus, hugging_face_folder, stream_shards=4)
    assert saved[0] is not None
    with pytest.raises(DataError, match=r"data\.stream_shards: 3, but the checkpoint was saved with 4\. Set"):
        open_stream(corpus, hugging_face_folder, stream_shards=3).resume(8, saved.state(8))


@given(st.data())
def test_a_damaged_state_is_refused_or_gives_rows(stream: StreamRows, data: st.DataObject) -> None:
    rows = changed(stream, shards=2, shuffle_buffer=8)
    assert all(rows[index] is not None for index in range(20))
    state = rows.state(20)
    name = data.draw(st.sampled_from(sorted(state)))
    number = st.one_of(st.integers(0, 12), st.integers(0, 10**18))
    state[name] = data.draw(st.lists(number, min_size=len(state[name]) - 1, max_size=len(state[name]) + 1))
    resumed = changed(stream, shards=2, shuffle_buffer=8)
    shapes = []
    with suppress(DataError):
        resumed.resume(20, state)
        shapes = [resumed[index].input_ids.shape for index in (20, 21)]
    assert shapes in ([], [(32,), (32,)])


def test_other_data_begins_an_epoch_of_its_own(corpus: Path, hugging_face_folder: Path) -> None:
    rows = open_stream(corpus, hugging_face_folder, stream_shards=2)
    rows.resume(10, {})
    assert rows[10].input_ids.any()
    assert rows.state(12)["shard 0 row 6"][0] >= 5


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(corpus: Path, hugging_face_folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer_path: the tokenizer has ids up to 299, but .* is 100\. Set"):
        open_stream(corpus, hugging_face_folder, vocab_size=100)
