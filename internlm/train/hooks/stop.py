"""Hook that stops a run on SIGTERM or SIGINT: all ranks finish the step, save a checkpoint and exit."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from internlm.accelerator import HostValues, is_host
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.utils.logger import get_logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds after the first signal in which further signals belong to the same request: whoever ends a job may signal the
#: launcher and the ranks, and the launcher passes its own signal on to the ranks.
REPEAT_SECONDS = 3.0
log = get_logger()


class StopOnSignal(Hook):
    """Hook that stops all ranks if any rank receives SIGTERM or SIGINT.

    Signals are caught in the ``with`` block of :meth:`listening`. A signal more than :data:`REPEAT_SECONDS` after the
    first one exits at once. Every rank exits with 128 + the signal number. This hook must come before the hook that
    saves checkpoints, because the latter reads ``trainer.stop_requested``.

    After every step, an all-reduce gives all ranks the signals caught so far. On the CPU, its result is read at once.
    On an accelerator, reading it would let the device idle, so it is read one step later, when the device has the work
    of that step: a run stops after the step in which a signal arrives on the CPU, and one step later on an accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.caught = 0
        self.agreed = 0
        self._first_caught = 0.0  # time of the first signal
        self._exchanged: HostValues | None = None  # result of the last exchange that was not read

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGTERM and SIGINT in the ``with`` block."""
        previous = {signum: signal.signal(signum, self._catch) for signum in SIGNALS}
        try:
            yield
        finally:
            # When one rank exits, the launcher sends SIGTERM to the others, which must not change their exit code.
            # Python removes its handlers before the process ends, so the signal must be ignored from here on.
            for signum, handler in previous.items():
                signal.signal(signum, signal.SIG_IGN if self.agreed else handler)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.caught:
            self.caught, self._first_caught = signum, now
        elif now - self._first_caught > REPEAT_SECONDS:
            # The user does not want to wait for the step and the checkpoint.
            sys.exit(128 + signum)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Exchange signals with all ranks, and request a stop if any rank received one."""
        # Signal and rank are packed into one integer, so that one all-reduce (max) gives every rank both.
        packed = self.caught * dist.get_world_size() + dist.get_rank() if self.caught else 0
        flag = torch.full((), packed, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        exchanged = HostValues(flag, "signals")
        exchanged.begin_copy()
        arrived, self._exchanged = exchanged if is_host(flag) else self._exchanged, exchanged
        if arrived is None:
            return
        self.agreed, rank = divmod(int(arrived.read_arrived()), dist.get_world_size())
        if self.agreed:
            trainer.stop_requested = True
            if dist.get_rank() == 0:
                name = signal.Signals(self.agreed).name
                log.warning(
                    f"{name} on rank {rank}: stopping after step {trainer.state.step}, exiting {128 + self.agreed}"
                )

    @property
    def exit_code(self) -> int:
        """Exit code of the run: 0, or 128 + the number of the signal that stopped it."""
        return 128 + self.agreed if self.agreed else 0
