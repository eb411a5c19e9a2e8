"""Metrics of a run: throughput, and writers of each step's metrics.

A writer that fails, for example on a full disk, is removed with one warning, and training continues.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from internlm.monitor.console import LogLine, Terminal, format_line, is_terminal
from internlm.utils.lazy import require
from internlm.utils.logger import get_logger

SMA_WINDOW = 100
log = get_logger()
Metrics = Mapping[str, float | int]


class Throughput:
    """Throughput meter: tokens per device per second, over several windows of steps.

    Args:
        devices: Number of devices that share the tokens of a step.
    """

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.tokens = 0
        self.seconds = 0.0
        self.steps = 0
        self._sum_of_rates = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=SMA_WINDOW)

    def add(self, tokens: int, seconds: float) -> None:
        """Add a step in which all devices together processed ``tokens`` tokens in ``seconds`` seconds."""
        self.tokens += tokens
        self.seconds += seconds
        self.steps += 1
        # The published tgs_avg is the mean of the steps' rates; in total tokens over total seconds, slow steps would
        # weigh more.
        self._sum_of_rates += self._rate(tokens, seconds)
        self._recent.append((tokens, seconds))

    def metrics(self) -> dict[str, float]:
        """Return the throughput over several windows of steps, in tokens per device per second (tgs).

        ``tgs_all`` covers the whole run, and ``last_tgs_1``, ``last_tgs_10`` and ``last_tgs_50`` cover the last 1, 10
        and 50 steps. ``tgs_avg`` and ``tgs_SMA`` are means of the throughputs of single steps, over the whole run and
        over the last 100 steps.
        """
        rates = [self._rate(*step) for step in self._recent]
        return {
            "tgs/last_tgs_1": rates[-1],
            "tgs/tgs_all": self._rate(self.tokens, self.seconds),
            "tgs/tgs_avg": self._sum_of_rates / self.steps,
            "tgs/tgs_SMA": sum(rates) / len(rates),
            "tgs/last_tgs_10": self._last(10),
            "tgs/last_tgs_50": self._last(50),
        }

    def _last(self, steps: int) -> float:
        window = list(self._recent)[-steps:]
        return self._rate(sum(tokens for tokens, _ in window), sum(seconds for _, seconds in window))

    def _rate(self, tokens: int, seconds: float) -> float:
        return tokens / self.devices / seconds


# -- writers ----------------------------------------------------------------------------------------------------------
class Writer(Protocol):
    """Protocol for a writer of metrics to one destination."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of ``step``."""

    def close(self) -> None:
        """Flush and close the destination."""


class JsonLines:
    """Writer of one JSON object per step, appended to a file; inf and NaN are written as strings."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)  # line-buffered, so that a killed run loses no line

    def write(self, step: int, metrics: Metrics) -> None:
        """Append the metrics of a step as a JSON object."""
        # JSON has no inf and nan, and most parsers reject Python's.
        safe = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self._file.write(json.dumps(safe) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LogFile:
    """Writer of a log file, to which all lines that the framework logs on this rank are copied.

    Args:
        path: File to append to.
        write_metrics: Also write the metrics of each step as one line. Set it if the console writer does not log them.
    """

    def __init__(self, path: Path, write_metrics: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _LogFileHandler(path)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._write_metrics = write_metrics
        log.addHandler(self._handler)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of ``step`` as one line, unless the console writer already logs them."""
        if self._write_metrics:
            line = format_line(metrics)
            self._handler.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None))

    def close(self) -> None:
        """Detach the file from the logger and close it."""
        log.removeHandler(self._handler)
        self._handler.close()


class _LogFileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        # By default, logging prints a traceback for every further line.
        log.removeHandler(self)
        log.warning(f"the log file {self.baseFilename} cannot be written and is switched off")


class TensorBoard:
    """Writer of metrics to TensorBoard, as scalars.

    Args:
        folder: Folder of the event files.
        queue: Number of scalars that are buffered.
        first_step: Step at which a resumed run begins; earlier records of this and later steps are hidden.
    """

    def __init__(self, folder: Path, queue: int, first_step: int = 0) -> None:
        require("tensorboard", "enable_tb", "pip install tensorboard")
        # Imported here because TensorBoard is optional, and takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), max_queue=queue, purge_step=first_step or None)

    def write(self, step: int, metrics: Metrics) -> None:
        """Add a scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class MetricsWriter:
    """Writer that calls all writers of a run, and removes those that fail."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of ``step`` to every destination."""
        self._call_all(lambda writer: writer.write(step, metrics))

    def close(self) -> None:
        """Flush and close every destination."""
        self._call_all(lambda writer: writer.close())

    def _call_all(self, action: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                action(writer)
            except (OSError, ValueError) as error:  # ValueError: the file was closed
                self._writers.remove(writer)
                log.warning(f"{type(writer).__name__} failed and is switched off: {error}")


def open_writers(
    folder: Path, tensorboard: Path | None, tb_queue: int, total_steps: int, first_step: int, devices: int = 1
) -> MetricsWriter:
    """Open the metrics writers of a run: console, ``train.log``, ``metrics.jsonl`` and TensorBoard.

    Args:
        folder: Folder of ``train.log`` and ``metrics.jsonl``.
        tensorboard: Folder of TensorBoard event files; None: no TensorBoard.
        tb_queue: Number of scalars that TensorBoard buffers.
        total_steps: Number of steps of the run.
        first_step: Step at which a resumed run begins.
        devices: Number of devices that share the tokens of a step.

    Returns:
        One writer that calls all others. A terminal shows a progress bar and one short line per step; a console that
        is not a terminal shows the full line.
    """
    terminal = is_terminal()
    # The terminal comes first: it is closed first, and restores the logger's handlers before the log file leaves.
    makers: list[Callable[[], Writer]] = [
        (lambda: Terminal(total_steps, first_step, devices)) if terminal else LogLine,
        lambda: LogFile(folder / "train.log", write_metrics=terminal),
        lambda: JsonLines(folder / "metrics.jsonl"),
    ]
    if tensorboard is not None:
        makers.append(lambda: TensorBoard(tensorboard, tb_queue, first_step))
    return MetricsWriter([writer for writer in map(_opened, makers) if writer is not None])


def _opened(maker: Callable[[], Writer]) -> Writer | None:
    try:
        return maker()
    except (OSError, ImportError) as error:
        log.warning(f"a metrics file cannot be opened and is left out: {error}")
        return None
