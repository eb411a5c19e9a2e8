"""Runs of plans on the processes of this machine, and the comparison of each with one process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from internlm.accelerator import CPU
from internlm.verify.compare import LIMITS, Report, compare
from internlm.verify.configs import Plan
from internlm.verify.processes import RankError, RankProcesses
from internlm.verify.record import RankRecord
from internlm.verify.run import run_file


@dataclass
class Session:
    """Processes that run one plan after the other: starting them takes longer than a small plan.

    Args:
        source: Path of the config file, which each rank executes: it may register a user's own model.
        timeout: Seconds for each run.
        device_type: Type of the devices on which the ranks compute.
    """

    source: str
    timeout: float
    device_type: str = CPU.name
    slowest: float = 0.0
    """Seconds of the slowest run that has finished."""
    _worlds: dict[int, RankProcesses] = field(default_factory=dict)
    _references: dict[tuple[Any, ...], RankRecord] = field(default_factory=dict)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for world in self._worlds.values():
            world.close()

    def compare(self, plan: Plan, timeout: float | None = None) -> Report:
        """Run ``plan`` on its ranks and on one process, and compare the records.

        Args:
            plan: Plan to run.
            timeout: Seconds for each run (default: that of the session).

        Raises:
            UserError: A rank raised a UserError.
            RankError: A rank raised another exception, died, or did not finish in time.
        """
        return self.compare_records(plan, timeout=timeout)[0]

    def compare_records(
        self, plan: Plan, details_of: int | None = None, timeout: float | None = None
    ) -> tuple[Report, RankRecord, list[RankRecord]]:
        """Compare as :meth:`compare` does; return the records too, that of one process and those of the ranks.

        Args:
            plan: Plan to run.
            details_of: Index of a step to record in detail; None: none.
            timeout: Seconds for each run (default: that of the session).
        """
        timeout = self.timeout if timeout is None else timeout
        # Many smaller layouts have the same model and the same global batch.
        key = plan.reference.model_dump_json(), plan.seed, plan.steps, plan.data_size, details_of
        if key not in self._references:
            reference = plan.reference, plan.seed, plan.steps, plan.data_size, details_of
            self._references[key] = self._run(1, reference, timeout)[0]
        ranks = self._run(plan.world_size, (plan.config, plan.seed, plan.steps, 1, details_of), timeout)
        alone = self._references[key]
        limits = LIMITS[str(plan.config.model.dtype)]
        return compare(plan.config, alone, ranks, limits.of_later_steps if details_of else limits), alone, ranks

    def _run(self, world_size: int, args: tuple[Any, ...], timeout: float) -> list[RankRecord]:
        begin = time.monotonic()
        if world_size not in self._worlds:
            self._worlds[world_size] = RankProcesses(world_size, device_type=self.device_type)
        try:
            records = self._worlds[world_size].run(run_file, (self.source, *args), timeout)
        except RankError as error:
            # Ranks that failed may wait for one another: the next run starts others.
            self._worlds.pop(world_size).close()
            if error.user_error is not None:
                raise error.user_error from None
            raise
        self.slowest = max(self.slowest, time.monotonic() - begin)
        return records
