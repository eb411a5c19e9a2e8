"""Hooks that run every few steps: save checkpoints, validate, release memory and report slow ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from internlm import accelerator
from internlm.checkpoint import CheckpointManager
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.data.loader import ValidLoader
from internlm.eval import evaluate
from internlm.monitor import MetricsWriter
from internlm.train.hooks.stop import FollowRequests
from internlm.utils.logger import get_logger
from internlm.utils.progress import in_phase
from internlm.utils.stop_requests import Request

log = get_logger()


class SaveCheckpoints(Hook):
    """Hook that saves a checkpoint every ``ckpt.checkpoint_every`` steps, at the last step, and on requests.

    Args:
        manager: Manager of the checkpoints.
        requests: Hook by which the ranks agree on requests, which runs before this one.
    """

    def __init__(self, manager: CheckpointManager, requests: FollowRequests) -> None:
        self.manager, self.requests = manager, requests
        # Both are found in threads, of one rank or at different times; all ranks stop after the same step.
        manager.on_failure = partial(requests.request, Request.SAVE_FAILED)
        manager.on_lost = partial(requests.request, Request.LEASE_LOST)
        requests.callbacks[Request.SAVE_FAILED] = self._raise_failure

    def _raise_failure(self, rank: int) -> None:
        self.manager.wait_async_upload_finish()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save a checkpoint if one is due after this step, if it is requested, or if the run stops after the step."""
        if self.requests.may_save:
            forced = trainer.stop_requested or trainer.save_requested
            with in_phase("save"):
                self.manager.try_save_checkpoint(trainer.state, force=forced)
                if trainer.stop_requested:
                    self.manager.wait_async_upload_finish()
        trainer.save_requested = False
        self.requests.log_outcome(trainer.state.step, self.manager.last_saved)


class Validate(Hook):
    """Hook that runs the validation every ``every`` steps and after the last step (never if ``every`` is 0).

    Args:
        loaders: Validation loaders by dataset type.
        every: Number of steps between validations; 0: no validation.
        total_steps: Last step of the run.
        writer: Writer of the metrics; None on ranks that do not log.
        token_bytes: Bytes of text of each token id, for bits per byte; None: these are not reported.
        stop_is_asked: Function called before each batch, which returns on all ranks whether any rank is asked to stop;
            the validation then ends, so that a long one does not delay the save.
    """

    def __init__(
        self,
        loaders: Mapping[str, ValidLoader],
        every: int,
        total_steps: int,
        writer: MetricsWriter | None,
        token_bytes: Tensor | None = None,
        stop_is_asked: Callable[[], bool] | None = None,
    ) -> None:
        self.loaders, self.every, self.total_steps, self.writer = loaders, every, total_steps, writer
        self.token_bytes, self.stop_is_asked = token_bytes, stop_is_asked

    def before_run(self, trainer: Trainer) -> None:
        """Log what is not reported."""
        if self.writer and self.every and self.loaders and self.token_bytes is None:
            log.info("valid/bits_per_byte is not reported, since data.tokenizer_path is not set")

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Run the validation if one is due after this step."""
        done = trainer.state.step
        if self.every and (done % self.every == 0 or done == self.total_steps):
            with in_phase("evaluation"):
                metrics = evaluate(trainer, self.loaders, self.token_bytes, self.stop_is_asked)
            if self.writer and metrics:
                self.writer.write(report.step, {"step": report.step, **metrics})
            elif self.writer and self.loaders:
                log.info(f"the validation after step {done} is not finished, since the run is asked to stop")


class Upkeep(Hook):
    """Hook that releases cached device memory and reports slow ranks every ``every`` steps (never if ``every`` is 0).

    A rank is slow if its forward and backward passes take more than ``outlier_ratio`` times the mean over all ranks.
    """

    def __init__(self, every: int, outlier_ratio: float, device: torch.device) -> None:
        self.every, self.outlier_ratio, self.device = every, outlier_ratio, device
        self._marks: list[tuple[accelerator.Mark, accelerator.Mark]] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Add up the forward and backward times; every ``every`` steps, release memory and report slow ranks."""
        if not self.every:
            return
        self._marks.append((report.fetched, report.computed))  # added up later, when the device has reached them
        if trainer.state.step % self.every == 0:
            # Not every step, because the next step must allocate the released memory again.
            accelerator.empty_cache()
            self._report_slow_ranks(sum(end.seconds_since(start) for start, end in self._marks))
            self._marks.clear()

    def _report_slow_ranks(self, seconds: float) -> None:
        # An all-gather, by an all-reduce of a vector with one entry per rank: every backend implements all-reduce.
        all_seconds = torch.zeros(dist.get_world_size(), device=self.device)
        all_seconds[dist.get_rank()] = seconds
        dist.all_reduce(all_seconds)
        all_seconds = accelerator.to_host(all_seconds, "search for slow ranks")
        mean = all_seconds.mean()
        slow = (all_seconds > self.outlier_ratio * mean).nonzero().flatten().tolist()
        if slow and dist.get_rank() == 0:
            ranks = ", ".join(f"rank {rank}: {float(all_seconds[rank] / self.every):.3f} s" for rank in slow)
            log.warning(f"slow forward and backward passes (mean {float(mean / self.every):.3f} s per step): {ranks}")
