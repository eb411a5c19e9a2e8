"""Jobs as users start them, and what they leave behind."""

from __future__ import annotations

import functools
import json
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness.launch import Job, torchrun

ROOT = Path(__file__).parents[2]
Metrics = list[dict[str, Any]]


def train(ranks: int, config: str | Path, folder: Path, *overrides: str, options: Sequence[str] = ()) -> Job:
    """Run ``train.py`` in ``folder``, with ``overrides`` of config keys and further ``options``."""
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
    """As :func:`train`, for another script; with options of the ``launcher``, torchrun."""
    sets = [word for override in overrides for word in ("--set", override)]
    environment = {"PYTHONPATH": str(ROOT), "INTERNLM_DEVICE": "cpu"}
    args = ("--config", str(ROOT / config), *options, *sets)
    return torchrun(ranks, ROOT / name, *args, cwd=folder, env=environment, options=launcher)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def records(folder: Path) -> list[Path]:
    """Folders of the runs that were started in ``folder``, the oldest first."""
    return sorted((folder / "RUN").glob("*/*"), key=lambda path: path.stat().st_ctime_ns)


def metrics(record: Path) -> Metrics:
    """What a run logged, step by step."""
    return [line for line in lines(record) if "loss" in line]


def lines(record: Path) -> Metrics:
    """Every line of a run's JSON-lines file."""
    return [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]


@functools.cache
def debug_losses(name: str, ranks: int) -> list[float]:
    """The losses of ``configs/debug/NAME.py`` on 1 or 2 ranks, which share one global batch. Run once a session."""
    with tempfile.TemporaryDirectory() as folder:
        job = train(ranks, f"configs/debug/{name}.py", Path(folder), f"data.micro_num={2 // ranks}")
        assert (job.returncode, job.left_behind) == (0, 0), job.stderr
        (record,) = records(Path(folder))
        return [line["loss"] for line in metrics(record)]
