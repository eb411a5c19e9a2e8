"""Build the rows of streamed data, for training and for validation, from the ``data`` section of a config."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from internlm.config.schema import DataConfig
from internlm.data.packing import RowShape
from internlm.data.shard_documents import StreamedDocuments, StreamSettings
from internlm.data.stream_rows import StreamRows
from internlm.data.text_encoder import Recipe, make_recipe
from internlm.data.text_folder import digest_files, find_text_files, fingerprint
from internlm.data.text_reader import TextReader
from internlm.data.text_splits import Selection
from internlm.data.text_units import Unit, divide
from internlm.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from internlm.utils.errors import DataError, Problem, first_of_all_ranks
from internlm.utils.logger import get_logger

VALID_TEXTS = 256  # texts of a validation set that are tokenized at once


def build_stream_rows(data: DataConfig, shape: RowShape, seed: int, vocab_size: int, step_rows: int) -> StreamRows:
    """Build the training rows of streamed data.

    Args:
        data: The ``data`` section of the config.
        shape: Sizes and packing layout of a row.
        seed: Seed for shuffling.
        vocab_size: Exclusive upper bound of the token ids.
        step_rows: Rows of a step on all data-parallel ranks together, after the ramp-up.

    Raises:
        DataError: The folder or the tokenizer cannot be used, or a file is damaged.
    """
    assert data.train_folder is not None, "streamed data needs a folder"
    tokenizer, recipe = _tokenizer(data, vocab_size)
    reader = _reader(data, Selection("data.train_folder", "data.train_split", data.train_split, data.subset))
    settings = StreamSettings(
        seed=seed,
        shards=data.stream_shards or step_rows,
        shuffle_buffer=data.shuffle_buffer,
        recipe=recipe,
        min_length=data.min_length,
    )
    types = sorted({file.type_name for file in reader.files})
    type_ids = {name: index for index, name in enumerate(types)}
    documents = StreamedDocuments(reader, type_ids, tokenizer, settings, data.num_worker)
    # Each thread reads a step, and training uses one more.
    ahead = (data.num_worker + 1) * -(-step_rows // settings.shards)
    return StreamRows(documents, types, shape, ahead, data.fingerprint)


def build_valid_texts(data: DataConfig, vocab_size: int) -> TextSource:
    """Build the source of streamed validation data.

    Raises:
        DataError: The folder or the tokenizer cannot be used, a file is damaged, or a dataset type has no text.
    """
    assert data.valid_folder is not None, "streamed data needs a folder"
    tokenizer, recipe = _tokenizer(data, vocab_size)
    shared = data.valid_folder == data.train_folder
    selection = Selection("data.valid_folder", "data.valid_split", data.valid_split, data.subset, shared)
    reader = _reader(data, selection)
    return TextSource(reader, tokenizer, recipe, data.min_length)


class TextSource:
    """Sample source of the texts of a folder, all of which are tokenized at once and held in memory.

    Args:
        reader: Reader of the text files.
        tokenizer: Tokenizer of the recipe.
        recipe: Tokenizer, and special tokens around each text.
        min_length: Minimum number of tokens of a text; shorter texts are left out.

    Raises:
        DataError: A file is damaged, or no text of a dataset type is left.
    """

    def __init__(self, reader: TextReader, tokenizer: Tokenizer, recipe: Recipe, min_length: int) -> None:
        self._reader, self._recipe = reader, recipe
        self.types = sorted({file.type_name for file in reader.files})
        type_ids, samples = [], []
        for unit in divide(reader.layouts, shards=1).tolist():
            type_id = self.types.index(reader.files[unit[0]].type_name)
            found = [x for x in _encoded(reader, Unit(*unit), tokenizer, recipe) if len(x) >= max(min_length, 1)]
            samples += found
            type_ids += [type_id] * len(found)
        self.lengths = np.array([len(sample) for sample in samples], np.int64)  # [N]
        self.type_ids = np.array(type_ids, np.int16)  # [N]
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._tokens = np.concatenate(samples) if samples else np.empty(0, np.int32)
        if emptied := [name for index, name in enumerate(self.types) if not (self.type_ids == index).any()]:
            message = f"the dataset type {emptied[0]!r} has no text with data.min_length = {min_length} tokens or more"
            raise DataError(Problem("data.valid_folder", message, "Lower data.min_length, or remove the files"))

    def read(self, sample: int, begin: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the token ids [``begin``, ``stop``) of a sample, int64 [stop - begin]; by default all."""
        first, length = int(self._starts[sample]), int(self.lengths[sample])
        until = length if stop is None else min(stop, length)
        return self._tokens[first + begin : first + until].astype(np.int64)

    def fingerprint(self) -> str:
        """Return a digest of the files, with samples of their content, and of the special tokens."""
        files = fingerprint(self._reader.files, digest_files(self._reader.files, "sampled"), "sampled")
        content = f"{files} {self._recipe.before} {self._recipe.after}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _encoded(reader: TextReader, unit: Unit, tokenizer: Tokenizer, recipe: Recipe) -> list[np.ndarray]:
    """Return the tokens of the texts of a unit, in their order."""
    # A unit is a few MiB, or a row group that its writer could hold in memory too.
    texts = [document.text for document in reader.read(unit)]
    chunks = (texts[first : first + VALID_TEXTS] for first in range(0, len(texts), VALID_TEXTS))
    ids = (ids for chunk in chunks for ids in tokenizer.encode_batch(chunk))
    return [np.array([*recipe.before, *text, *recipe.after], np.int32) for text in ids]


def _reader(data: DataConfig, selection: Selection) -> TextReader:
    """Return the reader of the selected files, in each of which the first row has the text."""
    folder = {"data.train_folder": data.train_folder, "data.valid_folder": data.valid_folder}[selection.key] or ""
    files = find_text_files(Path(folder.removeprefix("local:")), selection)
    reader = TextReader(files, data.content_name, data.on_bad_row)
    # One file of each dataset type, so that a wrong name is found before the model is built.
    firsts = {file.type_name: index for index, file in reversed(list(enumerate(files)))}
    for index in firsts.values():
        reader.check_first_row(index)
    return reader


def _tokenizer(data: DataConfig, vocab_size: int) -> tuple[Tokenizer, Recipe]:
    assert data.tokenizer_path is not None, "a rule of the config requires a tokenizer"
    tokenizer, recipe = load_tokenizer(data.tokenizer_path), make_recipe(data.tokenizer_path)
    check_vocabulary(tokenizer, vocab_size)
    if recipe.loses_line_ends and first_of_all_ranks(f"line ends: {data.tokenizer_path}"):
        message, todo = "the tokenizer drops line ends", "Use a tokenizer that keeps them"
        get_logger().warning(str(Problem("data.tokenizer_path", message, todo)))
    return tokenizer, recipe
