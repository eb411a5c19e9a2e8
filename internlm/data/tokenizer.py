"""Tokenizers: sentencepiece models and Hugging Face tokenizer folders with one interface.

Both encode a text as it is: special tokens that are spelt in it are text, and no setting of the tokenizer's file
truncates, pads or extends what a text is encoded to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internlm.utils.errors import DataError, Problem, UserError
from internlm.utils.lazy import require

KINDS = "Pass a sentencepiece .model, a tokenizer.json, or a folder that contains tokenizer.json or tokenizer.model"

#: Character with which sentencepiece, and tokenizers derived from it, write a space in a piece.
SPACE = "\u2581"
#: Noncharacter of Unicode, not meant for interchange: the first character of names that no text should match.
NONCHARACTER = "\ufffe"

#: Upper bound of the sizes of vocabularies: some tables have an entry for each id below the largest one.
LARGEST_VOCABULARY = 10_000_000

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(Protocol):
    """Protocol for a tokenizer that neither adds nor drops special tokens."""

    vocab_size: int  # exclusive upper bound of the token ids
    bos_id: int | None  # id of the token that begins a text; None if the tokenizer has none
    eos_id: int | None  # id of the token that ends a text; None if the tokenizer has none

    def encode(self, text: str) -> list[int]:
        """Encode a text into token ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts one by one into token ids, faster than separate calls of :meth:`encode`."""

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts as :meth:`encode_batch` does, each into an array of integers [tokens]."""

    def decode(self, ids: list[int]) -> str:
        """Decode token ids into a text."""

    def byte_lengths(self) -> Iterator[tuple[int, int]]:
        """Yield the id of each token that stands for text, and the number of bytes of that text in UTF-8."""


def load_tokenizer(path: str, parse_special_tokens: bool = False) -> Tokenizer:
    """Load a sentencepiece or Hugging Face tokenizer.

    Args:
        path: A sentencepiece ``.model``, a ``tokenizer.json``, or a folder that contains tokenizer.json or
            tokenizer.model.
        parse_special_tokens: Encode the name of a special token in a text, such as ``</s>``, as that token. False:
            encode it as any other text.

    Raises:
        DataError: ``path`` contains no tokenizer, or the tokenizer cannot be read.
        UserError: The package that reads the tokenizer is not installed.
    """
    given = Path(path)
    files = [given / "tokenizer.json", given / "tokenizer.model"] if given.is_dir() else [given]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        message = "contains no tokenizer.json or tokenizer.model" if given.exists() else "no such file or folder"
        raise DataError(Problem(path, message, KINDS))
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(file, parse_special_tokens)
    except UserError:
        raise
    except Exception as error:  # the tokenizer packages raise plain Exception and RuntimeError
        raise DataError(Problem(str(file), f"is not a readable tokenizer ({error})", KINDS)) from error


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model of ``vocab_size`` tokens has every token of the tokenizer of a config.

    Raises:
        DataError: The tokenizer has larger ids.
    """
    # A model may have more: vocabularies are padded to a multiple that suits the hardware.
    if tokenizer.vocab_size > vocab_size:
        message = f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but model.vocab_size is {vocab_size}"
        todo = f"Set model.vocab_size to {tokenizer.vocab_size} or more"
        raise DataError(Problem("data.tokenizer_path", message, todo))


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many bytes of text each token stands for, in UTF-8.

    Summed over the tokens of a text, the counts give the length of the text in bytes, for bits per byte. Exceptions: a
    tokenizer that puts a space before each text counts this space too, one that normalises texts counts the normalised
    text, and a token for unknown text counts as 0.

    Returns:
        int64 [vocab_size]; 0 for special tokens, and for ids without a token.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for token_id, length in tokenizer.byte_lengths():
        counts[token_id] = length
    return counts


class SentencePieceTokenizer:
    """Tokenizer read from a sentencepiece ``.model``."""

    def __init__(self, file: Path, parse_special_tokens: bool = False) -> None:
        sentencepiece = require("sentencepiece", f"tokenizer {file}", "pip install sentencepiece")
        self._model = model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(file.read_bytes())
        self.vocab_size: int = model.get_piece_size()
        self.bos_id = _id_or_none(model.bos_id())
        self.eos_id = _id_or_none(model.eos_id())
        # sentencepiece itself never encodes text as a control token.
        names = {model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)}
        self._controls: dict[str, int] = names if parse_special_tokens else {}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")

    def encode(self, text: str) -> list[int]:
        """Encode a text into token ids."""
        if not self._controls:
            return self._model.encode(text)
        # Each part begins with the space that sentencepiece puts before a text, since the package has no call without.
        ids: list[int] = []
        for part in self._split.split(text):
            ids += [self._controls[part]] if part in self._controls else self._model.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts one by one into token ids, with one thread."""
        if self._controls:
            return [self.encode(text) for text in texts]
        return self._model.encode(list(texts), num_threads=1)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts as :meth:`encode_batch` does, without a Python integer for each token, which saves 8 %."""
        if self._controls:
            return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]
        return self._model.encode(list(texts), num_threads=1, return_type="numpy")

    def decode(self, ids: list[int]) -> str:
        """Decode token ids into a text."""
        return self._model.decode(ids)

    def byte_lengths(self) -> Iterator[tuple[int, int]]:
        """Yield the id of each token that stands for text, and the number of bytes of that text in UTF-8."""
        model = self._model
        for token_id in range(self.vocab_size):
            if model.is_byte(token_id):
                yield token_id, 1
            elif not (model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id)):
                yield token_id, len(model.id_to_piece(token_id).replace(SPACE, " ").encode())


class HuggingFaceTokenizer:
    """Tokenizer of a Hugging Face ``tokenizer.json``.

    The bos and eos tokens are read from ``tokenizer_config.json`` or, in older folders, ``special_tokens_map.json`` in
    the same folder. Settings for truncation, padding, dropout and added special tokens are switched off: they are meant
    for one use of a model, not for its training data.
    """

    def __init__(self, file: Path, parse_special_tokens: bool = False) -> None:
        tokenizers = require("tokenizers", f"tokenizer {file}", "pip install tokenizers")
        content = json.loads(file.read_text(encoding="utf-8"))
        # In the file, rather than by the package's methods, since a post-processor cannot be removed by one.
        content.update(truncation=None, padding=None, post_processor=None)
        if content["model"].get("dropout"):
            content["model"]["dropout"] = None  # which would draw the tokens of a text at random
        names = {**_load_json(file, "special_tokens_map.json"), **_load_json(file, "tokenizer_config.json")}
        bos, eos = _name(names.get("bos_token")), _name(names.get("eos_token"))
        for token in content["added_tokens"]:  # bos and eos are special, even if this file does not mark them so
            token["special"] = bool(token.get("special")) or token["content"] in (bos, eos)
        self._tokenizer = self._encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
        # Not the number of entries: ids may have gaps, and vocab_size must exceed all of them.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"has token {self.vocab_size - 1}, above {LARGEST_VOCABULARY - 1}")
        self.bos_id, self.eos_id = self._id(bos), self._id(eos)
        added = {token["content"] for token in content["added_tokens"] if token["special"]}
        self._special = added | {name for name in (bos, eos) if name is not None}
        self._pieces = _Pieces(content)
        if not parse_special_tokens:
            self._hide_special_tokens(tokenizers, content)

    def _hide_special_tokens(self, tokenizers: Any, content: dict[str, Any]) -> None:
        """Let the names of special tokens be encoded as text."""
        self._encoder.encode_special_tokens = True
        ids = {self._id(name) for name in self._special}
        if all(ids.isdisjoint(self.encode(name)) for name in self._special):
            return
        # The setting hides the added tokens, but models other than BPE also find the names in their own vocabulary.
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(_without_names(content, self._special)))
        self._encoder.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Encode a text into token ids."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts one by one into token ids, with the threads that ``TOKENIZERS_PARALLELISM`` allows."""
        # The fast variant computes no character offsets, which would take a quarter of the time.
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts as :meth:`encode_batch` does, each into an array of integers [tokens]."""
        return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        """Decode token ids into a text."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def byte_lengths(self) -> Iterator[tuple[int, int]]:
        """Yield the id of each token that stands for text, and the number of bytes of that text in UTF-8."""
        for piece, token_id in self._tokenizer.get_vocab().items():
            if piece not in self._special:
                yield token_id, self._pieces.byte_length(piece)

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._tokenizer.token_to_id(name)


