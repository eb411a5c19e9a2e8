"""The harness itself: results, failures, hangs, and what is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness.launch import torchrun
from tests.harness.pool import RankError, RankTimeoutError, close_pools, pids, run_ranks


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
    assert text.startswith("ranks [1] not finished after 0.5 s")
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


SCRIPT = """
import os, sys, time
mode, folder = sys.argv[1:]
open(os.path.join(folder, str(os.getpid())), "w").close()
line = " ".join(["rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], os.environ["EXTRA"]])
os.write(1, (line + chr(10)).encode())  # at once, for torchrun's workers share one output and have no buffer
if mode == "hang":
    time.sleep(600)
sys.exit(3 if mode == "fail" else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "pids").mkdir()
    return path


def test_torchrun_returns_what_the_ranks_print(script: Path) -> None:
    job = torchrun(2, script, "work", "pids", env={"EXTRA": "more"}, cwd=script.parent)
    assert (job.returncode, job.left_behind) == (0, 0)
    assert sorted(job.stdout.splitlines()) == ["rank 0 of 2 more", "rank 1 of 2 more"]


def test_torchrun_reports_a_failing_rank(script: Path) -> None:
    job = torchrun(1, script, "fail", "pids", env={"EXTRA": ""}, cwd=script.parent)
    assert (job.returncode, job.left_behind) == (1, 0)
    assert "exitcode  : 3" in job.stderr


def test_torchrun_that_hangs_is_killed_with_its_workers(script: Path) -> None:
    with pytest.raises(TimeoutError, match=r"script\.py not finished after 6 s\nrank 0 of 1"):
        torchrun(1, script, "hang", "pids", env={"EXTRA": ""}, cwd=script.parent, timeout=6)
    (worker,) = (script.parent / "pids").iterdir()
    assert _gone(int(worker.name))
