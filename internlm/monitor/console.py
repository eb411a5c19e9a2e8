"""Metrics on the console: a progress bar and short lines on a terminal, else the full line of every step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack

from internlm import accelerator
from internlm.utils.logger import get_logger

log = get_logger()


def is_terminal() -> bool:
    """Return whether both stdout and stderr are terminals, rather than files or pipes."""
    return sys.stderr.isatty() and sys.stdout.isatty()


class LogLine:
    """The full line of metrics in the log."""

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Log the full line."""
        log.info(format_line(metrics))

    def close(self) -> None:
        """Do nothing: the logger stays open."""


class Terminal:
    """A progress bar, and one short line per step above it.

    Args:
        total_steps: steps of the run.
        first_step: step at which a resumed run begins.
        devices: devices that share the tokens of a step.
    """

    def __init__(self, total_steps: int, first_step: int, devices: int) -> None:
        # Imported here, because only a terminal needs it: a job on a cluster may do without the package.
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.total_steps, self.first_step, self.devices = total_steps, first_step, devices
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)
        self._redirected = ExitStack()
        if log.handlers:  # else the application logs by handlers of its own
            # Lines of the log would otherwise be written into the bar.
            self._redirected.enter_context(logging_redirect_tqdm(loggers=[log]))

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Move the bar and print a short line above it."""
        if "loss" not in metrics:  # of a validation
            values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items() if name.count("/") == 1)
            self._bar.write(f"step {step + 1}  {values}", file=sys.stderr)
            return
        self._bar.update(step + 1 - self._bar.n)
        self._bar.write(self._line(step, metrics), file=sys.stderr)

    def _line(self, step: int, metrics: Mapping[str, float | int]) -> str:
        # The first step compiles and allocates, but over a whole run it hardly matters for the time left.
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
        """Leave the bar as it is and give the logger its handlers back."""
        self._redirected.close()
        self._bar.close()


def format_line(metrics: Mapping[str, float | int]) -> str:
    """Return the full line of ``metrics``: ``key=value`` in their order."""
    return " ".join(f"{name}={_short(value)}" for name, value in metrics.items())


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
