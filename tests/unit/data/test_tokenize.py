"""Tokenizing text files, by the command itself."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from internlm.cli.main import get_parser, run
from internlm.data.text_encoder import make_recipe
from internlm.data.tokenized_source import TokenizedSource
from internlm.data.tokenized_writer import tokenize_samples
from internlm.data.tokenizer import load_tokenizer
from internlm.utils.errors import DataError, UserError

ROOT = Path(__file__).parents[3]
TEXTS = ["the quick brown fox", "  pack my box ", "über\u2028naïve café"]


def tokenize(*inputs: Path, out: Path, tokenizer: Path, more: tuple[str, ...] = ()) -> None:
    """Run ``internlm tokenize`` within this process."""
    command = ["tokenize", "--bin_output_path", str(out), "--tokenizer_path", str(tokenizer)]
    args = get_parser().parse_args([*command, "--text_input_path", *map(str, inputs), "--num_workers", "1", *more])
    run(args)


def samples(out: Path) -> list[list[int]]:
    source = TokenizedSource(str(out.parent), 0, 320)
    return [source.read(sample).tolist() for sample in range(len(source.lengths))]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def write_txt(folder: Path) -> Path:
    path = folder / "a.txt"
    path.write_text("\n".join([TEXTS[0], "", TEXTS[1], "  ", TEXTS[2]]), encoding="utf-8-sig")
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text, "id": 1}) for text in [*TEXTS, "", None]))
    return path


def write_json(folder: Path) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"id": [1, 2, 3, 4], "text": [*TEXTS, None]}), path, row_group_size=2)
    return path


# -- what is written


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_json, write_parquet])
def test_every_kind_of_file(write: Callable[[Path], Path], tmp_path: Path, sentencepiece_model: Path) -> None:
    out = tmp_path / "out/en/x.bin"
    tokenize(write(tmp_path), out=out, tokenizer=sentencepiece_model)
    tokenizer = load_tokenizer(str(sentencepiece_model))
    assert samples(out) == [[*tokenizer.encode(text), 2] for text in TEXTS]
    assert sorted(path.name for path in out.parent.glob("x*")) == ["x.bin", "x.bin.meta"]


def test_the_files_are_as_documented(tmp_path: Path, sentencepiece_model: Path) -> None:
    out = tmp_path / "x.bin"
    tokenize(write_txt(tmp_path), out=out, tokenizer=sentencepiece_model)
    meta = np.load(f"{out}.meta")
    assert (meta.dtype, meta.shape) == (np.int64, (3, 2))
    with out.open("rb") as stream:
        for offset, count in meta:
            assert stream.tell() == offset
            assert len(json.loads(stream.readline())["tokens"]) == count


@pytest.mark.parametrize(
    ("more", "before", "after"),
    [((), [], [1]), (("--bos",), [0], [1]), (("--no-eos",), [], []), (("--bos", "--no-eos"), [0], [])],
)
def test_bos_and_eos(
    more: tuple[str, ...], before: list[int], after: list[int], tmp_path: Path, hugging_face_folder: Path
) -> None:
    tokenize(write_txt(tmp_path), out=tmp_path / "x.bin", tokenizer=hugging_face_folder, more=more)
    encode = load_tokenizer(str(hugging_face_folder)).encode
    assert samples(tmp_path / "x.bin") == [[*before, *encode(text), *after] for text in TEXTS]


def test_an_eos_token_is_used_where_there_is_one(tmp_path: Path, hugging_face_folder: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((hugging_face_folder / "tokenizer.json").read_bytes())
    tokenize(write_txt(tmp_path), out=tmp_path / "x.bin", tokenizer=bare)
    assert samples(tmp_path / "x.bin") == [load_tokenizer(str(bare)).encode(text) for text in TEXTS]
    with pytest.raises(DataError, match=r"bare: tokenizer has no eos token\. Omit --eos"):
        tokenize(write_txt(tmp_path), out=tmp_path / "x.bin", tokenizer=bare, more=("--eos", "--overwrite"))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path, sentencepiece_model: Path) -> None:
    for name, text in (("b.txt", "fox"), ("a/z.jsonl", '{"body": "dog"}'), ("c.md", "left out"), ("a/y.txt", "box")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    out = tmp_path / "out/x.bin"
    more = ("--text_key", "body", "--no-eos")
    tokenize(tmp_path / "in", tmp_path / "in/b.txt", out=out, tokenizer=sentencepiece_model, more=more)
    tokenizer = load_tokenizer(str(sentencepiece_model))
    assert [tokenizer.decode(ids) for ids in samples(out)] == ["box", "dog", "fox", "fox"]


def test_a_whole_file_may_be_a_sample(tmp_path: Path, sentencepiece_model: Path) -> None:
    out = tmp_path / "x.bin"
    tokenize(write_txt(tmp_path), out=out, tokenizer=sentencepiece_model, more=("--whole_file", "--no-eos"))
    text = "\n".join([TEXTS[0], "", TEXTS[1], "  ", TEXTS[2]])
    assert samples(out) == [load_tokenizer(str(sentencepiece_model)).encode(text)]


def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm.data.tokenized_writer.CHUNK_CHARACTERS", 500)
    (tmp_path / "a.txt").write_text("".join(f"{'box ' * (i % 7)}{i}\n" for i in range(1000)))
    for workers in (1, 2):
        out = tmp_path / f"{workers}/x.bin"
        tokenize(tmp_path / "a.txt", out=out, tokenizer=sentencepiece_model, more=("--num_workers", str(workers)))
    for name in ("x.bin", "x.bin.meta"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert len(samples(tmp_path / "2/x.bin")) == 1000


# -- what can be wrong


def error_of(path: Path, tokenizer: Path, *more: str) -> str:
    with pytest.raises(DataError) as caught:
        tokenize(path, out=path.parent / "out/x.bin", tokenizer=tokenizer, more=more)
    assert not list(path.parent.glob("out/*"))
    return str(caught.value)


def test_the_text_key_is_absent(tmp_path: Path, sentencepiece_model: Path) -> None:
    wrong = ("--text_key", "body")
    for write, where, keys in (
        (write_jsonl, ":1", "'text', 'id'"),
        (write_json, ", record 0", "'text'"),
        (write_parquet, "", "'id', 'text'"),
    ):
        path = write(tmp_path)
        said = f"{path}{where}: has no key 'body', only {keys}. Pass the key of the text as --text_key"
        assert error_of(path, sentencepiece_model, *wrong) == said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": "not', ":2: is not valid JSON"),
        ("a.jsonl", b'{"text": "ok"}\n["text"]', ":2: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "ok"}\n{}', ":2: has no key 'text', nor any other. Remove the empty record"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": 3}', ":2: expected a string at key 'text', got int"),
        ("a.json", b'{"text": "ok"}\n{"text": "ok"}', "is not valid JSON (Extra data"),
        ("a.json", b'[{"text": "ok"}, 3]', ", record 1: expected a JSON object, got int"),
        ("a.txt", b"ok\n\xff\xff\n", ":2: is not valid UTF-8 (invalid start byte)"),
        ("a.txt", b"\n  \n", "--text_input_path: contains no text to tokenize"),
        ("a.parquet", b"ok", "is not a complete parquet file (Parquet file size is 2 bytes"),
        ("a.parquet", b"PAR1" + bytes(20) + b"PAR1", "is not a complete parquet file"),
        ("a.arrow", b"ok", "is not a complete arrow file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz: is not a complete gz file"),
        ("a.jsonl.gz", b"ok", "a.jsonl.gz: is not a complete gz file (Not a gzipped file"),
        ("a.txt.zst", zstd(b"ok\n" * 99)[:-1], "a.txt.zst: is not a complete zst file"),
        ("a.txt.zst", b"ok", "a.txt.zst: is not a complete zst file"),
        ("a.pdf", b"ok", "a.pdf: file type '.pdf' is not supported (supported: .txt[.gz|.zst], .jsonl"),
        ("a.parquet.gz", b"ok", "a.parquet.gz: file type '.gz' is not supported"),
    ],
)
def test_a_bad_file(name: str, content: bytes, said: str, tmp_path: Path, sentencepiece_model: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert said in error_of(path, sentencepiece_model)


def test_a_column_that_isnt_text(tmp_path: Path, sentencepiece_model: Path) -> None:
    assert "expected strings in column 'id', got int64" in error_of(
        write_parquet(tmp_path), sentencepiece_model, "--text_key", "id"
    )


def test_nothing_to_read(tmp_path: Path, sentencepiece_model: Path) -> None:
    assert "no such file or folder" in error_of(tmp_path / "none", sentencepiece_model)
    (tmp_path / "empty").mkdir()
    assert "contains no text file" in error_of(tmp_path / "empty", sentencepiece_model)


def test_a_bad_output(tmp_path: Path, sentencepiece_model: Path) -> None:
    with pytest.raises(DataError, match=r"x: expected suffix '\.bin', got ''\. Rename the output to x\.bin$"):
        tokenize(write_txt(tmp_path), out=tmp_path / "x", tokenizer=sentencepiece_model)
    with pytest.raises(DataError, match=r"a\.txt/x\.bin: cannot be written \(.*\)\. Choose a writable folder"):
        tokenize(write_txt(tmp_path), out=tmp_path / "a.txt/x.bin", tokenizer=sentencepiece_model)


def test_a_failure_leaves_what_was_there(tmp_path: Path, sentencepiece_model: Path) -> None:
    out = tmp_path / "out/x.bin"
    tokenize(write_txt(tmp_path), out=out, tokenizer=sentencepiece_model)
    before = samples(out)
    (tmp_path / "b.jsonl").write_text('{"text": "ok"}\n{"text": 3}')
    with pytest.raises(DataError):
        tokenize(tmp_path / "b.jsonl", out=out, tokenizer=sentencepiece_model, more=("--overwrite",))
    assert samples(out) == before
    (tmp_path / "b.jsonl").write_text('{"text": "ok"}')
    tokenize(tmp_path / "b.jsonl", out=out, tokenizer=sentencepiece_model, more=("--overwrite",))
    assert len(samples(out)) == 1
    assert sorted(path.name for path in out.parent.glob("x*")) == ["x.bin", "x.bin.meta"]


def test_a_worker_that_dies_ends_the_command(
    tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm.data.tokenized_writer.CHUNK_CHARACTERS", 10)

    def texts() -> Iterator[tuple[str, str]]:
        for _ in range(1000):
            for worker in multiprocessing.active_children():
                worker.kill()
            yield "", "pack my box"

    with pytest.raises(UserError, match=r"--num_workers: a worker process died, possibly for .* Pass fewer than 2"):
        tokenize_samples(texts(), [tmp_path / "x.bin"], make_recipe(str(sentencepiece_model)), workers=2)
    assert not list(tmp_path.glob("*"))


ENDLESS = """
import itertools, sys
from pathlib import Path
from internlm.data.text_encoder import make_recipe
from internlm.data.tokenized_writer import tokenize_samples

