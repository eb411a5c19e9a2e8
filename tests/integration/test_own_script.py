"""A script with a user's own model: trained, stopped by a signal, and started anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.launch import Job
from tests.harness.ports import free_port
from tests.integration.jobs import ROOT, metrics, records, script, script_on_pool
from tests.unit.data.files import write_bin

#: Figures of a step that don't depend on time.
TIMELESS = ("step", "loss", "grad_norm", "lr", "num_consumed_tokens", "acc", "perplexity")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples in which each token tells the next one."""
    folder = tmp_path_factory.mktemp("data")
    samples = [[(start + 5 * i) % 32 for i in range(40)] for start in range(200)]
    write_bin(folder / "en" / "a.bin", samples)
    return folder


NAME, CONFIG = "tests/integration/scripts/own_model.py", "configs/debug/llama2.py"


def _overrides(data: Path, every: int = 100) -> tuple[str, ...]:
    return (
        f"data.train_folder={data}", "adam.lr=0.03", "data.micro_num=1", "ckpt.enable_save_ckpt=True",
        f"ckpt.checkpoint_every={every}", "ckpt.save_ckpt_folder=local:ckpts",
    )  # fmt: skip


def _run(folder: Path, data: Path, *options: str, every: int = 100, launcher: tuple[str, ...] = ()) -> Job:
    return script(NAME, 2, CONFIG, folder, *_overrides(data, every), options=options, launcher=launcher)


def _log(folder: Path) -> list[tuple[float, ...]]:
    """Timeless figures of all runs in ``folder``."""
    return [tuple(line[key] for key in TIMELESS) for record in records(folder) for line in metrics(record)]


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    job = script_on_pool(NAME, 2, CONFIG, folder, *_overrides(data))
    assert job.returncode == 0, job.stderr
    return folder


def _saved(folder: Path) -> list[str]:
    """Names in the save folder but for hidden files."""
    return [path.name for path in (folder / "ckpts").iterdir() if not path.name.startswith(".")]


def test_it_learns(straight: Path) -> None:
    losses = [loss for _, loss, *_ in _log(straight)]
    assert losses[-1] < losses[0] / 2
    assert _saved(straight) == ["step-20"]


@pytest.mark.wide  # the next one sends it to the launcher as well
def test_sigterm_to_one_rank(straight: Path, data: Path, tmp_path: Path) -> None:
    """Every rank saves and exits with 143; until then the log is that of the straight run, bit by bit."""
    job = _run(tmp_path, data, "--signal_step", "7")
    assert job.returncode == 1
    assert "SIGTERM on rank 1: saved step 8, exiting 143" in job.stderr
    assert job.stderr.count("exitcode  : 143") == 2, job.stderr
    assert job.left_behind == 0
    assert _saved(tmp_path) == ["step-8"]
    assert _log(tmp_path) == _log(straight)[:8]


def test_sigterm_to_the_launcher_and_a_rank_in_the_same_second(straight: Path, data: Path, tmp_path: Path) -> None:
    """The launcher passes it on, so one rank receives two, and the other one: a single request."""
    job = _run(tmp_path, data, "--signal_step", "7", "--send_to_launcher")
    assert job.returncode == 1
    assert job.stderr.count("saved step 8, exiting 143") == 1, job.stderr
    assert job.left_behind == 0
    assert _saved(tmp_path) == ["step-8"]
    assert _log(tmp_path) == _log(straight)[:8]


def test_a_job_that_is_started_anew_goes_on(straight: Path, data: Path, tmp_path: Path) -> None:
    """The launcher keeps its store, in which the dead have left their addresses. The rank that is left logs a line."""
    job = _run(tmp_path, data, "--signal_step", "7", "--send", "9", every=5, launcher=("--max-restarts=1",))
    assert (job.returncode, job.left_behind) == (0, 0), job.stderr
    (_,) = records(tmp_path)  # both attempts write to one folder
    assert job.stderr.count("rank 1 is gone, last seen in ") == 1, job.stderr
    assert "/internlm/" not in job.stderr  # no traceback of the one that is left
    whole, both = _log(straight), _log(tmp_path)
    first = len(both) - len(whole[5:])
    assert first >= 5
    assert both == [*whole[:first], *whole[5:]]


@pytest.mark.wide
def test_gloo_has_no_thread_when_the_interpreter_ends(tmp_path: Path) -> None:
    """One that still holds a tensor then would, now and then, abort the process."""
    command = [sys.executable, "-m", "tests.integration.scripts.leaving", "--config", "configs/debug/llama2.py"]
    command += ["--set", "data.total_steps=1", "--set", f"log_folder={tmp_path}"]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **alone, "MASTER_PORT": str(free_port()), "INTERNLM_DEVICE": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    threads = done.stdout.split()
    assert threads
    assert not [name for name in threads if "gloo" in name]
