"""Checks of a save folder at the start: shared by all ranks, and with enough space."""

from __future__ import annotations

import errno
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from internlm.checkpoint import folder_checks
from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.folder_checks import check_shared, check_space, explain, format_size, on_first_rank
from internlm.checkpoint.local_storage import LocalStorage
from internlm.utils.errors import CheckpointError, Problem
from tests.harness.pool import run_ranks


def share(rank: int, world_size: int, folders: list[str]) -> tuple[str, list[str]]:
    """Check the folder of this rank; return the error and the names in the folder afterwards."""
    storage, text = LocalStorage(folders[rank]), ""
    visible, folder_checks._VISIBLE_SECONDS = folder_checks._VISIBLE_SECONDS, 0.3
    try:
        check_shared(storage, Exchange())
    except CheckpointError as error:
        text = str(error)
    finally:
        folder_checks._VISIBLE_SECONDS = visible
    dist.barrier()  # until rank 0 has removed its file
    return text, storage.names() if os.path.isdir(storage.root) else []


def test_a_folder_that_all_ranks_share_passes_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("")
    assert run_ranks(3, share, [str(tmp_path)] * 3) == [("", ["note"])] * 3


def test_ranks_that_see_another_folder_are_named_on_all_ranks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shared, own, missing = str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")
    host = os.uname().nodename
    errors = {error for error, _ in run_ranks(3, share, [shared, shared, own])}
    (error,) = errors
    assert error.startswith(
        f"{shared}: not all ranks see what rank 0 writes there (ranks 0-1: on host {host}; rank 2: not on host {host}; "
        f"rank 2: {own}/.shared.partial-"
    )
    assert error.endswith(": does not exist). Choose a folder that all hosts share")
    (error,) = {error for error, _ in run_ranks(3, share, [shared, missing, own])}
    assert f"(rank 0: on host {host}; ranks 1-2: not on host {host}; rank 1: {missing}" in error
    assert os.listdir(shared) == os.listdir(own) == []


def test_a_folder_that_rank_0_cannot_write_to_is_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    errors = {error for error, _ in run_ranks(3, share, [f"{tmp_path}/file", f"{tmp_path}/a", f"{tmp_path}/b"])}
    assert errors == {f"{tmp_path}/file: is not a folder, or is below a file. Choose a writable folder"}


def test_too_little_space_is_told_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: 300_000_000)
    check_space(storage, 300_000_000)
    with pytest.raises(CheckpointError) as caught:
        check_space(storage, 1_200_000_000)
    expected = f"No space: need 1.2 GB, 300.0 MB free at {tmp_path}. Free some, or choose another ckpt.save_ckpt_folder"
    assert str(caught.value) == expected
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: None)
    check_space(storage, 1 << 60)


def test_real_space_is_enough_for_little_and_not_for_everything(tmp_path: Path) -> None:
    check_space(LocalStorage(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"need 1152921.5 TB, \d+\.\d [TGM]B free"):
        check_space(LocalStorage(tmp_path), 1 << 60)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 kB"), (999_949, "999.9 kB"), (1_000_000, "1.0 MB"), (1.25e9, "1.2 GB"), (2e12, "2.0 TB")],
)
def test_sizes_have_a_readable_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EFBIG, "larger than the limit for files (ulimit -f)"),
        (errno.EBUSY, os.strerror(errno.EBUSY)),
    ],
)
def test_errors_of_the_system_are_explained(code: int, words: str) -> None:
    assert explain(OSError(code, os.strerror(code), "/data/x")) == f"/data/x: {words}"
    assert explain(OSError(code, os.strerror(code))) == words
    assert (
        explain(OSError(code, "expected at most 3 bytes, got 4", "/data/x"))
        == "/data/x: expected at most 3 bytes, got 4"
    )
    assert explain(OSError("odd")) == "odd"


def act(rank: int, world_size: int) -> tuple[str, str, float]:
    """Return the result and the error of two actions of rank 0, and the seconds that they took."""
    begin, timeout, exchange = time.monotonic(), 2.0, Exchange()
    exchange.timeout = timedelta(seconds=timeout)
    exchange.separate()

    def succeed() -> str:
        time.sleep(1.5 * timeout)
        return f"of rank {dist.get_rank()}"

    def fail() -> str:
        raise CheckpointError(Problem("ckpts", "owned by a live run", "Choose another"))

    result = on_first_rank(succeed, exchange)
    try:
        on_first_rank(fail, exchange)
    except CheckpointError as error:
        return result, str(error), time.monotonic() - begin
    return result, "", 0.0


def test_ranks_wait_for_rank_0_longer_than_their_timeout() -> None:
    """The lease of a run on another host is watched for up to 68 s, for example."""
    for result, error, seconds in run_ranks(2, act):
        assert (result, error) == ("of rank 0", "ckpts: owned by a live run. Choose another")
        assert seconds > 3
