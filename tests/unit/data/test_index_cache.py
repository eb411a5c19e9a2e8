"""The cached index: damage, other users' files, and several processes."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data import index_cache
from internlm.data.index_cache import CachedIndex, IndexCache
from internlm.data.tokenized_source import TokenizedSource
from tests.unit.data.files import write_bin

INDEX = CachedIndex(
    {"level": "stat", "numbers": [1, 2]}, {"a": np.arange(9), "b": np.empty(0, np.int64), "c": np.arange(3, dtype="u4")}
)


def stored(folder: Path) -> IndexCache:
    cache = IndexCache(folder / "index", folder)
    assert cache.store("key", INDEX)
    return cache


def test_an_index_is_read_as_it_was_stored(tmp_path: Path) -> None:
    loaded = stored(tmp_path).load("key")
    assert loaded is not None
    assert loaded.header["numbers"] == [1, 2]
    assert {name: column.tolist() for name, column in loaded.columns.items()} == {
        "a": list(range(9)),
        "b": [],
        "c": [0, 1, 2],
    }
    assert loaded.columns["c"].dtype == np.uint32
    assert all(column.ctypes.data % 4 == 0 for column in loaded.columns.values())
    assert IndexCache(tmp_path / "index", tmp_path).load("other key") is None


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[IndexCache, Path, bytes]:
    folder = tmp_path_factory.mktemp("cache")
    return stored(folder), folder / "index", (folder / "index").read_bytes()


@given(data=st.data())
def test_any_damage_makes_it_no_index(image: tuple[IndexCache, Path, bytes], data: st.DataObject) -> None:
    cache, path, content = image
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = content[at] ^ data.draw(st.integers(1, 255))
    path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
    assert cache.load("key") is None
    path.write_bytes(content[:at])
    assert cache.load("key") is None
    path.write_bytes(content)
    assert cache.load("key") is not None


def of_another_user(path: Path) -> None:
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (lambda folder: of_another_user(folder / "index"), "it belongs to the user with id 12345"),
        (lambda folder: of_another_user(folder), "its folder belongs to the user with id 12345"),
        (lambda folder: (folder / "index").chmod(0o646), "other users can write to it"),
        (lambda folder: (folder / "index").chmod(0o664), "other users can write to it"),
        (lambda folder: folder.chmod(0o777), "other users can write to its folder"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_planted_index_is_ignored_with_one_warning(
    tmp_path: Path, plant: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shm"
    folder.mkdir()
    stored(folder)
    plant(folder)
    cache = IndexCache(folder / "index", tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        assert cache.load("key") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"the cached data index {folder}/index is not used: {reason}. Set data.shm_path to a folder of your own, "
        "or remove it"
    ]


def test_a_sticky_folder_of_all_users_is_trusted(tmp_path: Path) -> None:
    cache = stored(tmp_path)
    tmp_path.chmod(0o1777)
    assert cache.load("key") is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_an_index_of_the_owner_of_the_data_is_trusted(tmp_path: Path) -> None:
    stored(tmp_path)
    for path in (tmp_path, tmp_path / "index"):
        of_another_user(path)
    assert IndexCache(tmp_path / "index", tmp_path).load("key") is not None


def test_links_and_pipes_are_no_index(tmp_path: Path) -> None:
    stored(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "index")
    os.mkfifo(tmp_path / "pipe")  # whose opening would wait for a writer
    assert all(IndexCache(tmp_path / name, tmp_path).load("key") is None for name in ("link", "pipe"))


# -- several processes


def test_one_builds_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    from internlm.data import index

    build = index._build
    monkeypatch.setattr(index, "_build", lambda *arguments: (built.append(1), build(*arguments))[1])
    write_bin(tmp_path / "x.bin", [[1, 2, 3]])
    with ThreadPoolExecutor(8) as pool:
        sources = list(pool.map(lambda _: TokenizedSource(str(tmp_path), 0, 100), range(8)))
    assert [source.read(0).tolist() for source in sources] == [[1, 2, 3]] * 8
    assert built == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".internlm_index", "x.bin", "x.bin.meta"]


def test_a_process_that_never_finishes_is_waited_for_no_longer_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "LONGEST_WAIT", 0.2)
    write_bin(tmp_path / "x.bin", [[1, 2, 3]])
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert TokenizedSource(str(tmp_path), 0, 100).read(0).tolist() == [1, 2, 3]
    finally:
        os.close(held)
