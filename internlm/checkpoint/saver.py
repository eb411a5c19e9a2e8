"""Saving: the phases of a save on all ranks, in the foreground or in a thread.

1. Plan (first save only): the ranks agree which of them writes which piece (:mod:`.save_plan`).
2. Stage (background only): each rank copies its pieces to host memory. Training goes on after this phase.
3. Write: each rank writes its file, makes it durable, and sends the checksums of its pieces to rank 0.
4. Commit: rank 0 writes the state file and the manifest, and publishes the checkpoint. All ranks get the outcome.
5. Prune: if older checkpoints are to be deleted, every rank first reads back what it wrote; rank 0 deletes.

A failure on any rank is raised on all ranks, and leaves earlier checkpoints as they were.
"""

from __future__ import annotations

import atexit
import errno
import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from internlm import accelerator
from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.folder_checks import explain, format_size, reason_of, todo_at
from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.checkpoint.planners import LogicalSavePlanner, bytes_of, staging_bytes
from internlm.checkpoint.save_plan import Plan, agree_on_plan
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_writer import Save, TensorWriter
from internlm.checkpoint.verification import damaged_files, written_files
from internlm.utils.errors import CheckpointError, Problem, call_before_success
from internlm.utils.logger import get_logger

log = get_logger()
#: Number of ranks whose failures an error lists.
MOST_FAILURES = 4
TODO = "Free space or choose another folder"
#: Savers of this process whose last save in the background was not waited for. A script may have dropped its manager.
_savers: set[Saver] = set()
#: Name of the thread that writes in the background, for stack dumps.
THREAD = "checkpoint"


class _Failure(NamedTuple):
    """Why a checkpoint cannot be saved, and what to do."""

    message: str
    todo: str


