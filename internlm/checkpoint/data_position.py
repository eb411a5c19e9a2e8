"""Rows that a run read in a step, found from its checkpoints and from the record of the step in its log.

A checkpoint has the data position before its next step. From there on the rows follow from the config, unless the run
was resumed with another batch size. So the next checkpoint, or the record of the step, has to confirm them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.saved_checkpoint import SavedCheckpoint, find_checkpoints, open_checkpoint
from internlm.data.batch_plan import BatchPlan, StepRows
from internlm.utils.errors import CheckpointError, DamagedCheckpointError, Problem
from internlm.utils.logger import get_logger

log = get_logger()


@dataclass(frozen=True)
class StepEvidence:
    """Evidence of the rows of a step: the checkpoints around it, and the record of its rows."""

    before: SavedCheckpoint | None = None
    """Newest checkpoint that was saved at or before the step; None: the step follows from the start of the run."""
    after: SavedCheckpoint | None = None
    """Oldest checkpoint that was saved after the step."""
    record: StepRows | None = None
    """Rows of the step, as they were logged."""

    @property
    def world_size(self) -> int | None:
        """Number of processes of the run that read the step, if it is known."""
        return next((found.state.world_size for found in (self.after, self.before) if found), None)

    @property
    def seed(self) -> int | None:
        """Seed of the run, if it is known."""
        return next((found.state.seed for found in (self.before, self.after) if found), None)


@dataclass(frozen=True)
class LocatedStep:
    """Plan by which a step was read, and how sure this is."""

    plan: BatchPlan
    confirmed_by: str = ""
    """Checkpoint or file that confirms the rows; empty: they follow from the config alone."""
    contradiction: str = ""
    """Sentence that says why the rows cannot be known."""


def find_evidence(folder: str, step: int) -> StepEvidence:
    """Find the checkpoints around ``step``, and its record in the log of their run.

    Args:
        folder: Folder of checkpoints, or a checkpoint that was saved at or before the step.
        step: Index of the step.

    Raises:
        CheckpointError: ``folder`` has no checkpoint, or is one that was saved after the step, or cannot be read.
    """
    storage = open_storage(folder)
    found = [entry for entry in find_checkpoints(storage) if entry.is_committed and "." not in entry.name]
    if not found:  # a checkpoint itself, or neither
        location, name = split_checkpoint(folder)
        before = open_checkpoint(open_storage(location), name)
        if before.state.train_state.step > step:
            message = f"was saved at step {before.state.train_state.step}, after step {step} was read"
            raise CheckpointError(Problem(before.where, message, "Pass an earlier checkpoint, or the folder of all"))
        return StepEvidence(before, record=_record_of(before, step))

    def first(names: Iterator[str]) -> SavedCheckpoint | None:
        for name in names:
            try:
                return open_checkpoint(storage, name)
            except DamagedCheckpointError as error:
                log.warning(f"{name} does not verify: {error.problems[0]}")
        return None

    evidence = StepEvidence(
        before=first(entry.name for entry in found if entry.step <= step),
        after=first(entry.name for entry in reversed(found) if entry.step > step),
    )
    # The run that saved after the step has read it, or has resumed from what did, and keeps the records of that run.
    newest = evidence.after or evidence.before
    return StepEvidence(evidence.before, evidence.after, _record_of(newest, step) if newest else None)


def locate_step(plan: BatchPlan, step: int, evidence: StepEvidence) -> LocatedStep:
    """Return the plan by which ``step`` was read.

    Args:
        plan: Plan of the config, from the start of the run.
        step: Index of the step.
        evidence: What is known of the step.
    """
    before, after, record = evidence.before, evidence.after, evidence.record
    if before is not None:
        plan = plan.resumed_at(before.state.position)
    # What was logged when the step was trained is true whatever the config says now.
    if record is not None:
        return LocatedStep(plan.at(step, record), "the log of the run")
    if after is None:
        return LocatedStep(plan)
    # The plan has to arrive at the position of the next checkpoint. Another batch size would miss it by some rows.
    expected, position = plan.position(after.state.train_state.step), after.state.position
    if expected[:3] == position[:3]:
        return LocatedStep(plan, after.where)
    message = (
        f"the rows of step {step} cannot be known: with this config and --world, {after.where} would have been saved "
        f"at row {expected.row}, but it was saved at row {position.row}"
    )
    return LocatedStep(plan, contradiction=message)


def _record_of(checkpoint: SavedCheckpoint, step: int) -> StepRows | None:
    """Return the rows of ``step`` from the log of the run that saved ``checkpoint``; None if it has no record."""
    folder = checkpoint.state.run_folder
    if not folder:
        return None
    found, path = None, Path(folder) / "metrics.jsonl"
    if not path.is_file():  # the checkpoint may come from elsewhere
        return None
    with suppress(OSError, UnicodeError), path.open(encoding="utf-8") as lines:
        for line in lines:
            if f'"step": {step},' not in line:  # parsing all lines of a long run takes minutes
                continue
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                rows = StepRows(*(int(entry[f"data_{name}"]) for name in StepRows._fields))
                if entry["step"] == step and min(rows) >= 0 and rows.rows:
                    found = rows  # of several records, the last: a run may have repeated the step after a resume
    return found
