"""The stop file, whatever it holds, and the launcher of a rank."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm.train.hooks import stop_sources
from internlm.train.hooks.stop_sources import LauncherPatience, StopFile
from internlm.utils.stop_requests import Request

STOP, SAVE = Request.STOP_FILE, Request.SAVE_BY_FILE


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.setattr(stop_sources.log, "propagate", True)
    caplog.set_level(logging.WARNING, "internlm")
    return lambda: [record.getMessage() for record in caplog.records]


def requests(file: StopFile, steps: int = 6) -> dict[int, Request]:
    """Requests of steps 1 to ``steps``."""
    found = {step: file.due(step) for step in range(1, steps + 1)}
    return {step: request for step, request in found.items() if request}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("4", {4: STOP}), ("-4", {4: SAVE}), (" 4\n", {4: STOP}), ("+4", {4: STOP}), ("004", {4: STOP}),
        ("1", {1: STOP}), ("0", {}), ("-0", {}), ("7", {}),
    ],
)  # fmt: skip
def test_a_step_number(
    content: str, expected: dict[int, Request], tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    path = tmp_path / "stop"
    path.write_text(content)
    assert requests(StopFile(str(path))) == requests(StopFile(f"local:{path}")) == expected
    assert warnings() == []


def test_a_missing_file_is_no_request(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    assert requests(StopFile(str(tmp_path / "no folder" / "stop"))) == {}
    assert warnings() == []


#: Contents that are no step number, with the warning.
ROWS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds nothing, expected a step number N (save and stop) or -N (save and go on)"),
    "blank": (b"\n", "holds '\\n', expected a step number N"),
    "half-written": (b"-", "holds '-', expected"),
    "garbage": (b"stop", "holds 'stop', expected"),
    "binary": (b"\xff\x00", "holds '\\ufffd\\x00', expected"),
    "two numbers": (b"1 2", "holds '1 2', expected"),
    "a fraction": (b"3.5", "holds '3.5', expected"),
    "other digits": ("٣".encode(), "holds '\\u0663', expected"),
    "too many digits": (b"9" * 30, "holds '999999999999999999999999999999', expected"),
    "huge": (b"3" * 10_000_000, "has 10000000 bytes, expected a step number"),
}


@pytest.mark.parametrize("row", ROWS)
def test_other_contents_are_ignored_with_one_warning(
    row: str, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    content, expected = ROWS[row]
    path = tmp_path / "stop"
    path.write_bytes(content)
    assert requests(StopFile(str(path))) == {}
    (line,) = warnings()
    assert line.startswith(f"ckpt.stop_file_path: {path} {expected}")
    assert line.endswith(". It is ignored, and training goes on")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "FIFO"])
def test_what_is_not_a_file_is_ignored_with_one_warning(
    make: Callable[[Path], None], tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    path = tmp_path / "stop"
    make(path)
    assert requests(StopFile(str(path))) == {}
    assert warnings() == [f"ckpt.stop_file_path: {path} is not a file. It is ignored, and training goes on"]


@pytest.mark.parametrize(
    ("path", "why"), [("loop", "Too many levels"), ("file/stop", "Not a directory"), ("x\0", "embedded null")]
)
def test_what_cannot_be_read_is_ignored_with_one_warning(
    path: str, why: str, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("3")
    assert requests(StopFile(str(tmp_path / path))) == {}
    (line,) = warnings()
    assert f"cannot be read ({why}" in line


def test_a_file_that_appears_changes_and_vanishes_is_followed(
    tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    path = tmp_path / "stop"
    file = StopFile(str(path))
    assert file.due(1) is None
    path.write_text("-2")
    assert file.due(2) is SAVE
    path.write_text("-9")
    assert file.due(3) is None
    path.write_text("-4")  # of the same size, in the same tick of the file system's clock
    assert file.due(4) is SAVE
    path.unlink()
    assert file.due(5) is None
    path.write_text("what")
    assert file.due(6) is None
    path.write_text("7")
    assert file.due(7) is STOP
    assert len(warnings()) == 1


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stop"
    path.write_text("8")
    monkeypatch.setattr(stop_sources, "SETTLED_SECONDS", 0.05)
    file = StopFile(str(path))
    assert file.due(1) is None
    time.sleep(0.1)
    monkeypatch.setattr(os, "open", None)
    assert file.due(2) is None
    assert file.due(8) is STOP


def test_a_step_that_has_passed_is_warned_about_once(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    """As after a resume, where the file still holds the step at which the run was stopped."""
    path = tmp_path / "stop"
    path.write_text("-3")
    file = StopFile(str(path))
    assert [file.due(step) for step in (5, 6, 7)] == [None] * 3
    assert warnings() == [
        f"ckpt.stop_file_path: {path} asks for step 3, but step 5 is the earliest that is left. It is ignored, and "
        "training goes on"
    ]


# -- the launcher


def test_a_step_near_the_launchers_patience_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    times = iter([0.0, 19.9, 41.0, 90.0])
    monkeypatch.setattr(stop_sources, "monotonic", lambda: next(times))
    patience = LauncherPatience({"TORCHELASTIC_RUN_ID": "x"})
    for _ in range(4):
        patience.note_step()
    (line,) = warnings()
    assert line.startswith(
        "a step with its save took 21.1 s, and the launcher kills ranks 30 s after a signal, unless "
    )


@pytest.mark.parametrize(("text", "seconds"), [("120", 120), ("", 30), ("soon", 30)])
def test_the_launchers_patience_is_read_from_the_environment(text: str, seconds: float) -> None:
    assert LauncherPatience({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": text}).seconds == seconds