class Saver:
    """Saver of the checkpoints of a run; all ranks call its methods in the same order.

    Args:
        storage: Storage to save to.
        before_commit: Function that rank 0 calls right before it publishes or deletes a checkpoint; it raises
            ``CheckpointError`` if it must not.
        to_prune: Function that rank 0 calls with the step after a commit; it returns the checkpoints to delete.
        on_failure: Function called on each rank, in the thread, after a save in the background has failed.
        exchange: Exchange between all ranks; no other thread uses it during a save in the background. If others use
            the default group then, it must have a group of its own.
    """

    def __init__(
        self,
        storage: Storage,
        before_commit: Callable[[], None],
        to_prune: Callable[[int], Sequence[str]],
        on_failure: Callable[[], None],
        exchange: Exchange,
    ) -> None:
        self.storage, self.on_failure, self.exchange = storage, on_failure, exchange
        self.before_commit, self.to_prune = before_commit, to_prune
        self._plan: Plan | None = None
        self._attempts = 0
        self._memory: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, save: Save, tensors: LogicalTensors, background: bool = False) -> None:
        """Save a checkpoint; collective.

        Args:
            save: Name, step and state of the checkpoint.
            tensors: Tensors of this rank.
            background: Return when the tensors have been copied, and write in a thread. An earlier save in the
                background is waited for.

        Raises:
            CheckpointError: This save, or the earlier one in the background, failed on some rank.
        """
        self.wait()
        planner = LogicalSavePlanner()
        planner.set_up_planner(dict(tensors), is_coordinator=dist.get_rank() == 0)
        plan, attempt = self._agree(planner, tensors)
        write = functools.partial(self._write, save, plan, planner, attempt)
        if not background:
            write()
            return
        planner.stage(plan.own, self._staging_memory(plan.own))
        accelerator.synchronize()
        _savers.add(self)
        _finish_at_exit()
        self._thread = threading.Thread(target=self._in_background, args=(write,), name=THREAD, daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a save in the background is unfinished on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Block until the save in the background is done; raise its failure."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _savers.discard(self)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _in_background(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._failure = error
            self.on_failure()

    def _staging_memory(self, plan: SavePlan) -> Tensor:
        # Kept for the next save: the first use of new memory takes longer than the copy.
        size = staging_bytes(plan)
        if self._memory is None or self._memory.numel() < size:
            self._memory = accelerator.host_buffer(size)
        return self._memory

    # -- phases

    def _agree(self, planner: LogicalSavePlanner, tensors: LogicalTensors) -> tuple[Plan, str]:
        """Return the plan of this rank, made anew if the tensors changed, and the name of the attempt."""
        signature = [(name, tensor.dtype, tensor.global_shape, *tensor.slices) for name, tensor in tensors.items()]
        # The tensors follow from the layout: if they changed, they did so on all ranks.
        if self._plan is None or self._plan.signature != signature:
            self._plan = agree_on_plan(planner, signature, self.exchange)
        self._attempts += 1
        return self._plan, f"{self._plan.token}{self._attempts:04}"

    def _write(self, save: Save, plan: Plan, planner: LogicalSavePlanner, attempt: str) -> None:
        """Write, commit and prune; collective."""
        writer = TensorWriter(self.storage, save, attempt, dist.get_rank(), self.before_commit)
        results, failure = list[WriteResult](), None
        try:
            results = writer.write_data(plan.own, planner).value()
        except OSError as error:
            failure = _Failure(self._explain(error, plan.own), self._todo(error))
        except Exception as error:  # the other ranks must not wait for the results
            log.exception("a checkpoint cannot be written")
            failure = _Failure(repr(error), TODO)
        written = self.exchange.gather((results, failure))
        outcome = self._commit(writer, plan, written) if written else None
        doomed = self._doomed(save.step) if written and not outcome else ()
        outcome, doomed = self.exchange.broadcast((outcome, doomed))
        if outcome:
            message = f"cannot be saved ({outcome.message})"
            raise CheckpointError(Problem(self.storage.path(save.checkpoint), message, outcome.todo))
        if doomed:
            self._prune(writer, results, doomed)

    def _explain(self, error: OSError, plan: SavePlan) -> str:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return explain(error)
        free = None
        with suppress(OSError):  # the other ranks wait for what this one sends
            free = self.storage.free_bytes()
        rest = "" if free is None else f", {format_size(free)} free at {self.storage.location}"
        return f"{reason_of(error)}: need {format_size(bytes_of(plan))}{rest}"

    def _todo(self, error: OSError) -> str:
        return todo_at(str(error.filename or self.storage.location), error.errno, TODO)

    def _commit(
        self, writer: TensorWriter, plan: Plan, written: Sequence[tuple[list[WriteResult], _Failure | None]]
    ) -> _Failure | None:
        """Publish what all ranks have written; return why that is impossible, or None."""
        failures = [
            _Failure(f"rank {rank}: {failure.message}", failure.todo)
            for rank, (_, failure) in enumerate(written)
            if failure
        ]
        try:
            if not failures:
                assert plan.metadata is not None
                writer.finish(plan.metadata, [results for results, _ in written])
                return None
        except OSError as error:
            failures = [_Failure(explain(error), self._todo(error))]
        except CheckpointError as error:
            failures = [_Failure(str(error), "")]  # says what to do
        except Exception as error:  # the other ranks must not wait for the outcome
            log.exception("a checkpoint cannot be committed")
            failures = [_Failure(repr(error), TODO)]
        with suppress(OSError):
            self.storage.discard(writer.save.checkpoint, writer.attempt)
        more = f"; and {len(failures) - MOST_FAILURES} more ranks" if len(failures) > MOST_FAILURES else ""
        return _Failure("; ".join(failure.message for failure in failures[:MOST_FAILURES]) + more, failures[0].todo)

    def _doomed(self, step: int) -> Sequence[str]:
        """Return the names of the checkpoints to delete; none, if the storage does not list them."""
        try:
            return self.to_prune(step)
        except OSError as error:
            log.warning(f"older checkpoints cannot be deleted ({explain(error)})")
            return ()

    def _prune(self, writer: TensorWriter, results: Sequence[WriteResult], doomed: Sequence[str]) -> None:
        """Delete the checkpoints ``doomed``, unless the new one does not verify when it is read back."""
        checkpoint, attempt = writer.save.checkpoint, writer.attempt
        found = self.exchange.gather(self._read_back(writer, results))
        problems = [problem for of_rank in found for problem in of_rank]
        if problems:
            reason = replace(problems[0], todo="")  # the run goes on
            log.error(f"{checkpoint} does not verify, so older checkpoints are kept: {reason}")
            return
        for name in doomed if found else ():
            try:
                self.before_commit()  # reading back takes long
                self.storage.withdraw(name, attempt)
            except CheckpointError as error:
                log.warning(f"older checkpoints are kept ({error.problems[0]})")
                return
            except OSError as error:
                log.warning(f"{self.storage.path(name)} cannot be deleted ({explain(error)})")

    def _read_back(self, writer: TensorWriter, results: Sequence[WriteResult]) -> list[Problem]:
        """Read what this rank has written, and return why it does not verify.

        The checkpoint is committed: a file server that fails now must not end the run, nor keep other ranks waiting.
        """
        checkpoint = writer.save.checkpoint
        try:
            return damaged_files(self.storage, checkpoint, written_files(writer, results))
        except CheckpointError as error:
            return [*error.problems]
        except Exception as error:
            log.exception("a checkpoint cannot be read back")
            return [Problem(self.storage.path(checkpoint), repr(error))]


def finish_saves() -> None:
    """Wait for all saves in the background of this process; call it before the process groups are destroyed.

    Raises:
        CheckpointError: One of them failed.
    """
    for saver in list(_savers):
        saver.wait()


@functools.cache  # registered once
def _finish_at_exit() -> None:
    """Wait for all saves when the process ends: a script that does not wait would lose its last checkpoint."""
    call_before_success(finish_saves)
    # For scripts whose main function is not decorated, or that leave it by an exception. Registered after the process
    # groups were made, and so called before they are destroyed.
    atexit.register(_log_failure_of_saves)


def _log_failure_of_saves() -> None:
    try:
        finish_saves()
    except CheckpointError as error:
        log.error(f"{error}. The exit code does not show it: end a script with ckpt_manager.close()")
    except RuntimeError:  # of a collective
        log.error("the last save in the background was not completed: another rank was lost")
