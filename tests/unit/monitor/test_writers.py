"""Where the figures of a step go."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internlm.monitor.metrics import Figures, JsonLines, LogLine, MetricsWriter, TensorBoard, open_writers

FIGURES = {"step": 3, "loss": 2.5, "acc/en": 0.1}


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.written: list[tuple[int, Figures]] = []
        self.closed = 0

    def write(self, step: int, figures: Figures) -> None:
        self.written.append((step, figures))

    def close(self) -> None:
        self.closed += 1


class FullDisk(Recorder):
    """Fails from the second step on."""

    def write(self, step: int, figures: Figures) -> None:
        super().write(step, figures)
        if len(self.written) > 1:
            raise OSError(28, "No space left on device")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the framework logs, also where it has a handler of its own."""
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="internlm")
    return caplog


def jsons(path: Path) -> list[dict[str, object]]:
    """The lines of a file; what JSON doesn't know is an error."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write(3, FIGURES)
    assert jsons(path) == [FIGURES], "a line is in the file as soon as it is written"
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
    writer.write(3, FIGURES)
    writer.write(4, {**FIGURES, "loss": math.inf})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(FIGURES)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5), (4, math.inf)]


def test_the_log_line(log: pytest.LogCaptureFixture) -> None:
    LogLine().write(3, {"step": 3, "loss": 2.123456789, "lr": 1e-5, "grad_norm": math.nan, "tokens": 12345678})
    assert log.messages == ["step=3 loss=2.12346 lr=1e-05 grad_norm=nan tokens=12345678"]


def test_every_writer_gets_every_step_and_is_closed() -> None:
    first, second = Recorder(), Recorder()
    writer = MetricsWriter([first, second])
    writer.write(3, FIGURES)
    writer.write(4, FIGURES)
    writer.close()
    assert first.written == second.written == [(3, FIGURES), (4, FIGURES)]
    assert (first.closed, second.closed) == (1, 1)


def test_a_writer_that_fails_is_dropped_with_one_warning(log: pytest.LogCaptureFixture) -> None:
    bad, good = FullDisk(), Recorder()
    writer = MetricsWriter([bad, good])
    for step in range(5):
        writer.write(step, FIGURES)
    assert len(bad.written) == 2
    assert len(good.written) == 5
    assert log.messages == ["FullDisk failed and is switched off: [Errno 28] No space left on device"]


def test_a_file_that_is_closed_under_a_writer_does_no_harm(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    dead, good = JsonLines(tmp_path / "metrics.jsonl"), Recorder()
    dead.close()
    writer = MetricsWriter([dead, good])
    writer.write(3, FIGURES)
    writer.close()
    assert len(good.written) == 1
    assert log.messages == ["JsonLines failed and is switched off: I/O operation on closed file."]


def test_a_full_disk_under_json_lines(log: pytest.LogCaptureFixture) -> None:
    full, good = JsonLines(Path("/dev/full")), Recorder()
    writer = MetricsWriter([full, good])
    for step in range(3):
        writer.write(step, FIGURES)
    assert len(good.written) == 3
    assert log.messages == ["JsonLines failed and is switched off: [Errno 28] No space left on device"]


def test_a_run_writes_its_records(tmp_path: Path) -> None:
    writer = open_writers(tmp_path / "run", tmp_path / "tb", tb_queue=10, total_steps=5, first_step=0)
    writer.write(3, FIGURES)
    writer.close()
    assert jsons(tmp_path / "run" / "metrics.jsonl") == [FIGURES]
    assert list((tmp_path / "tb").iterdir())


def test_a_record_that_can_not_be_opened_is_left_out(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    writer = open_writers(tmp_path / "run", None, tb_queue=10, total_steps=5, first_step=0)
    writer.write(3, FIGURES)
    assert [record.levelname for record in log.records] == ["WARNING", "INFO"]
    assert log.messages[0].startswith("a record of the run can't be opened and is left out: ")
