"""``internlm train``: the exit codes of its ranks, restarts, signals to it and to its ranks, and its own death."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.harness.launch import Job, run_job
from tests.integration.jobs import ROOT, metrics, records

#: A config that trains long enough, and acts when a condition holds: the process of each rank executes it.
CONFIG = """
import os as _os, signal as _signal, threading as _threading, time as _time

exec(open({base!r}).read())
data.update(total_steps={total})
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder="ckpts", checkpoint_every=5)
RANK, ATTEMPT = (int(_os.environ.get(name, "0")) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
with open(f"pid-{{RANK}}", "w") as _file:
    print(_os.getpid(), file=_file)


def _act():
    while not ({condition}):
        _time.sleep(0.001)
    {action}


_threading.Thread(target=_act, daemon=True).start()
"""
SAVED = "_os.path.exists('ckpts/step-{step}/state.json')"


#: Waits until all ranks have ended, also those that the launcher has left behind; then exits as the launcher did.
WAIT = (
    '"$@"; code=$?; for pid in $(cat pid-*); do while kill -0 $pid 2> /dev/null; do sleep 0.1; done; done; exit $code'
)


def _run(folder: Path, *options: str, condition: str = "False", action: str = "pass", total: int = 100_000) -> Job:
    base = str(ROOT / "configs/debug/llama2.py")
    config = CONFIG.format(base=base, total=total, condition=condition, action=action)
    (folder / "config.py").write_text(config)
    command = [sys.executable, "-m", "internlm", "train", "config.py", *options]
    environment = {"PYTHONPATH": str(ROOT), "INTERNLM_DEVICE": "cpu"}
    return run_job(["sh", "-c", WAIT, "sh", *command], timeout=120, env=environment, cwd=folder)


def _saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "ckpts").glob("step-*"))


def _assert_one_line(job: Job, text: str) -> None:
    assert job.stderr.count(text) == 1, job.stderr
    assert "Traceback" not in job.stderr, job.stderr
    assert job.left_behind == 0


def test_a_signal_to_the_launcher_saves_and_gives_its_exit_code(tmp_path: Path) -> None:
    job = _run(tmp_path, "--nproc-per-node=2", condition=f"RANK == 1 and {SAVED.format(step=5)}",
               action="_os.kill(_os.getppid(), _signal.SIGINT)")  # fmt: skip
    assert job.returncode == 130, job.stderr
    last = _saved(tmp_path)[-1]
    _assert_one_line(job, f": saved step {last}, exiting 130")
    (record,) = records(tmp_path)
    assert metrics(record)[-1]["step"] == last - 1


@pytest.mark.wide  # test_own_script.py has a restart that goes on to the end
def test_a_rank_that_dies_three_times_is_restarted_twice(tmp_path: Path) -> None:
    """Each attempt resumes from the checkpoints of the one before."""
    attempts = " or ".join(f"ATTEMPT == {n} and {SAVED.format(step=5 * (n + 1))}" for n in range(3))
    job = _run(tmp_path, "--nproc-per-node=2", "--max-restarts=2", condition=f"RANK == 1 and ({attempts})",
               action="_os.kill(_os.getpid(), 9)")  # fmt: skip
    assert job.returncode == 3, job.stderr
    assert job.stderr.count("resumed from ") == 2, job.stderr
    assert job.stderr.count("rank 1 was killed by SIGKILL. A rank that is out of host memory gets SIGKILL") == 3
    assert job.stderr.count("restarting all ranks") == 2
    assert "Traceback" not in job.stderr
    assert job.left_behind == 0


def test_an_error_of_the_user_is_not_followed_by_a_restart(tmp_path: Path) -> None:
    job = _run(tmp_path, "--nproc-per-node=1", "--max-restarts=3", "--set", "data.train_folder=nowhere")
    assert job.returncode == 2
    _assert_one_line(job, "nowhere: no such folder. ")
    assert len([line for line in job.stderr.splitlines() if " INFO " not in line]) == 1, job.stderr


def test_ranks_whose_launcher_was_killed_save_and_stop(tmp_path: Path) -> None:
    job = _run(tmp_path, "--nproc-per-node=2", condition=f"RANK == 1 and {SAVED.format(step=5)}",
               action="_os.kill(_os.getppid(), 9)")  # fmt: skip
    assert job.returncode == 128 + 9
    last = _saved(tmp_path)[-1]
    _assert_one_line(job, f"died: saved step {last}, exiting 143")
    assert "the launcher of rank" in job.stderr


def test_one_process_is_a_rank_itself(tmp_path: Path) -> None:
    """A second signal quits at once, and leaves the checkpoints as they are."""
    action = "; ".join(["_os.kill(_os.getpid(), _signal.SIGINT)", "_time.sleep(3.2)"] * 2)
    condition = f"{SAVED.format(step=5)}"
    slow = "exec('import torch; torch.nn.Module.__call__ = lambda *_, **__: _time.sleep(9)')"
    job = _run(tmp_path, condition=condition, action=f"{slow}; {action}")
    assert job.returncode == 130, job.stderr
    _assert_one_line(
        job, "SIGINT on rank 0: finishing the step before exiting 130; another signal after 3 s or more quits"
    )
    _assert_one_line(job, "SIGINT on rank 0 again: exiting 130 at once. Complete checkpoints stay intact")
    assert _saved(tmp_path)


@pytest.mark.wide
def test_a_run_that_ends_has_exit_code_0(tmp_path: Path) -> None:
    job = _run(tmp_path, total=3)
    assert job.returncode == 0, job.stderr
    assert _saved(tmp_path) == [3]


def test_a_rank_starts_no_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "pid-0").touch()
    job = _run(tmp_path, "--nproc-per-node=2")
    assert job.returncode == 2
    assert job.stderr == (
        "--nproc-per-node: given, but RANK is set: this process is a rank already. Use one launcher only\n"
    )
