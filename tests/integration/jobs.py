"""Jobs as users start them, and what they leave behind.

A start of torchrun takes seconds, most of which go into importing torch in three processes. So only what needs a
launcher is started by one (:func:`train`, :func:`script`); the rest runs the same script on the ranks of the pool
(:func:`train_on_pool`).
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm.utils.lost_ranks import stop_beacons
from internlm.utils.stop_signals import stop_signals
from tests.harness.launch import Job, torchrun
from tests.harness.pool import run_ranks

ROOT = Path(__file__).parents[2]
Metrics = list[dict[str, Any]]


def train(ranks: int, config: str | Path, folder: Path, *overrides: str, options: Sequence[str] = ()) -> Job:
    """Run ``train.py`` under torchrun in ``folder``, with ``overrides`` of config keys and further ``options``."""
    return script("train.py", ranks, config, folder, *overrides, options=options)


def script(
    name: str,
    ranks: int,
    config: str | Path,
    folder: Path,
    *overrides: str,
    options: Sequence[str] = (),
    launcher: Sequence[str] = (),
) -> Job:
    """Run any script as :func:`train` runs its own; ``launcher`` are options of torchrun."""
    environment = {"PYTHONPATH": str(ROOT), "INTERNLM_DEVICE": "cpu"}
    args = _arguments(config, overrides, options)
    return torchrun(ranks, ROOT / name, *args, cwd=folder, env=environment, options=launcher)


def train_on_pool(ranks: int, config: str | Path, folder: Path, *overrides: str, options: Sequence[str] = ()) -> Job:
    """Run ``train.py`` on ranks of the pool; the exit code is that of the first rank that failed."""
    return script_on_pool("train.py", ranks, config, folder, *overrides, options=options)


def script_on_pool(
    name: str, ranks: int, config: str | Path, folder: Path, *overrides: str, options: Sequence[str] = ()
) -> Job:
    """Run any script as :func:`train_on_pool` runs its own."""
    args = [str(ROOT / name), *_arguments(config, overrides, options)]
    codes = run_ranks(ranks, _run_script, args, folder, timeout=240)
    stderr = "".join((folder / _stderr_of(rank)).read_text() for rank in range(ranks))
    for rank in range(ranks):
        (folder / _stderr_of(rank)).unlink()
    return Job(next((code for code in codes if code), 0), "", stderr, 0)


def _arguments(config: str | Path, overrides: Sequence[str], options: Sequence[str]) -> list[str]:
    return ["--config", str(ROOT / config), *options, *(word for text in overrides for word in ("--set", text))]


def _stderr_of(rank: int) -> str:
    return f"stderr-{rank}"


def _run_script(rank: int, world_size: int, args: Sequence[str], folder: Path) -> int:
    """Run a script as its own process would, and return its exit code."""
    argv, here, screen = sys.argv, Path.cwd(), os.dup(2)
    # The handlers of the log and the progress bar keep the stream that they found, so the file descriptor is replaced.
    with (folder / _stderr_of(rank)).open("w") as errors:
        os.dup2(errors.fileno(), 2)
        os.chdir(folder)
        sys.argv = list(args)
        try:
            runpy.run_path(args[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            stop_beacons()  # their thread would end this process after a failure of the script
            stop_signals().close()  # train.py handles them to the end of its process
            sys.stderr.flush()
            sys.argv = argv
            os.chdir(here)
            os.dup2(screen, 2)
            os.close(screen)
    return 0


def records(folder: Path) -> list[Path]:
    """Return the folders of the runs that were started in ``folder``, the oldest first."""
    return sorted((folder / "RUN").glob("*/*"), key=lambda path: path.stat().st_ctime_ns)


def metrics(record: Path) -> Metrics:
    """Return what a run logged, step by step."""
    return [line for line in lines(record) if "loss" in line]


def lines(record: Path) -> Metrics:
    """Return every line of a run's JSON-lines file."""
    return [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]


@functools.cache
def debug_losses(name: str, ranks: int) -> list[float]:
    """Return the losses of ``configs/debug/NAME.py`` on 1 or 2 ranks with one global batch. Run once a session."""
    with tempfile.TemporaryDirectory() as folder:
        job = train_on_pool(ranks, f"configs/debug/{name}.py", Path(folder), f"data.micro_num={2 // ranks}")
        assert job.returncode == 0, job.stderr
        (record,) = records(Path(folder))
        return [line["loss"] for line in metrics(record)]
