"""Hooks of ``--pipeline-trace`` (measured and simulated timeline of a step) and ``--profiling`` (profiler traces)."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from internlm.accelerator import Mark
from internlm.core.context.group import Group
from internlm.core.scheduler.executor import ActionMarks
from internlm.core.scheduler.timeline import Record, Timeline, measured_timeline
from internlm.core.scheduler.validate import simulate
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.pictures import chrome_trace, html
from internlm.profiler import StepTrace, memory_report
from internlm.train.hooks.log import own_plan
from internlm.utils.logger import get_logger

log = get_logger()

#: Step of the run to record, counted from 1. Steps 1 and 2 are slower: they allocate memory and fill caches.
RECORDED = 3


class RecordPipeline(Hook):
    """Hook that records one training step of the pipeline, and draws its measured and its simulated timeline.

    The simulation uses the measured costs of the actions. The hook writes ``pipeline.html``, and
    ``pipeline-trace.json`` for Perfetto or chrome://tracing.

    Args:
        stages: Group of the stages of this rank's pipeline.
        folder: Folder to write to, on one rank of one pipeline; None on all other ranks.
    """

    def __init__(self, stages: Group, folder: Path | None) -> None:
        self.stages, self.folder = stages, folder
        self.steps = 0
        self.start: Mark | None = None
        self.actions: list[ActionMarks] = []

    def before_step(self, trainer: Trainer) -> None:
        """Start recording before step :data:`RECORDED` of this run."""
        self.steps += 1
        if self.steps == RECORDED:
            trainer.scheduler.after_action = self.actions.append
            dist.barrier(self.stages.handle)  # common origin of time for all stages
            self.start = Mark()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Gather the records of all stages after the recorded step, and draw the pipeline."""
        if self.start is None or not self.actions:
            return
        own = [marks.record(self.start) for marks in self.actions]
        trainer.scheduler.after_action = None
        self.actions.clear()
        # Clocks of different machines differ, so times are relative to the barrier.
        records: list[list[Record]] = [[]] * self.stages.size
        dist.all_gather_object(records, own, self.stages.handle)
        if self.folder is not None:
            table = trainer.scheduler.table(report.shape.micro_num)
            # Simulate with the measured costs, so that the timelines differ only in waits that costs do not explain.
            measured = measured_timeline(table, records)
            self._draw(self.folder, report.step + 1, simulate(table, measured.costs), measured)

    def _draw(self, folder: Path, step: int, simulated: Timeline, measured: Timeline) -> None:
        both = [("simulated", simulated), ("measured", measured)]
        (folder / "pipeline.html").write_text(html(both, seconds=True), encoding="utf-8")
        (folder / "pipeline-trace.json").write_text(chrome_trace(both), encoding="utf-8")
        summary = ", ".join(f"{name} {t.end * 1e3:.1f} ms, {t.bubble:.1%} idle" for name, t in both)
        log.info(f"pipeline of step {step} in {folder / 'pipeline.html'}: {summary}")

    def after_run(self, trainer: Trainer) -> None:
        """Warn if the run was too short to record a step."""
        if self.steps < RECORDED and self.folder is not None:
            log.warning(f"--pipeline-trace: nothing was recorded: expected at least {RECORDED} steps, got {self.steps}")


class ProfileRun(Hook):
    """Hook that writes a torch profiler trace of a few steps, and a report that compares measured and planned memory.

    Args:
        folder: Folder of the trace and of ``memory-rank<rank>.txt``.
        rank: Rank of this process, part of the file names.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.trace = StepTrace(folder, rank)

    def before_run(self, trainer: Trainer) -> None:
        """Start the profiler."""
        self.trace.start()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Advance the schedule of the profiler by one step."""
        self.trace.step()

    def after_run(self, trainer: Trainer) -> None:
        """Stop the profiler, and write the memory report."""
        self.trace.stop()
        report = memory_report(trainer.model, trainer.optimizer, own_plan(trainer.model))
        (self.folder / f"memory-rank{self.rank}.txt").write_text(report)
