"""Metrics on the console: a progress bar and short lines on a terminal, otherwise one full line per step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack

from internlm import accelerator
from internlm.utils.logger import get_logger

log = get_logger()


def is_terminal() -> bool:
    """Return whether both stdout and stderr are terminals, rather than files or pipes."""
    try:
        return sys.stderr.isatty() and sys.stdout.isatty()
    except (AttributeError, ValueError):  # they were closed before or after the start of the interpreter
        return False


class LogLine:
    """Metrics writer that logs one full line per step."""

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Log the metrics of ``step`` as one full line."""
        log.info(format_line(metrics))

    def close(self) -> None:
        """Do nothing: the logger stays open."""


class Terminal:
    """Metrics writer that shows a progress bar, and prints one short line per step above it.

    Args:
        total_steps: Number of steps of the run.
        first_step: Step at which a resumed run begins.
        devices: Number of devices that share the tokens of a step.
    """

    def __init__(self, total_steps: int, first_step: int, devices: int) -> None:
        # Imported here because only a terminal needs it: a cluster job runs without the package.
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.total_steps, self.first_step, self.devices = total_steps, first_step, devices
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)
        self._redirected = ExitStack()
        if log.handlers:  # otherwise the application has its own handlers
            # Without the redirection, log lines would be written into the bar.
            self._redirected.enter_context(logging_redirect_tqdm(loggers=[log]))

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Advance the bar to ``step``, and print a short line of metrics above it."""
        if "loss" not in metrics:  # metrics of a validation
            values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items() if name.count("/") == 1)
            self._bar.write(f"step {step + 1}  {values}", file=sys.stderr)
            return
        self._bar.update(step + 1 - self._bar.n)
        self._bar.write(self._line(step, metrics), file=sys.stderr)

    def _line(self, step: int, metrics: Mapping[str, float | int]) -> str:
        # The mean includes the slow first step (compiling, allocating), which hardly matters over a whole run.
        done = step + 1
        seconds_per_step = self._bar.format_dict["elapsed"] / max(done - self.first_step, 1)
        eta = self._bar.format_interval(seconds_per_step * (self.total_steps - done))
        tokens_per_second = metrics["tgs (tokens/gpu/second)"] * self.devices
        return (
            f"step {done}/{self.total_steps}  loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3f}  "
            f"lr {metrics['lr']:.2e}  {tokens_per_second:,.0f} tokens/s  {accelerator.peak_memory() / 2**30:.2f} GiB  "
            f"eta {eta}"
        )

    def close(self) -> None:
        """Close the bar, which stays visible, and restore the logger's handlers."""
        self._redirected.close()
        self._bar.close()


def format_line(metrics: Mapping[str, float | int]) -> str:
    """Format ``metrics`` as one line of ``key=value`` pairs, in the given order."""
    return " ".join(f"{name}={_short(value)}" for name, value in metrics.items())


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
