"""Where the metrics of a step are written."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import pty
import resource
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internlm.monitor.console import LogLine, is_terminal
from internlm.monitor.metrics import MetricsWriter, open_writers
from internlm.monitor.record_files import JsonLines, Metrics, TensorBoard
from internlm.utils.logger import get_logger

METRICS = {"step": 3, "loss": 2.5, "acc/en": 0.1}


class Recorder:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self.written: list[tuple[int, Metrics]] = []
        self.closed = 0

    def write(self, step: int, metrics: Metrics) -> None:
        self.written.append((step, metrics))

    def close(self) -> None:
        self.closed += 1


class Failing(Recorder):
    """Fails in some steps, with any exception."""

    def __init__(self, steps: Container[int], error: Exception) -> None:
        super().__init__()
        self.steps, self.error = steps, error

    def write(self, step: int, metrics: Metrics) -> None:
        if step in self.steps:
            raise self.error
        super().write(step, metrics)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Capture the framework's log, even where its logger has a handler of its own."""
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="internlm")
    return caplog


def jsons(path: Path) -> list[dict[str, object]]:
    """Parse the lines of a file; NaN and Infinity, which JSON lacks, are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write(3, METRICS)
    assert jsons(path) == [METRICS], "a line is in the file as soon as it is written"
    writer.write(4, {"loss": math.nan, "grad_norm": math.inf, "x": -math.inf})
    writer.close()
    assert jsons(path)[1] == {"loss": "nan", "grad_norm": "inf", "x": "-inf"}


def test_json_lines_of_a_resumed_run_follow_the_old_ones(tmp_path: Path) -> None:
    for step in range(2):
        writer = JsonLines(tmp_path / "metrics.jsonl")
        writer.write(step, {"step": step})
        writer.close()
    assert jsons(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]


def test_tensorboard(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, queue=10)
    writer.write(3, METRICS)
    writer.write(4, {**METRICS, "loss": math.inf})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5), (4, math.inf)]


def test_a_resumed_run_replaces_the_steps_that_it_trains_again(tmp_path: Path) -> None:
    for first_step, loss in ((0, 1.0), (2, 5.0)):
        writer = TensorBoard(tmp_path, queue=10, first_step=first_step)
        for step in range(first_step, 4):
            writer.write(step, {"loss": loss})
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 1.0), (2, 5.0), (3, 5.0)]


def test_the_log_line(log: pytest.LogCaptureFixture) -> None:
    LogLine().write(3, {"step": 3, "loss": 2.123456789, "lr": 1e-5, "grad_norm": math.nan, "tokens": 12345678})
    assert log.messages == ["step=3 loss=2.12346 lr=1e-05 grad_norm=nan tokens=12345678"]


def test_every_writer_gets_every_step_and_is_closed() -> None:
    first, second = Recorder(), Recorder()
    writer = MetricsWriter([first, second])
    writer.write(3, METRICS)
    writer.write(4, METRICS)
    writer.close()
    assert first.written == second.written == [(3, METRICS), (4, METRICS)]
    assert (first.closed, second.closed) == (1, 1)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("its thread is dead")])
def test_a_writer_that_fails_gives_one_warning_and_is_called_again(
    error: Exception, log: pytest.LogCaptureFixture
) -> None:
    bad, good = Failing((1, 2, 4, 6), error), Recorder()
    writer = MetricsWriter([bad, good])
    for step in range(8):
        writer.write(step, METRICS)
    assert [step for step, _ in bad.written] == [0, 3, 5, 7]
    assert len(good.written) == 8
    assert log.messages == [
        f"Failing cannot be written, and is tried again each time: {error}",
        "Failing can be written again; what it lacks is lost",
    ]


def test_a_file_that_is_closed_under_a_writer_does_no_harm(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    dead, good = JsonLines(tmp_path / "metrics.jsonl"), Recorder()
    dead.close()
    writer = MetricsWriter([dead, good])
    for step in range(3):
        writer.write(step, METRICS)
    writer.close()
    assert len(good.written) == 3
    (warning,) = log.messages
    assert warning.startswith("JsonLines cannot be written")
    assert warning.endswith("metrics.jsonl is closed")


# -- full disks


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """A function that limits the size of files, as a full disk does; the limit ends with the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_records_go_on_after_a_full_disk_and_none_of_them_is_torn(
    tmp_path: Path, log: pytest.LogCaptureFixture, limit: Callable[[int], None]
) -> None:
    writer = open_writers(tmp_path, tmp_path / "tb", tb_queue=1, total_steps=9, first_step=0)
    for step in range(3):
        writer.write(step, {**METRICS, "step": step})
    (events,) = (tmp_path / "tb").iterdir()
    files = [tmp_path / "metrics.jsonl", tmp_path / "train.log", events]
    sizes = [file.stat().st_size for file in files]
    # A few bytes of the next record would still fit.
    for file in files:
        with file.open("ab") as padded:
            padded.truncate(max(sizes))
    limit(max(sizes) + 10)
    for step in range(3, 6):
        writer.write(step, {**METRICS, "step": step})
    assert [file.stat().st_size for file in files] == [max(sizes)] * 3
    limit(resource.RLIM_INFINITY)
    for file, size in zip(files, sizes, strict=True):
        os.truncate(file, size)
    for step in range(6, 9):
        writer.write(step, {**METRICS, "step": step})
    writer.close()
    kept = [0, 1, 2, 6, 7, 8]
    assert [line["step"] for line in jsons(tmp_path / "metrics.jsonl")] == kept
    assert [event.step for event in EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("loss")] == kept
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition("step=")[2][0] for line in lines if "step=" in line] == [str(step) for step in kept]
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert sum("cannot be written, and is tried again each time" in text for text in warnings) == 3
    assert sum("can be written again" in text for text in warnings) == 3
    assert len(warnings) == 6


