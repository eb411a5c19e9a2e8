"""Tokenizers: sentencepiece models and Hugging Face tokenizer folders with one interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from internlm.utils.errors import DataError, Problem, UserError
from internlm.utils.lazy import require

KINDS = "Pass a sentencepiece .model, a tokenizer.json, or a folder that contains tokenizer.json or tokenizer.model"


class Tokenizer(Protocol):
    """Protocol for a tokenizer that neither adds nor drops special tokens."""

    vocab_size: int  # exclusive upper bound of the token ids
    bos_id: int | None  # id of the token that begins a text; None if the tokenizer has none
    eos_id: int | None  # id of the token that ends a text; None if the tokenizer has none

    def encode(self, text: str) -> list[int]:
        """Encode a text into token ids."""

    def decode(self, ids: list[int]) -> str:
        """Decode token ids into a text."""


def load_tokenizer(path: str) -> Tokenizer:
    """Load a sentencepiece or Hugging Face tokenizer.

    Args:
        path: A sentencepiece ``.model``, a ``tokenizer.json``, or a folder that contains tokenizer.json or
            tokenizer.model.

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
    try:
        return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    except UserError:
        raise
    except Exception as error:  # the tokenizer packages raise plain Exception and RuntimeError
        raise DataError(Problem(str(file), f"is not a readable tokenizer ({error})", KINDS)) from error


class SentencePieceTokenizer:
    """Tokenizer read from a sentencepiece ``.model``."""

    def __init__(self, file: Path) -> None:
        sentencepiece = require("sentencepiece", f"tokenizer {file}", "pip install sentencepiece")
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.load_from_serialized_proto(file.read_bytes())
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = _id_or_none(self._model.bos_id())
        self.eos_id = _id_or_none(self._model.eos_id())

    def encode(self, text: str) -> list[int]:
        """Encode a text into token ids."""
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Decode token ids into a text."""
        return self._model.decode(ids)


class HuggingFaceTokenizer:
    """Tokenizer of a Hugging Face ``tokenizer.json``.

    The bos and eos tokens are read from ``tokenizer_config.json`` in the same folder.
    """

    def __init__(self, file: Path) -> None:
        tokenizers = require("tokenizers", f"tokenizer {file}", "pip install tokenizers")
        self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        config = file.with_name("tokenizer_config.json")
        names: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        # Not the number of entries: ids may have gaps, and vocab_size must exceed all of them.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self.bos_id = self._special(names.get("bos_token"))
        self.eos_id = self._special(names.get("eos_token"))

    def encode(self, text: str) -> list[int]:
        """Encode a text into token ids."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Decode token ids into a text."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _special(self, token: str | dict[str, Any] | None) -> int | None:
        name = token["content"] if isinstance(token, dict) else token
        return None if name is None else self._tokenizer.token_to_id(name)


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
