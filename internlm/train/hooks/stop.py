"""Hook by which all ranks follow the requests of any rank to save or to stop, at the same step."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from internlm.accelerator import HostValues, is_host
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.train.hooks.stop_sources import LauncherPatience, StopFile
from internlm.utils.logger import get_logger
from internlm.utils.progress import launcher_has_died
from internlm.utils.stop_requests import Inbox, Request
from internlm.utils.stop_signals import stop_signals

REQUESTS = tuple(Request)
log = get_logger()


class FollowRequests(Hook):
    """Hook by which all ranks follow the requests of any rank to save or to stop, at the same step.

    Requests come from signals, the stop file, the death of the launcher, and :meth:`request`. After every step, an
    all-reduce gives each rank the requests of all ranks. On the CPU, its result is read at once. On an accelerator,
    reading it would let the device idle, so it is read one step later, when the device has the work of that step: the
    ranks follow a request after the step in which it arrives on the CPU, and one step later on an accelerator.

    This hook must come before the hook that saves checkpoints, which reads ``trainer.stop_requested``,
    ``trainer.save_requested`` and :attr:`agreed`.

    Args:
        device: Device of the exchange.
        stop_file: Path of the stop file, which rank 0 reads; None: there is none.
    """

    def __init__(self, device: torch.device, stop_file: str | None = None) -> None:
        self.device = device
        self.agreed: dict[Request, int] = {}
        """Requests that all ranks follow after this step, each with the rank that received it."""
        self.callbacks: dict[Request, Callable[[int], None]] = {}
        """Functions called on all ranks when they follow a request, with the rank that received it; they may raise an
        error, which ends the run."""
        self.exit_code = 0
        """Exit code of the run so far."""
        self._inbox = Inbox()
        self._stop_file = StopFile(stop_file) if stop_file else None
        self._patience = LauncherPatience(os.environ)
        self._exchanged: HostValues | None = None  # result of the last exchange that was not read
        self._asked: HostValues | None = None  # the same for exchanges within a step

    def request(self, request: Request) -> None:
        """Ask all ranks to follow ``request`` after a step; any thread of any rank may call this at any time."""
        self._inbox.add(request)

    # -- positions in the loop ----------------------------------------------------------------------------------------
    def before_run(self, trainer: Trainer) -> None:
        """Receive signals as requests from here on."""
        stop_signals().begin_training(self._inbox)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Exchange the requests of all ranks, and follow them."""
        arrived, self._exchanged = _exchange(self._flags(trainer.state.step), self._exchanged)
        self.agreed = _read(arrived)
        if not self.agreed:
            return
        for request, rank in self.agreed.items():
            if request in self.callbacks:
                self.callbacks[request](rank)
        trainer.stop_requested |= any(request.value.stops for request in self.agreed)
        trainer.save_requested |= any(request.value.saves for request in self.agreed)

    def stop_is_asked(self) -> bool:
        """Return whether any rank has received a request to stop, other than by the stop file, since the last step.

        Collective: all ranks must call it, and get the same result; on an accelerator, that of the previous call. The
        request remains to be followed after the step, which work within it need not delay.
        """
        self._receive()
        flag = torch.zeros(1, dtype=torch.int64, device=self.device)
        if self._inbox.asks_to_stop():
            flag.fill_(1)  # no copy from the host, which would be a host sync
        arrived, self._asked = _exchange(flag, self._asked)
        return arrived is not None and any(arrived.read_arrived())

    def _receive(self) -> None:
        """Collect in the inbox what this rank has received so far."""
        stop_signals().settle()
        if launcher_has_died():
            self._inbox.add(Request.LAUNCHER_DIED)
        if dist.get_rank() == 0:
            self._patience.note_step()

    def _flags(self, step: int) -> torch.Tensor:
        """Return a vector with an entry for each kind of request: 1 + this rank if this rank has one, else 0."""
        rank, flags = dist.get_rank(), torch.zeros(len(REQUESTS), dtype=torch.int64, device=self.device)
        self._receive()
        if rank == 0 and self._stop_file:
            request = self._stop_file.due(step if is_host(flags) else step + 1)
            if request:
                self._inbox.add(request)
        for request in self._inbox.take():
            flags[REQUESTS.index(request)].fill_(rank + 1)  # no copy from the host, which would be a host sync
        return flags

    # -- what came of it ----------------------------------------------------------------------------------------------
    @property
    def may_save(self) -> bool:
        """Whether the step may be saved; False after a request to stop without saving."""
        return all(request.value.saves for request in self.agreed)

    def log_outcome(self, step: int, last_saved: int) -> None:
        """Log on rank 0 what the requests of this step have led to, and set the exit code.

        Args:
            step: Number of steps done.
            last_saved: Step of the newest checkpoint of this run.
        """
        if not self.agreed:
            return
        # The first request to stop gives the exit code; the others are followed too.
        request, rank = min(self.agreed.items(), key=lambda item: (not item[0].value.stops, REQUESTS.index(item[0])))
        effect = request.value
        if effect.stops:
            self.exit_code = effect.exit_code
        if dist.get_rank() == 0:
            source, is_saved = effect.source.format(rank=rank), last_saved == step
            if effect.stops:
                saved = f"saved step {step}" if is_saved else f"step {step} is not saved"
                log.warning(f"{source}: {saved}, exiting {effect.exit_code}")
            elif is_saved:  # or is being saved in the background
                log.info(f"{source}: saving step {step}, training goes on")
            else:
                log.warning(f"{source}: step {step} is not saved, since ckpt.enable_save_ckpt is False")

    def finish(self, step: int, last_saved: int) -> None:
        """Follow what has arrived since the last step, after which all ranks leave the loop.

        Args:
            step: Number of steps done.
            last_saved: Step of the newest checkpoint of this run.
        """
        saved = f"step {step} is saved" if last_saved == step else f"step {step} is not saved"
        self.agreed, self._exchanged = _read(self._exchanged), None
        if not self.exit_code and any(request.value.stops for request in self.agreed):
            self.log_outcome(step, last_saved)
        signals = stop_signals()
        signals.settle()
        signals.end_training(saved, self.exit_code)
        # Requests of this rank alone, since the last exchange. Those not to save come too late: all saves are done.
        waiting = self._inbox.take()
        late = [request for request in REQUESTS if request in waiting and request.value.stops and request.value.saves]
        if late and not self.exit_code:
            self.exit_code = late[0].value.exit_code
            signals.end_training(saved, self.exit_code)
            log.warning(f"{late[0].value.source.format(rank=dist.get_rank())}: {saved}, exiting {self.exit_code}")


def _exchange(flags: torch.Tensor, previous: HostValues | None) -> tuple[HostValues | None, HostValues | None]:
    """Start the all-reduce of ``flags``; return the exchange whose result has arrived, and the one that goes on.

    On the CPU the first is this exchange, on an accelerator ``previous``.
    """
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    exchanged = HostValues(flags, "requests")
    exchanged.begin_copy()
    return (exchanged, None) if is_host(flags) else (previous, exchanged)


def _read(values: HostValues | None) -> dict[Request, int]:
    """Return the requests in the result of an exchange, each with a rank that received it."""
    if values is None:
        return {}
    return {request: flag - 1 for request, flag in zip(REQUESTS, map(int, values.read_arrived()), strict=True) if flag}