def samples():
    for index in itertools.count():
        yield "", "pack my box " * 50_000
        print("started", flush=True)

if __name__ == "__main__":
    tokenize_samples(samples(), [Path(sys.argv[1])], make_recipe(sys.argv[2]), workers=2)
"""


def test_no_worker_outlives_a_command_that_is_killed(tmp_path: Path, sentencepiece_model: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    command = [sys.executable, str(script), str(tmp_path / "x.bin"), str(sentencepiece_model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(workers := children.read_text().split()) < 3:  # two workers and the tracker of resources
            time.sleep(0.01)
        process.kill()
    limit = time.monotonic() + 60
    while any(is_running(int(worker)) for worker in workers):
        assert time.monotonic() < limit, "workers are left behind"
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_files_that_exist_are_replaced_only_on_request(tmp_path: Path, sentencepiece_model: Path) -> None:
    out = tmp_path / "x.bin"
    tokenize(write_txt(tmp_path), out=out, tokenizer=sentencepiece_model)
    before, meta = samples(out), Path(f"{out}.meta")
    (tmp_path / "b.txt").write_text("fox")
    todo = r"Choose another --bin_output_path, or pass --overwrite to replace it"
    with pytest.raises(DataError) as caught:
        tokenize(tmp_path / "b.txt", out=out, tokenizer=sentencepiece_model)
    assert [str(problem) for problem in caught.value.problems] == [f"{path}: exists. {todo}" for path in (out, meta)]
    assert samples(out) == before
    meta.unlink()
    with pytest.raises(DataError, match=r"x\.bin: exists\. Choose"):
        tokenize(tmp_path / "b.txt", out=out, tokenizer=sentencepiece_model)
    tokenize(tmp_path / "b.txt", out=out, tokenizer=sentencepiece_model, more=("--overwrite",))
    assert len(samples(out)) == 1
    both = ("--split-ratio", "0.5")
    tokenize(write_txt(tmp_path), out=out, tokenizer=sentencepiece_model, more=both)
    with pytest.raises(DataError, match=rf"^{tmp_path}/train/x\.bin: exists\. .*\n.*\n.*/valid/x\.bin: exists\. "):
        tokenize(write_txt(tmp_path), out=out, tokenizer=sentencepiece_model, more=both)


# -- the script


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/tokenizer.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_script(tmp_path: Path, sentencepiece_model: Path) -> None:
    arguments = ["--bin_output_path", str(tmp_path / "x.bin"), "--tokenizer_path", str(sentencepiece_model)]
    (tmp_path / "x.bin").write_text("of an earlier call")  # which the script replaces
    done = run_script("--text_input_path", str(write_txt(tmp_path)), *arguments, "--num_workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/x.bin: 3 samples, {sum(map(len, samples(tmp_path / 'x.bin')))} tokens, ")

    failed = run_script("--text_input_path", str(tmp_path / "none"), *arguments)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(f"{tmp_path}/none: no such file or folder. Pass existing files ")
