"""Tokens per GPU and second (tgs), by several windows.

Where a step's figures go: the log, a JSON-lines file, TensorBoard, a progress bar.

A writer that fails (disk full, say) is dropped with one warning; training goes on.
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm.utils.lazy import require
from internlm.utils.logger import get_logger

SMA_WINDOW = 100


class Throughput:
    """Follows the speed of a run; ``devices`` share the tokens of a step."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.tokens = 0
        self.seconds = 0.0
        self.steps = 0
        self._sum_of_rates = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=SMA_WINDOW)

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step that consumed ``tokens`` over all devices."""
        self.tokens += tokens
        self.seconds += seconds
        self.steps += 1
        self._sum_of_rates += self._rate(tokens, seconds)
        self._recent.append((tokens, seconds))

    def figures(self) -> dict[str, float]:
        """tgs of the last step, the last 10 and 50, the whole run; the mean over steps, and that over the last 100
        steps."""
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


log = get_logger()
Figures = Mapping[str, float | int]


class Writer(Protocol):
    """One destination."""

    def write(self, step: int, figures: Figures) -> None: ...

    def close(self) -> None: ...


class LogLine:
    """One line of ``key=value`` in the log."""

    def write(self, step: int, figures: Figures) -> None:
        log.info(" ".join(f"{key}={_short(value)}" for key, value in figures.items()))

    def close(self) -> None:
        """Nothing to close."""


class JsonLines:
    """One JSON object a step, appended to a file; an inf or nan is written as a string."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, figures: Figures) -> None:
        safe = {k: v if math.isfinite(v) else str(v) for k, v in figures.items()}
        self._file.write(json.dumps(safe) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard scalars."""

    def __init__(self, folder: Path, queue: int) -> None:
        require("tensorboard", "enable_tb", "pip install tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), max_queue=queue)

    def write(self, step: int, figures: Figures) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class ProgressBar:
    """A bar with the time left, for a person at a terminal."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def write(self, step: int, figures: Figures) -> None:
        if "loss" in figures:
            self._bar.set_postfix(loss=_short(figures["loss"]), refresh=False)
            self._bar.update(step + 1 - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class MetricsWriter:
    """All destinations at once."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, step: int, figures: Figures) -> None:
        """Write the figures of ``step`` everywhere."""
        self._each(lambda writer: writer.write(step, figures))

    def close(self) -> None:
        """Flush and close everything."""
        self._each(lambda writer: writer.close())

    def _each(self, action: Any) -> None:
        for writer in list(self._writers):
            try:
                action(writer)
            except (OSError, ValueError) as error:
                self._writers.remove(writer)
                log.warning(f"{type(writer).__name__} failed and is switched off: {error}")


def open_writers(
    folder: Path, tensorboard: Path | None, tb_queue: int, total_steps: int, first_step: int
) -> MetricsWriter:
    """The log line, ``metrics.jsonl`` in ``folder``, TensorBoard where a folder is given, a bar where a person looks
    on."""
    makers: list[Any] = [LogLine, lambda: JsonLines(folder / "metrics.jsonl")]
    if tensorboard is not None:
        makers.append(lambda: TensorBoard(tensorboard, tb_queue))
    if sys.stderr.isatty():
        makers.append(lambda: ProgressBar(total_steps, first_step))
    return MetricsWriter([writer for writer in map(_opened, makers) if writer is not None])


def _opened(maker: Any) -> Writer | None:
    try:
        writer: Writer = maker()
        return writer
    except OSError as error:
        log.warning(f"a record of the run can't be opened and is left out: {error}")
        return None


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
