"""Two runs with one save folder (F18): the second one ends and changes nothing, until the first one is dead."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from internlm.core.trainer import Hook, Trainer
from internlm.verify.processes import RankProcesses
from tests.dist.whole_runs import _fit, assert_same_tensors, fit, resume
from tests.faults.disk import Tree, tree_of
from tests.faults.recorded_runs import Scenario
from tests.harness.pool import ENVIRONMENT

#: Seconds that the first run may take to its third step, and then waits to be killed.
PATIENCE = 60


class _Waiting(Hook):
    """Wait before the fourth step, after a snapshot was saved."""

    def __init__(self, ready: Path) -> None:
        self.ready = ready

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == 3:
            self.ready.touch()
            time.sleep(PATIENCE)


def _saves(root: Path) -> Tree:
    return {name: content for name, content in tree_of(root).items() if name.startswith(("step-", "snapshot-"))}


@pytest.mark.wide  # tests/unit/checkpoint/test_lease.py has the rules, without a run
@pytest.mark.fault("F18")
def test_a_live_owner_keeps_its_folder_and_a_dead_one_loses_it(tmp_path: Path) -> None:
    """The second run watches the lease for seconds before it gives up."""
    keys, ready = Scenario().keys(tmp_path), tmp_path / "ready"
    owner = RankProcesses(2, ENVIRONMENT)
    try:
        owner.send(_fit, (tuple(keys), None, (_Waiting(ready),)))
        deadline = time.monotonic() + PATIENCE
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        before = _saves(tmp_path / "ckpts")
        assert {"snapshot-0", "snapshot-1", "step-2"} <= before.keys()
        refused = resume(2, keys)
        assert f"{tmp_path}/ckpts: owned by a live run (host " in refused.message
        assert f"pid {owner.processes[0].pid}" in refused.message
        assert _saves(tmp_path / "ckpts") == before
        for process in owner.processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    finally:
        owner.close()
    resumed = fit(2, keys)
    assert [warning for warning in resumed.ranks[0].warnings if "took over the lease of " in warning]
    straight = fit(2, Scenario().keys(tmp_path / "straight"))
    assert resumed.log == straight.log[3:]
    assert_same_tensors(resumed.tensors, straight.tensors)
