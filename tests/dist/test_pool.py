"""The harness itself: results, failures, hangs, and what is left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from internlm import accelerator
from internlm.utils.errors import DataError, Problem
from internlm.verify.processes import RankError, RankTimeoutError, run_world
from tests.harness.launch import run_job, torchrun
from tests.harness.pool import close_pools, pids, run_ranks


def _sum_of_ranks(rank: int, world_size: int, scale: float) -> float:
    value = torch.tensor(rank * scale)
    dist.all_reduce(value)
    return value.item()


def _leave_a_mess(rank: int, world_size: int) -> None:
    os.environ["LEFT_BY_A_TEST"] = "1"
    torch.rand(rank + 1)
    dist.new_group([0])


def _state(rank: int, world_size: int) -> tuple[bool, float, int, str, int]:
    group = dist.new_group([0, 1])
    return (
        "LEFT_BY_A_TEST" in os.environ,
        torch.rand(()).item(),
        torch.get_num_threads(),
        os.environ["RANK"],
        len(dist.get_process_group_ranks(group)),
    )


def _fail_on(rank: int, world_size: int, failing: int) -> None:
    if rank == failing:
        raise ValueError(f"planted on {rank}")
    dist.barrier()


def _die_on(rank: int, world_size: int, dying: int) -> None:
    if rank == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _wait_for_nothing(rank: int, world_size: int) -> None:
    if rank == 1:
        dist.recv(torch.zeros(1), src=0)


def _unpicklable(rank: int, world_size: int) -> object:
    return lambda: None


def _gone(pid: int) -> bool:
    """Whether a process has ended; its parent may not have collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    assert run_ranks(world_size, _sum_of_ranks, 0.5) == [sum(range(world_size)) * 0.5] * world_size


def test_workers_serve_many_calls() -> None:
    run_ranks(2, _sum_of_ranks, 1.0)
    before = pids(2)
    run_ranks(2, _sum_of_ranks, 1.0)
    assert pids(2) == before


def test_each_call_starts_clean() -> None:
    fresh = run_ranks(2, _state)
    run_ranks(2, _leave_a_mess)
    assert run_ranks(2, _state) == fresh
    assert [state[0] for state in fresh] == [False, False]
    assert fresh[0][1] == fresh[1][1]
    assert [state[2:] for state in fresh] == [(1, "0", 2), (1, "1", 2)]


class _Holder:
    def __init__(self) -> None:
        self.group, self.itself = dist.new_group([0, 1]), self


def _leave_groups(rank: int, world_size: int) -> None:
    _Holder()  # keeps its group until it is collected
    dist.barrier()


