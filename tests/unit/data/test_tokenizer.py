"""Tokenizers of sentencepiece and of Hugging Face."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from internlm.data.tokenizer import Tokenizer, bytes_of_tokens, load_tokenizer
from internlm.utils.errors import DataError
from tests.unit.data.conftest import TEXT


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


def test_a_batch_is_encoded_text_by_text(sentencepiece_model: Path, hugging_face_folder: Path) -> None:
    for path in (sentencepiece_model, hugging_face_folder):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.encode_batch([*TEXT, ""]) == [tokenizer.encode(text) for text in [*TEXT, ""]]
        assert tokenizer.encode_batch([]) == tokenizer.encode_arrays([]) == []
        arrays = tokenizer.encode_arrays([*TEXT, ""])
        assert [ids.tolist() for ids in arrays] == [tokenizer.encode(text) for text in [*TEXT, ""]]
        assert all(np.issubdtype(ids.dtype, np.integer) for ids in arrays)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: no such file or folder\. Pass a sentencepiece \.model"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match="contains no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"[]", b"\xff\xfe"])
def test_a_damaged_tokenizer(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: is not a readable tokenizer"):
        load_tokenizer(str(tmp_path))


def test_an_absurd_id(hugging_face_folder: Path, tmp_path: Path) -> None:
    content = json.loads((hugging_face_folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["absurd"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"is not a readable tokenizer \(has token {2**31}, above 9999999\)"):
        load_tokenizer(str(tmp_path))


# -- settings of tokenizer.json


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **names: Any) -> Tokenizer:
    """Save a tokenizer folder, and load it with our own reader."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(str(folder))


def truncate(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.enable_truncation(16)


def pad(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.enable_padding(length=64)


def add_bos(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])


def drop_out(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.model.dropout = 0.9


@pytest.mark.parametrize("change", [truncate, pad, add_bos, drop_out])
def test_settings_of_the_file_do_not_apply(
    change: Callable[[tokenizers.Tokenizer], None], hugging_face_folder: Path, tmp_path: Path
) -> None:
    plain = load_tokenizer(str(hugging_face_folder))
    raw = tokenizers.Tokenizer.from_file(str(hugging_face_folder / "tokenizer.json"))
    change(raw)
    changed = save(raw, tmp_path, bos_token="<s>", eos_token="</s>")
    for text in (" ".join(f"paragraph {i} of the agreement" for i in range(150)), "a short one"):
        assert changed.encode(text) == plain.encode(text) == changed.encode_batch([text])[0]
        assert changed.decode(changed.encode(text)) == text


def test_names_in_an_older_folder(hugging_face_folder: Path, tmp_path: Path) -> None:
    shutil.copy(hugging_face_folder / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "</s>", "eos_token": {"content": "</s>"}}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


# -- special tokens in a text


def of_pieces(model: models.Model) -> tokenizers.Tokenizer:
    """A tokenizer in whose model the names of special tokens are pieces as well, as in converted models."""
    tokenizer = tokenizers.Tokenizer(model)
    if isinstance(model, models.Unigram):
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


LETTERS = "▁abc</s>endtol"
VOCAB = {piece: index for index, piece in enumerate(dict.fromkeys(["<unk>", "</s>", *LETTERS, "a</s>"]))}
FALLIBLE_MODELS = {
    "unigram": lambda: models.Unigram([(piece, -float(i > 1)) for piece, i in VOCAB.items()], 0),
    "bpe": lambda: models.BPE(VOCAB, [], unk_token="<unk>", ignore_merges=True),
    "wordpiece": lambda: models.WordPiece(VOCAB, unk_token="<unk>", continuing_subword_prefix=""),
}


@pytest.mark.parametrize("kind", FALLIBLE_MODELS)
def test_special_tokens_in_the_models_own_vocabulary(kind: str, tmp_path: Path) -> None:
    raw = of_pieces(FALLIBLE_MODELS[kind]())
    tokenizer = save(raw, tmp_path, eos_token="</s>")
    eos, end, tool = (raw.token_to_id(name) for name in ("</s>", "<end>", "<tool>"))
    assert tokenizer.eos_id == eos == 1
    text = "b </s> <end> <tool> c"
    assert eos in raw.encode(text).ids
    ids = tokenizer.encode(text)
    assert not {0, eos, end} & set(ids)
    assert tool in ids
    parsed = load_tokenizer(str(tmp_path), parse_special_tokens=True).encode(text)
    assert [i for i in parsed if i in (eos, end, tool)] == [eos, end, tool]
    assert tokenizer.decode([eos, end]).split() == ["</s>", "<end>"] or kind == "unigram"


def test_special_tokens_in_a_text_are_text(sentencepiece_model: Path, hugging_face_folder: Path) -> None:
    text = "<p><s>Hello.</s> Type exit to leave.</p>"
    for path in (sentencepiece_model, hugging_face_folder):
        tokenizer = load_tokenizer(str(path))
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        parsing = load_tokenizer(str(path), parse_special_tokens=True)
        for ids in (parsing.encode(text), *parsing.encode_batch([text])):
            assert [i for i in ids if i in (parsing.bos_id, parsing.eos_id)] == [parsing.bos_id, parsing.eos_id]


def test_an_eos_that_is_an_ordinary_added_token(hugging_face_folder: Path, tmp_path: Path) -> None:
    raw = tokenizers.Tokenizer.from_file(str(hugging_face_folder / "tokenizer.json"))
    raw.add_tokens(["<end>"])
    tokenizer = save(raw, tmp_path, eos_token="<end>")
    assert tokenizer.eos_id == raw.encode("<end>").ids[0] == 300
    assert tokenizer.eos_id not in tokenizer.encode("the <end>")


# -- bytes of tokens


def check_bytes(tokenizer: Tokenizer, text: str, extra: int) -> None:
    counts = bytes_of_tokens(tokenizer)
    assert counts.shape == (tokenizer.vocab_size,)
    ids = tokenizer.encode(text)
    assert counts[ids].sum() == len(text.encode()) + (extra if ids else 0)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=TEXTS)
def test_bytes_of_byte_level_tokens(text: str, hugging_face_folder: Path) -> None:
    tokenizer = load_tokenizer(str(hugging_face_folder))
    check_bytes(tokenizer, text, 0)
    assert not bytes_of_tokens(tokenizer)[[tokenizer.bos_id, tokenizer.eos_id]].any()


@pytest.fixture(scope="module")
def lossless_model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece model that normalises nothing, with two tokens of one's own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>", "  "],
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("lossless") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return load_tokenizer(str(file))


@given(text=TEXTS.filter(lambda text: "\u2581" not in text and "\0" not in text))
def test_bytes_of_sentencepiece_tokens(text: str, lossless_model: Tokenizer) -> None:
    check_bytes(lossless_model, f"{text}<tool>  {text}", extra=1)  # the space that sentencepiece puts first


def test_bytes_of_other_tokenizers_of_hugging_face(tmp_path: Path) -> None:
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "b", "é", *(f"<0x{i:02X}>" for i in range(256))])}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence(spaces)
    check_bytes(save(raw, tmp_path), "bé 狐", extra=1)
    raw = tokenizers.Tokenizer(models.WordPiece({"<unk>": 0, "b": 1, "##é": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    check_bytes(save(raw, tmp_path), "béé", extra=0)
    tokenizer = save(of_pieces(FALLIBLE_MODELS["unigram"]()), tmp_path)
    check_bytes(tokenizer, "b <tool>c", extra=2)  # a space at the start, and after the added token
    assert bytes_of_tokens(tokenizer)[:2].tolist() == [0, 0]
