"""Metrics of a run: throughput, and writers of each step's metrics.

If a writer fails, for example on a full disk, one warning is logged, training continues, and the writer is called again
in the next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from internlm.monitor.console import LogLine, Terminal, is_terminal
from internlm.monitor.record_files import JsonLines, LogFile, Metrics, TensorBoard
from internlm.utils.logger import FailureNotice, get_logger

SMA_WINDOW = 100
log = get_logger()


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


class MetricsWriter:
    """Writer that calls all writers of a run, whose failures it logs and never raises."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = [(writer, FailureNotice(type(writer).__name__)) for writer in writers]

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of ``step`` to every destination."""
        for writer, notice in self._writers:
            try:
                writer.write(step, metrics)
            except Exception as error:  # records are not worth the end of a run
                notice.failed(error)
            else:
                notice.succeeded()

    def close(self) -> None:
        """Flush and close every destination."""
        for writer, notice in self._writers:
            try:
                writer.close()
            except Exception as error:
                notice.failed(error)


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
