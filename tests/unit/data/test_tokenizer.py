"""Tokenizers of sentencepiece and of Hugging Face."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from internlm.data.tokenizer import load_tokenizer
from internlm.utils.errors import DataError


def test_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_model))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (320, 1, 2)
    ids = tokenizer.encode("the lazy 狐")
    assert 0 < max(ids) < 320
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "the lazy 狐"
    assert load_tokenizer(str(sentencepiece_model.parent)).encode("the lazy 狐") == ids


def test_hugging_face(hugging_face_folder: Path) -> None:
    tokenizer = load_tokenizer(str(hugging_face_folder))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 0, 1)
    ids = tokenizer.encode("the lazy 狐")
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == "the lazy 狐"
    assert load_tokenizer(str(hugging_face_folder / "tokenizer.json")).encode("the lazy 狐") == ids


def test_hugging_face_without_a_config(hugging_face_folder: Path, tmp_path: Path) -> None:
    shutil.copy(hugging_face_folder / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: no such file or folder\. Pass a sentencepiece \.model"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match="contains no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"\xff\xfe"])
def test_a_damaged_tokenizer(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: is not a readable tokenizer"):
        load_tokenizer(str(tmp_path))
