"""Real processes that are killed while they save: all of them (F3, F5), or one (F4)."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from internlm.utils.lost_ranks import EXIT_LOST_PEER
from internlm.verify.processes import RankError, RankProcesses
from tests.dist.test_lost_rank import GRACE, TIMEOUT, Fault, _run
from tests.dist.whole_runs import Outcome, _fit, assert_same_tensors, fit
from tests.faults.disk import Call, watched
from tests.faults.recorded_runs import Scenario
from tests.harness.pool import ENVIRONMENT
from tests.harness.ports import free_port
from tests.integration.jobs import debug_losses, metrics, records, script

MODES = {"F3": Scenario(), "F5": Scenario(overrides=("ckpt.async_upload=True",))}


class Killer:
    """Handler that kills processes before the ``last`` call that changes the save folder."""

    def __init__(self, pids: list[int], last: int) -> None:
        self.pids, self.left = pids, last

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        self.left -= 1
        if not self.left:
            for pid in sorted(self.pids, key=lambda pid: pid == os.getpid()):  # this one is the last
                os.kill(pid, signal.SIGKILL)
        return perform()


def _fit_until_killed(rank: int, world_size: int, keys: tuple[str, ...], folder: Path, caller: int, last: int) -> None:
    pids: list[Any] = [None] * world_size
    dist.all_gather_object(pids, os.getpid())
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    with watched(folder / "ckpts", Killer(pids, last if rank == caller else 0)):
        _fit(rank, world_size, keys, None, ())


@functools.cache
def _straight(fault: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return fit(2, MODES[fault].keys(Path(folder)))


#: Fault, rank whose call it is, and the number of the call.
KILLS = [("F3", 0, 41), ("F3", 1, 30), ("F5", 0, 77), ("F5", 1, 45)]
_choices = random.Random(14)
MORE_KILLS = [(_choices.choice(["F3", "F5"]), rank, _choices.randint(1, 70)) for rank in (0, 1) for _ in range(12)]


@pytest.mark.parametrize(
    ("fault", "caller", "last"),
    [
        pytest.param(*row, marks=[pytest.mark.fault(row[0]), *([] if row in KILLS else [pytest.mark.wide])])
        for row in dict.fromkeys([*KILLS, *MORE_KILLS])
    ],
)
def test_a_job_that_is_killed_resumes_bitwise(fault: str, caller: int, last: int, tmp_path: Path) -> None:
    keys = MODES[fault].keys(tmp_path)
    ranks = RankProcesses(2, ENVIRONMENT)
    try:
        with pytest.raises(RankError, match="died with exit code -9"):
            ranks.run(_fit_until_killed, (tuple(keys), tmp_path, caller, last), 60)
    finally:
        ranks.close()
    resumed, straight = fit(2, keys), _straight(fault)
    log = resumed.log
    assert 0 < len(log) <= 4
    assert log == straight.log[-len(log) :]
    assert_same_tensors(resumed.tensors, straight.tensors)
    left = sorted(name for name in os.listdir(tmp_path / "ckpts") if name.startswith(("step-", "snapshot-")))
    assert left == ["snapshot-0", "snapshot-1", "step-4"]


class _LastCall(Killer):
    """Handler that kills this process, and notes when."""

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        if self.left == 1:
            Path("failed").write_text(str(time.time()))
        return super().__call__(call, perform)


def _run_until_killed(
    rank: int, world_size: int, folder: Path, port: int, victim: Fault, last: int, overrides: tuple[str, ...]
) -> None:
    with watched(folder / "ckpt", _LastCall([os.getpid()], last if rank == victim.rank else 0)):
        _run(rank, world_size, folder, port, victim, overrides)


@pytest.mark.fault("F4")
@pytest.mark.parametrize(
    ("rank", "last", "overrides"),
    [
        (1, 9, ("ckpt.async_upload=True",)),
        pytest.param(0, 9, ("ckpt.async_upload=True",), marks=pytest.mark.wide),
        pytest.param(1, 9, (), marks=pytest.mark.wide),
        pytest.param(0, 45, (), marks=pytest.mark.wide),
    ],
)
def test_the_others_name_a_rank_that_is_killed_while_it_writes_and_publish_nothing(
    rank: int, last: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "ckpt").mkdir()
    ranks = RankProcesses(2, ENVIRONMENT)
    try:
        ranks.send(_run_until_killed, (tmp_path, free_port(), Fault(rank, "writing", "killed"), last, overrides))
        for process in ranks.processes:
            process.join(40)
        seconds = time.time() - float((tmp_path / "failed").read_text())
        codes = [process.exitcode for process in ranks.processes]
    finally:
        ranks.close()
    stderr = "".join((tmp_path / f"stderr-{of_rank}").read_text() for of_rank in (0, 1))
    assert stderr.count(f"rank {rank} is gone, last seen in ") == 1, stderr
    assert "Traceback" not in stderr, stderr
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == EXIT_LOST_PEER
    assert seconds < TIMEOUT + GRACE
    assert not list(tmp_path.glob("ckpt/step-?/"))


SCRIPT = """
import os
import runpy
from pathlib import Path

from tests.faults.disk import watched
from tests.faults.test_killed_jobs import Killer

root = Path("ckpts")
root.mkdir(exist_ok=True)
is_victim = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
with watched(root, Killer([os.getpid()], THIS_CALL if is_victim else 0)):
    runpy.run_path(TRAIN, run_name="__main__")
"""


@pytest.mark.wide
@pytest.mark.fault("F4")
def test_a_job_one_rank_of_which_is_killed_in_its_second_save_finishes_bitwise(tmp_path: Path) -> None:
    """With ``--max-restarts=1``; nothing of the save is published. A start of torchrun takes many seconds."""
    file = tmp_path / "script.py"
    train = Path(__file__).parents[2] / "train.py"
    file.write_text(SCRIPT.replace("THIS_CALL", "40").replace("TRAIN", repr(str(train))))
    ckpts = "ckpt.enable_save_ckpt=True", "ckpt.checkpoint_every=2", "ckpt.save_ckpt_folder=local:ckpts"
    overrides = (*ckpts, "data.micro_num=1")
    job = script(str(file), 2, "configs/debug/internlm2.py", tmp_path, *overrides, launcher=("--max-restarts=1",))
    assert (job.returncode, job.left_behind) == (0, 0), job.stderr
    assert job.stderr.count("ignored unfinished checkpoint step-4 in ") == 1, job.stderr
    assert re.search(r"resumed from .*/step-2 at step 2", job.stderr), job.stderr
    (record,) = records(tmp_path)
    losses = {line["step"]: line["loss"] for line in metrics(record)}
    assert [losses[step] for step in sorted(losses)] == debug_losses("internlm2", 2)
