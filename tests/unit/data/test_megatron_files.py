"""Megatron-LM's ``.idx`` and ``.bin``, written here from the format's description."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.megatron_files import MegatronTokens
from internlm.data.tokenized_source import TokenizedSource
from internlm.utils.errors import DataError

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}


def write(prefix: Path, samples: list[list[int]], dtype: str = "i4") -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = [np.array(sample, f"<{dtype}") for sample in samples]
    prefix.with_suffix(".bin").write_bytes(b"".join(sample.tobytes() for sample in tokens))
    sizes = [sample.nbytes for sample in tokens]
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(samples), len(samples) + 1)
        + np.array([len(sample) for sample in samples], "<i4").tobytes()
        + np.array([sum(sizes[:number]) for number in range(len(samples))], "<i8").tobytes()
        + np.arange(len(samples) + 1, dtype="<i8").tobytes()
    )
    return prefix


def opened(folder: Path, vocab_size: int = 1000) -> TokenizedSource:
    return TokenizedSource(str(folder), 0, vocab_size, formats=[MegatronTokens()])


@pytest.mark.parametrize("dtype", CODES)
def test_prefixes_are_read(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "en/a_text_document", [[1, 2, 3], [4], []], dtype)
    write(tmp_path / "cn/b_text_document", [[5, 6]], dtype)
    source = opened(tmp_path)
    assert [source.read(sample).tolist() for sample in range(4)] == [[5, 6], [1, 2, 3], [4], []]
    assert source.read(1, 1, 3).tolist() == [2, 3]
    assert source.types == ["cn", "en"]


def test_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 1000]])
    with pytest.raises(DataError, match=r"a\.bin:1 \(sample 0, byte 0\): contains token 1000, but model.vocab_size"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: b"", "does not begin as an .idx"),
        (lambda raw: b"X" + raw[1:], "does not begin as an .idx"),
        (lambda raw: raw[:9] + b"\x02" + raw[10:], "expected version 1, got 2"),
        (lambda raw: raw[:17] + b"\x06" + raw[18:], "the code 6 is no dtype of integer ids"),
        (lambda raw: raw[:18] + b"\xff" * 8 + raw[26:], "18446744073709551615 sequences and 3 documents need"),
        (lambda raw: raw[:26] + b"\xff" * 8 + raw[34:], "2 sequences and 18446744073709551615 documents need"),
        (lambda raw: raw + b"\x00\x00", "2 sequences and 3 documents need 82 bytes, the file has 84"),
        (lambda raw: raw[:34] + b"\xff" * 4 + raw[38:], "sequence 0 has -1 tokens at byte 0"),
        (
            lambda raw: raw[:42] + b"\xff" * 7 + b"\x7f" + raw[50:],
            "sequence 0 has 3 tokens at byte 9223372036854775807",
        ),
    ],
)
def test_a_damaged_idx(tmp_path: Path, change: object, said: str) -> None:
    path = write(tmp_path / "a", [[1, 2, 3], [4]]).with_suffix(".idx")
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


@given(data=st.data())
def test_any_flip_of_an_idx_is_named_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = write(folder / "a", [[1, 2, 3], [4, 5]]).with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        source = opened(folder)
        assert all(0 <= token < 1000 for sample in range(2) for token in source.read(sample).tolist())
    except DataError as error:
        assert str(folder) in str(error)  # noqa: PT017


def test_a_missing_idx(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x01\x00\x00\x00")
    with pytest.raises(DataError, match=r"a\.idx: is missing beside a\.bin"):
        opened(tmp_path)