def test_ranks_that_wait_for_a_call_have_no_group() -> None:
    """Each group of gloo has a thread that polls: the groups of idle ranks would slow down all others."""
    close_pools()  # ranks that may have kept a group of a test before
    run_ranks(2, _leave_groups)
    deadline = time.monotonic() + 20
    while left := [thread for pid in pids(2) for thread in _threads(pid) if thread.startswith("gloo")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert run_ranks(2, _sum_of_ranks, 1.0) == [1.0, 1.0]


def _threads(pid: int) -> list[str]:
    names = []
    for file in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            names.append(file.read_text())
    return names


def test_tensors_travel() -> None:
    (doubled,) = run_ranks(1, _double, torch.arange(3.0))
    torch.testing.assert_close(doubled, torch.tensor([0.0, 2.0, 4.0]))


def _double(rank: int, world_size: int, value: torch.Tensor) -> torch.Tensor:
    return 2 * value


def test_the_first_failure_is_raised_and_the_pool_replaced() -> None:
    run_ranks(3, _sum_of_ranks, 1.0)
    before = pids(3)
    with pytest.raises(RankError, match=r"(?s)^rank 1 of 3:\nTraceback.*_fail_on.*ValueError: planted on 1"):
        run_ranks(3, _fail_on, 1)
    assert all(map(_gone, before))
    assert run_ranks(3, _sum_of_ranks, 1.0) == [3.0] * 3


def test_a_dead_rank_is_named_before_those_that_lost_it() -> None:
    with pytest.raises(RankError, match=r"rank 2 of 3:\ndied with exit code -9"):
        run_ranks(3, _die_on, 2)
    assert run_ranks(3, _sum_of_ranks, 1.0) == [3.0] * 3


def test_a_hang_is_reported_with_every_stack() -> None:
    run_ranks(2, _sum_of_ranks, 1.0)
    before = pids(2)
    with pytest.raises(RankTimeoutError) as caught:
        run_ranks(2, _wait_for_nothing, timeout=0.5)
    text = str(caught.value)
    assert text.startswith("rank 1 of 2: did not finish within 0.5 s\n")
    rank_0, rank_1 = text.split("--- rank ")[1:]
    assert "in _serve" in rank_0
    assert "_wait_for_nothing" not in rank_0
    assert "in _wait_for_nothing" in rank_1
    assert all(map(_gone, before))
    assert run_ranks(2, _sum_of_ranks, 1.0) == [1.0, 1.0]


def test_what_cannot_travel_is_an_error() -> None:
    with pytest.raises(RankError, match="_unpicklable"):
        run_ranks(2, _unpicklable)
    with pytest.raises(Exception, match="lambda"):
        run_ranks(2, lambda rank, world_size: None)


def test_closing_leaves_no_process() -> None:
    run_ranks(2, _sum_of_ranks, 1.0)
    before = pids(2)
    close_pools()
    assert all(map(_gone, before))
    assert pids(2) == []


# -- a world of its own


def _raise_user_error_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise DataError(Problem("here", "is wrong", "Correct it"))
    dist.barrier()


def test_a_world_answers_by_rank_and_ends() -> None:
    before = _children()
    assert run_world(3, _sum_of_ranks, (1.0,), 60) == [3.0, 3.0, 3.0]
    assert _children() == before


def _where(rank: int, world_size: int) -> tuple[str, str, str]:
    return dist.get_backend(), str(accelerator.current_device()), os.environ["INTERNLM_DEVICE"]


def test_a_world_of_an_accelerator_has_its_backend_and_device() -> None:
    """Where there is none, the processes are started in the same way, and compute on the CPU."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert run_world(1, _where, (), 60, "cuda") == [(accelerator.default_backend(), device, "cuda")]


def test_a_world_raises_the_error_that_a_user_can_fix() -> None:
    with pytest.raises(DataError, match=r"^here: is wrong. Correct it$"):
        run_world(2, _raise_user_error_on_one, (), 60)


def test_a_world_that_hangs_is_reported_and_ends() -> None:
    before = _children()
    with pytest.raises(RankTimeoutError, match=r"rank(s 0,)? 1 of 2: did not finish within 2 s\n--- rank 0"):
        run_world(2, _wait_for_nothing, (), 2)
    assert _children() == before


def _children() -> set[int]:
    """Process ids of the ranks of this session."""
    return {process.pid or 0 for process in multiprocessing.active_children()}


# -- a job of torchrun

#: Rank 1 fails after having printed.
FAILING = """
import os, sys
line = " ".join(["rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], *sys.argv[1:], os.environ["EXTRA"]])
os.write(1, (line + chr(10)).encode())  # at once, for torchrun's workers share one output and have no buffer
sys.exit(3 * int(os.environ["RANK"]))
"""
#: Starts a process in a session of its own, as torchrun does, and waits for it.
HANGING = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", worker.pid, flush=True)
worker.wait()
"""


def test_torchrun_returns_output_and_exit_codes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    job = torchrun(2, script, "work", env={"EXTRA": "more"}, cwd=tmp_path)
    assert (job.returncode, job.left_behind) == (1, 0)
    assert "rank 1 of 2 work more" in job.stdout.splitlines()
    assert "exitcode  : 3" in job.stderr


def test_a_job_that_hangs_is_killed_with_its_workers() -> None:
    with pytest.raises(TimeoutError, match=r"not finished after 2 s\nstarted \d+") as caught:
        run_job([sys.executable, "-c", HANGING], timeout=2)
    (worker,) = re.findall(r"started (\d+)", str(caught.value))
    assert _gone(int(worker))
