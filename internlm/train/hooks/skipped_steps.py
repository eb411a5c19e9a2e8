"""Hook that logs a warning for each skipped step."""

from __future__ import annotations

import torch.distributed as dist

from internlm.accelerator import is_host
from internlm.core.nonfinite import NonFinite, find_on_all_ranks, find_on_this_rank, format_nonfinite
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.solver.optimizer import SKIPPED
from internlm.utils.logger import get_logger

log = get_logger()


class WarnOfSkippedSteps(Hook):
    """Hook that logs one warning for each step that was skipped because its loss or a gradient was inf or NaN.

    All ranks need this hook, because they exchange what they found. A step that was not skipped costs no exchange and
    no host sync: on an accelerator, a step is looked at one step later, when its outcome has arrived on the host.

    Args:
        limit: Number of steps skipped in a row after which the run ends.
        is_logging: Whether this rank logs the warnings.
    """

    def __init__(self, limit: int, is_logging: bool) -> None:
        self.limit, self.is_logging = limit, is_logging
        self._unread: StepReport | None = None  # the last step, until its outcome has arrived

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Log a warning if the last step whose outcome has arrived was skipped."""
        report.result.local_loss.begin_copy()
        arrived, self._unread = self._unread, report
        if is_host(report.result.sums):
            arrived, self._unread = report, None
        if arrived and arrived.update.host_outcome.read_arrived()[SKIPPED]:
            self._warn(arrived, find_on_all_ranks(trainer.optimizer, arrived.update, [arrived.result.local_loss]))

    def after_run(self, trainer: Trainer) -> None:
        """Log a warning if the last step was skipped."""
        last, self._unread = self._unread, None
        if last and last.update.host_outcome.read_arrived()[SKIPPED]:
            # No exchange, since the run may have failed on some ranks only: of the others, nothing is known.
            own = find_on_this_rank(trainer.optimizer, last.update, [last.result.local_loss])
            self._warn(last, [*[NonFinite()] * dist.get_rank(), own])

    def _warn(self, report: StepReport, found: list[NonFinite]) -> None:
        if not self.is_logging:
            return
        update, where = report.update, format_nonfinite(found)
        scale = f", loss scale {update.loss_scale:.6g}" if update.loss_scale != 1 else ""
        log.warning(
            f"step {report.step} was skipped, since the loss or gradients were inf or NaN{where and f' ({where})'}: "
            f"gradient norm {update.grad_norm:.6g}{scale}. {update.skipped_in_a_row} in a row; {self.limit} end the run"
        )