class _Pieces:
    """Notation of the pieces of a ``tokenizer.json``: how each one spells its text."""

    def __init__(self, content: dict[str, Any]) -> None:
        model = content["model"]
        steps = [*_steps(content.get("pre_tokenizer")), *_steps(content.get("normalizer"))]
        self._byte_level = any(step["type"] == "ByteLevel" for step in [*steps, *_steps(content.get("decoder"))])
        self._byte_fallback = bool(model.get("byte_fallback"))
        self._continuing = model.get("continuing_subword_prefix") or ""
        self._unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            self._unknown = model["vocab"][model["unk_id"]][0]
        self._added = {token["content"] for token in content["added_tokens"]}

    def byte_length(self, piece: str) -> int:
        """Return the number of bytes of the text that ``piece`` stands for."""
        if piece == self._unknown:
            return 0
        # Added tokens are found in the text before it is written in the notation of the model's pieces.
        if piece in self._added:
            return len(piece.encode())
        if self._byte_level:
            return len(piece)  # each byte is written as one character
        if self._byte_fallback and _BYTE_PIECE.fullmatch(piece):
            return 1
        return len(piece.removeprefix(self._continuing).replace(SPACE, " ").encode())


def _steps(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a component of a ``tokenizer.json``, or the components of a ``Sequence``."""
    if component is None:
        return
    inner = [part for key in ("normalizers", "pretokenizers", "decoders") for part in component.get(key, ())]
    for part in inner:
        yield from _steps(part)
    if not inner:
        yield component


def _without_names(content: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` whose model has other names for the tokens ``names``, at their ids."""

    def renamed(piece: str) -> str:
        return NONCHARACTER + piece if piece in names else piece

    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        known = set(model["vocab"])
        model["vocab"] = {renamed(piece): token_id for piece, token_id in model["vocab"].items()}
    else:
        known = {piece for piece, _ in model["vocab"]}
        model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.isdisjoint([*pair, "".join(pair)])]
    # Added tokens beyond the model's vocabulary stay: the ids of later ones depend on them.
    added = [token for token in content["added_tokens"] if token["content"] not in names & known]
    return {**content, "model": model, "added_tokens": added}


def _load_json(file: Path, name: str) -> dict[str, Any]:
    """Return the content of the JSON file ``name`` beside ``file``; without such a file, nothing."""
    path = file.with_name(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _name(token: str | dict[str, Any] | None) -> str | None:
    """Return the name of a token in a ``tokenizer_config.json``."""
    return token["content"] if isinstance(token, dict) else token


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
