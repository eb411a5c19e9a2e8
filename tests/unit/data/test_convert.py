"""Conversion of token files, and the command ``internlm data convert``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.cli.main import main
from internlm.data import convert
from internlm.data.convert import convert_folder
from internlm.data.fingerprint import same_data
from internlm.data.sources import INPUT_ONLY_ZERO
from internlm.data.tokenized_source import TokenizedSource
from internlm.utils.errors import DataError
from tests.unit.data import test_megatron_files as megatron
from tests.unit.data.files import write_bin

VOCAB = 1 << 31


def tokens_of(folder: Path) -> list[list[int]]:
    source = TokenizedSource(str(folder), 0, VOCAB)
    return [source.read(sample).tolist() for sample in range(len(source.lengths))]


ids = st.one_of(st.integers(-9, 9), st.integers(-VOCAB + 1, VOCAB - 1), st.just(INPUT_ONLY_ZERO))
lists = st.lists(st.lists(ids, max_size=9), min_size=1, max_size=5).filter(lambda s: any(len(t) > 1 for t in s))


@settings(max_examples=20)
@given(files=st.lists(lists, min_size=1, max_size=3))
def test_there_and_back_again(tmp_path_factory: pytest.TempPathFactory, files: list[list[list[int]]]) -> None:
    folder = tmp_path_factory.mktemp("convert")
    for number, samples in enumerate(files):
        write_bin(folder / f"json/t{number}/x.bin", samples)
    for source, target, to in (("json", "binary", "binary"), ("binary", "again", "json")):
        done = list(convert_folder(folder / source, folder / target, to, ["json", "binary"], workers=1))
        assert [file.samples for file in done] == [len(samples) for samples in files]
    expected = [sample for samples in files for sample in samples]
    assert tokens_of(folder / "json") == tokens_of(folder / "binary") == tokens_of(folder / "again") == expected


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("en/x", "en/y/z", "top"):
        write_bin(tmp_path / f"json/{name}.bin", [[1, -2, 3], [4]])
    assert main(["data", "convert", f"{tmp_path}/json", f"{tmp_path}/binary", "--num-workers", "2"]) is None
    assert capsys.readouterr().out.startswith(f"{tmp_path}/binary: 3 files, 6 samples, 12 tokens, ")
    assert sorted(path.relative_to(tmp_path / "binary").as_posix() for path in (tmp_path / "binary").rglob("*.*")) == [
        "en/x.tokens",
        "en/y/z.tokens",
        "top.tokens",
    ]
    before, after = (TokenizedSource(f"{tmp_path}/{name}", 0, VOCAB).fingerprint() for name in ("json", "binary"))
    assert same_data(before, after)


def test_megatron_files_are_converted(tmp_path: Path) -> None:
    megatron.write(tmp_path / "in/a_text_document", [[1, 2, 3], [4]])
    assert main(["data", "convert", f"{tmp_path}/in", f"{tmp_path}/out", "--from", "megatron"]) is None
    assert tokens_of(tmp_path / "out") == [[1, 2, 3], [4]]


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    write_bin(tmp_path / "in/x.bin", [[1, 2]])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.tokens").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"out/x\.tokens: exists already"):
        list(convert_folder(tmp_path / "in", tmp_path / "out", "binary", ["json"], 1))
    assert (tmp_path / "out/x.tokens").read_bytes() == b"mine"


@pytest.mark.parametrize("to", ["binary", "json"])
def test_what_was_written_wrongly_is_noticed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    write_bin(tmp_path / "in/x.bin", [[1, 2], [3]])
    write = convert._WRITERS[to]

    def miswrite(samples: convert._Samples, path: Path) -> None:
        write(samples, path)
        content = path.read_bytes()
        old, new = (b"3", b"4") if to == "json" else (b"\x03\x00\x02", b"\x04\x00\x02")
        assert old in content
        path.write_bytes(content.replace(old, new))

    monkeypatch.setitem(convert._WRITERS, to, miswrite)
    with pytest.raises(DataError, match=r"out/x\.(tokens|bin): the tokens that were written differ from those of"):
        list(convert_folder(tmp_path / "in", tmp_path / "out", to, ["json"], 1))  # type: ignore[arg-type]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    file = write_bin(tmp_path / "in/x.bin", [[1, 2], [3]])
    file.write_text(file.read_text().replace("3", "x"))
    with pytest.raises(DataError, match=r"in/x\.bin:2 \(sample 1, byte 19\): is not a JSON line"):
        list(convert_folder(tmp_path / "in", tmp_path / "out", "binary", ["json"], 1))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_id_that_has_no_binary_form(tmp_path: Path) -> None:
    write_bin(tmp_path / "in/x.bin", [[1, 2**40]])
    with pytest.raises(DataError, match=r"out/x\.tokens: cannot be written as binary tokens \(token 1099511627776 has"):
        list(convert_folder(tmp_path / "in", tmp_path / "out", "binary", ["json"], 1))
    assert np.iinfo(np.int32).max < 2**40
