"""Token files in an object store: copies, their limit, damage, and several processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs

from internlm.config.schema import DataConfig
from internlm.core.parallel.sharding import ALONE
from internlm.data import remote_folder
from internlm.data.build import build_train_loader
from internlm.data.fingerprint import same_data
from internlm.data.remote_folder import RemoteFolder
from internlm.data.tokenized_source import TokenizedSource
from internlm.utils.errors import DataError
from tests.harness.object_server import BUCKET, SECRET, Fault, ObjectServer, environment, object_server
from tests.unit.data.files import write_bin

ADDRESS = f"s3://{BUCKET}/data/train"
GIB = 1 << 30


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectServer]:
    remote_folder._file_system.cache_clear()  # a client of another server
    with object_server() as server:
        yield server
    remote_folder._file_system.cache_clear()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The files that the store has too: three of about 700 bytes, and their lists."""
    for name in ("cn/x", "en/y", "en/z"):
        write_bin(tmp_path / f"local/{name}.bin", [[len(name)] * 99, [ord(name[-1])] * 99])
    return tmp_path / "local"


@pytest.fixture
def server(running: ObjectServer, local: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    running.faults = []
    for name, value in environment(running.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    upload(running, local)
    running.requests = []
    return running


def upload(server: ObjectServer, local: Path) -> None:
    for path in local.rglob("*.bin*"):
        put(server, path.relative_to(local).as_posix(), path.read_bytes())


def put(server: ObjectServer, name: str, content: bytes) -> None:
    client(server.direct).pipe_file(f"{BUCKET}/data/train/{name}", content)


@functools.cache
def client(endpoint: str) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(key="key", secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)


def opened(tmp_path: Path, limit: int = GIB) -> TokenizedSource:
    remote = RemoteFolder(ADDRESS, tmp_path / "cache", limit)
    return TokenizedSource(str(remote.folder), 0, 200, remote=remote)


def all_samples(source: TokenizedSource) -> list[list[int]]:
    return [source.read(sample).tolist() for sample in range(len(source.lengths))]


def downloads(server: ObjectServer) -> list[str]:
    """Names of the data files that were read, in order."""
    gets = (request.partition("?")[0] for request in server.requests if request.startswith("GET"))
    return [name.rpartition("data/train/")[2] for name in gets if name.endswith(".bin")]


def test_files_are_copied_once_and_are_the_same_data(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    source, expected = opened(tmp_path), TokenizedSource(str(local), 0, 200)
    assert all_samples(source) == all_samples(expected)
    assert (source.types, source.fingerprint()) == (["cn", "en"], expected.fingerprint())
    assert all_samples(opened(tmp_path)) == all_samples(source)  # a later run
    assert sorted(downloads(server)) == ["cn/x.bin", "en/y.bin", "en/z.bin"]


def test_a_run_reads_an_address(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    sizes = dict(seq_len=32, micro_bsz=1, total_steps=3, num_worker=0)
    remote = DataConfig(**sizes, train_folder=ADDRESS, cache_folder=f"local:{tmp_path}/cache")
    loaders = [
        build_train_loader(data, 200, 1, ALONE)[0] for data in (remote, DataConfig(**sizes, train_folder=str(local)))
    ]
    assert same_data(loaders[0].fingerprint(), loaders[1].fingerprint())
    assert [[x.tolist() for x in (b["input_ids"], labels)] for b, labels in loaders[0]] == [
        [x.tolist() for x in (b["input_ids"], labels)] for b, labels in loaders[1]
    ]


def test_copies_stay_within_the_limit(
    server: ObjectServer, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm.data.tokenized_source.OPEN_FILES", 1)
    largest, expected = 2000, all_samples(TokenizedSource(str(local), 0, 200))  # two files of 818 bytes and a list
    source = opened(tmp_path, largest)
    for sample in (0, 3, 4, 1, 5, 2):
        assert source.read(sample).tolist() == expected[sample]
        held = list((tmp_path / "cache/copies").rglob("*.bin*"))
        assert sum(path.stat().st_size for path in held) <= largest
        assert source.index.files[sample // 2].path in held  # the last one that was read
    assert len(downloads(server)) > 3


def test_a_damaged_copy_is_made_again(server: ObjectServer, tmp_path: Path) -> None:
    source = opened(tmp_path)
    expected = all_samples(source)
    for path in (tmp_path / "cache/copies").rglob("*.bin"):
        before = path.stat()
        path.write_bytes(path.read_bytes().replace(b"1", b"2"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert all_samples(opened(tmp_path)) == expected
    server.requests = []
    assert all_samples(opened(tmp_path)) == expected
    assert downloads(server) == []


def test_a_changed_object_is_named(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    before = opened(tmp_path)
    for path in (tmp_path / "cache/copies").rglob("z.bin"):
        path.unlink()
    put(server, "en/z.bin", (local / "en/z.bin").read_bytes().replace(b"122", b"123"))
    with pytest.raises(DataError, match=rf"{ADDRESS}/en/z\.bin:1 .*: .*/en/z\.bin has changed since it was listed"):
        before.read(4)
    after = opened(tmp_path)
    assert after.read(5).tolist() == [123] * 99
    assert not same_data(before.fingerprint(), after.fingerprint())


def test_several_may_copy_at_once(server: ObjectServer, tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: all_samples(opened(tmp_path)), range(6)))
    assert all(samples == found[0] for samples in found)
    assert sorted(downloads(server)) == ["cn/x.bin", "en/y.bin", "en/z.bin"]


def test_what_a_killed_process_left_is_removed_when_room_is_needed(server: ObjectServer, tmp_path: Path) -> None:
    remote = RemoteFolder(ADDRESS, tmp_path / "cache", 4000)
    left = remote.folder / "x.bin.0.partial"
    left.write_bytes(bytes(3900))
    TokenizedSource(str(remote.folder), 0, 200, remote=remote)
    assert not left.exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            Fault(r"GET /bucket/data/train/en/z\.bin(\?|$)", "status", 99, 403, "AccessDenied"),
            "en/z.bin cannot be read",
        ),
        (Fault("list-type", "status", 99, 403, "AccessDenied"), "data/train: cannot be listed"),
    ],
)
def test_a_refusal_is_one_line(server: ObjectServer, tmp_path: Path, fault: Fault, said: str) -> None:
    server.faults = [fault]
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "cache/copies").rglob("*.partial"))


def test_a_failure_that_passes_is_not_noticed(server: ObjectServer, tmp_path: Path) -> None:
    server.faults = [Fault(r"GET .*\.bin", "status", 2, 503), Fault(r"GET .*\.bin", "truncated", 1)]
    assert len(all_samples(opened(tmp_path))) == 6


def test_a_name_that_leads_out_of_the_folder_is_refused(server: ObjectServer, tmp_path: Path) -> None:
    remote = RemoteFolder(ADDRESS, tmp_path / "cache", GIB)
    remote.list = lambda: {"../../x.bin": remote_folder.Stamp(1, 0, 0)}  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"the path '\.\./\.\./x\.bin' has an empty part, '\.' or '\.\.'"):
        TokenizedSource(str(remote.folder), 0, 200, remote=remote)


def test_an_unknown_protocol(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing://x: cannot be opened \(.*\)\. Use s3://BUCKET/FOLDER, or another"):
        RemoteFolder("nothing://x", tmp_path, GIB)
