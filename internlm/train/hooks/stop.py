"""SIGTERM and SIGINT: save, then exit."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.utils.logger import get_logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)
log = get_logger()


class StopOnSignal(Hook):
    """A signal to any rank makes all ranks stop after the step in which they learn of it; a second one quits at once.
    Signals are caught within :meth:`listening`.

    Comes before the hook that saves, which then sees ``stop_requested``. The exit code is 128 + the signal, on every
    rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.caught = 0
        self.agreed = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals meanwhile."""
        outer = {number: signal.signal(number, self._catch) for number in SIGNALS}
        try:
            yield
        finally:
            # A launcher that sees one rank exit sends the others a signal, which must not change their exit code.
            # Python takes its own handlers back before it ends, so the signal is left to nobody.
            for number, handler in outer.items():
                signal.signal(number, signal.SIG_IGN if self.agreed else handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            sys.exit(128 + number)
        self.caught = number

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        # The signal and the rank it reached, as one number, so that a single maximum tells every rank both.
        flag = torch.tensor(
            [self.caught * dist.get_world_size() + dist.get_rank() if self.caught else 0], device=self.device
        )
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.agreed, rank = divmod(int(flag), dist.get_world_size())
        if self.agreed:
            trainer.stop_requested = True
            if dist.get_rank() == 0:
                name = signal.Signals(self.agreed).name
                log.warning(
                    f"{name} on rank {rank}: stopping after step {trainer.state.step}, exiting {128 + self.agreed}"
                )

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal that ended the run."""
        return 128 + self.agreed if self.agreed else 0
