"""Tokenizers: sentencepiece models and Hugging Face tokenizer folders with one interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from internlm.utils.errors import DataError, Problem, UserError
from internlm.utils.lazy import require

KINDS = "Name a sentencepiece .model file, or a folder that contains tokenizer.json or tokenizer.model."


class Tokenizer(Protocol):
    """Encoder of texts into token ids, and decoder; neither adds or drops special tokens."""

    vocab_size: int  # every id is below it
    bos_id: int | None  # begins a text; None where the tokenizer has no such token
    eos_id: int | None  # ends a text; None where the tokenizer has no such token

    def encode(self, text: str) -> list[int]:
        """Encode a text."""

    def decode(self, ids: list[int]) -> str:
        """Decode token ids."""


def load_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a sentencepiece ``.model``, a ``tokenizer.json``, or a folder that contains tokenizer.json or
            tokenizer.model.

    Raises:
        DataError: there is no tokenizer, or it can't be read.
        UserError: the package that reads it is not installed.
    """
    given = Path(path)
    files = [given / "tokenizer.json", given / "tokenizer.model"] if given.is_dir() else [given]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        what = "contains no tokenizer" if given.exists() else "there is no such file or folder"
        raise DataError(Problem(path, what, KINDS))
    try:
        return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    except UserError:
        raise
    except Exception as error:  # the tokenizer packages raise plain Exception and RuntimeError
        raise DataError(Problem(str(file), f"isn't a tokenizer that can be read ({error})", KINDS)) from error


class SentencePieceTokenizer:
    """Tokenizer of a sentencepiece ``.model``."""

    def __init__(self, file: Path) -> None:
        sentencepiece = require("sentencepiece", f"tokenizer {file}", "pip install sentencepiece")
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.load_from_serialized_proto(file.read_bytes())
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = _id_or_none(self._model.bos_id())
        self.eos_id = _id_or_none(self._model.eos_id())

    def encode(self, text: str) -> list[int]:
        """Encode a text."""
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Decode token ids."""
        return self._model.decode(ids)


class HuggingFaceTokenizer:
    """Tokenizer of a Hugging Face ``tokenizer.json``; bos and eos are named in ``tokenizer_config.json`` next to it."""

    def __init__(self, file: Path) -> None:
        tokenizers = require("tokenizers", f"tokenizer {file}", "pip install tokenizers")
        self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        config = file.with_name("tokenizer_config.json")
        names: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        # Not the number of entries: ids may have gaps, and vocab_size has to bound them all.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self.bos_id = self._special(names.get("bos_token"))
        self.eos_id = self._special(names.get("eos_token"))

    def encode(self, text: str) -> list[int]:
        """Encode a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Decode token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _special(self, token: str | dict[str, Any] | None) -> int | None:
        name = token["content"] if isinstance(token, dict) else token
        return None if name is None else self._tokenizer.token_to_id(name)


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