def test_a_full_device_under_json_lines(log: pytest.LogCaptureFixture) -> None:
    full, good = JsonLines(Path("/dev/full")), Recorder()
    writer = MetricsWriter([full, good])
    for step in range(3):
        writer.write(step, METRICS)
    writer.close()
    assert len(good.written) == 3
    (warning,) = [message for message in log.messages if "again each time" in message]
    assert warning.endswith("[Errno 28] No space left on device: '/dev/full'")


def test_records_go_on_in_new_files_after_their_folder_was_deleted(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "RUN" / "job"
    writer = open_writers(folder, folder / "tb", tb_queue=1, total_steps=4, first_step=0)
    writer.write(0, {"step": 0})
    shutil.rmtree(tmp_path / "RUN")
    for step in range(1, 4):
        writer.write(step, {"step": step})
    writer.close()
    assert [line["step"] for line in jsons(folder / "metrics.jsonl")] == [1, 2, 3]
    assert [event.step for event in EventAccumulator(str(folder / "tb")).Reload().Scalars("step")] == [1, 2, 3]
    assert "step=3" in (folder / "train.log").read_text()
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert all(text.endswith("was deleted and is created again") for text in warnings)


def test_a_fifo_that_nobody_reads_is_left_out(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    open_writers(tmp_path, None, tb_queue=10, total_steps=5, first_step=0).close()
    (warning,) = log.messages
    assert warning.startswith("a metrics file cannot be opened and is left out: ")


def test_a_run_writes_its_records(tmp_path: Path) -> None:
    writer = open_writers(tmp_path / "run", tmp_path / "tb", tb_queue=10, total_steps=5, first_step=0)
    writer.write(3, METRICS)
    writer.close()
    assert jsons(tmp_path / "run" / "metrics.jsonl") == [METRICS]
    assert list((tmp_path / "tb").iterdir())


def test_a_record_that_cannot_be_opened_is_left_out(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    writer = open_writers(tmp_path / "run", None, tb_queue=10, total_steps=5, first_step=0)
    writer.write(3, METRICS)
    assert [record.levelname for record in log.records] == ["WARNING", "WARNING", "INFO"]  # train.log, metrics.jsonl
    for message in log.messages[:2]:
        assert message.startswith("a metrics file cannot be opened and is left out: ")


# -- console ----------------------------------------------------------------------------------------------------------
#: Three steps of a run on two devices and a validation, with a line of the framework's log between them.
RUN = """
import sys
from pathlib import Path
from internlm.monitor import open_writers
from internlm.utils.logger import get_logger

writer = open_writers(Path(sys.argv[1]), None, tb_queue=10, total_steps=3, first_step=0, devices=2)
for step in range(3):
    rate = {"tgs (tokens/gpu/second)": 1000.0, "num_consumed_tokens": 64}
    writer.write(step, {"step": step, "loss": 2.5 - step, "lr": 1e-3, "grad_norm": 0.5, **rate})
    get_logger().warning("a rank is slow")
writer.write(2, {"step": 2, "valid/loss": 3.25, "valid/loss/en": 3.5})
writer.close()
get_logger().warning("after the run")
"""


def full_lines(text: str) -> int:
    return text.count("num_consumed_tokens=64")


def test_a_terminal_shows_a_bar_and_short_lines_while_the_log_file_has_the_full_ones(tmp_path: Path) -> None:
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while chunk := _read(reader):
        shown += chunk
    os.close(reader)
    assert process.wait() == 0
    lines = shown.decode().replace("\r\n", "\n").replace("\r", "\n").splitlines()
    (last,) = [line for line in lines if line.startswith("step 3/3  ")]
    assert last.startswith("step 3/3  loss 0.5000  grad norm 0.500  lr 1.00e-03  2,000 tokens/s  ")
    assert last.endswith("eta 00:00")
    assert " GiB  " in last
    assert "step 3  valid/loss 3.25" in lines
    assert any(line.startswith("100%|") and "3/3" in line for line in lines)
    assert sum(line.endswith("WARNING a rank is slow") for line in lines) == 3
    assert sum(line.endswith("WARNING after the run") for line in lines) == 1
    assert full_lines(shown.decode()) == 0
    log = (tmp_path / "train.log").read_text()
    assert full_lines(log) == 3
    assert log.count("WARNING a rank is slow") == 3
    assert len(jsons(tmp_path / "metrics.jsonl")) == 4


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux: the other end is closed
        return b""


def test_no_terminal_gets_the_full_line_of_every_step(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=True)
    assert full_lines(done.stderr) == 3
    assert done.stdout == ""
    assert "it/s" not in done.stderr
    assert "step 3/3" not in done.stderr
    assert full_lines((tmp_path / "train.log").read_text()) == 3


def test_a_full_disk_under_the_log_file_gives_one_warning(tmp_path: Path) -> None:
    (tmp_path / "train.log").symlink_to("/dev/full")
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr.count("cannot be written, and is tried again each time") == 1
    assert "Traceback" not in done.stderr
    assert full_lines(done.stderr) == 3


def test_a_script_logs_to_the_same_places() -> None:
    logger = get_logger("/home/user/train.py")
    assert logger is not get_logger()
    assert logger.getEffectiveLevel() == get_logger().getEffectiveLevel()
    parents = []
    while logger is not None:
        parents.append(logger)
        logger = logger.parent  # type: ignore[assignment]
    assert get_logger() in parents
    assert get_logger("internlm.data") is get_logger("data")


def test_a_stderr_that_is_full_and_then_closed_does_not_end_a_run(tmp_path: Path) -> None:
    code = f"{RUN}\nsys.stderr.close()\nget_logger().warning('to nobody')\n"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=full, stderr=full)
    assert done.returncode == 0
    log = (tmp_path / "train.log").read_text()
    assert full_lines(log) == 3
    assert log.count("WARNING a rank is slow") == 3
    assert log.count("stderr cannot be written, and is tried again each time: [Errno 28]") == 1
    assert len(jsons(tmp_path / "metrics.jsonl")) == 4


def test_a_process_without_stderr_has_a_logger_and_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no stream where the file descriptor is closed at its start."""
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(logging.getLogger("internlm"), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    get_logger().warning("to nobody")
    assert not is_terminal()
