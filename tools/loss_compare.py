"""Whether a change left the losses as they were, bit by bit.

``python tools/loss_compare.py A B`` compares two runs: their ``metrics.jsonl`` files, or the folders that hold them.
``python tools/loss_compare.py`` runs the debug configs and compares them with tests/golden; with ``--update`` it
records them anew, which is for changes that are meant to change numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "debug"
GOLDEN = ROOT / "tests" / "golden"
#: Relative difference that another machine or another torch may make.
ELSEWHERE = 1e-5

Losses = dict[int, float]


class Difference(NamedTuple):
    """The first step in which two runs differ; NaN stands for a step that a run lacks."""

    step: int
    one: float
    other: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.one!r} and {self.other!r}"


def read_losses(path: Path) -> Losses:
    """Losses by step from a ``metrics.jsonl`` or the one below a folder; of a step logged twice, the later one."""
    files = sorted(path.rglob("metrics.jsonl")) if path.is_dir() else [path]
    if len(files) != 1:
        raise SystemExit(f"{path}: holds {len(files)} files metrics.jsonl. Name one of them")
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    return {line["step"]: float(line["loss"]) for line in lines if "loss" in line}


def first_difference(one: Losses, other: Losses, relative: float = 0.0) -> Difference | None:
    """Where two runs first differ by more than ``relative``; None where they don't."""
    for step in sorted(one.keys() | other.keys()):
        a, b = one.get(step, math.nan), other.get(step, math.nan)
        both_nan = math.isnan(a) and math.isnan(b) and step in one and step in other
        if not (both_nan or math.isclose(a, b, rel_tol=relative, abs_tol=0.0)):
            return Difference(step, a, b)
    return None


#: Fields of /proc/cpuinfo that together name a processor; virtual machines give the same model name to several.
CPU_FIELDS = "model name", "cpu family", "model", "stepping"


def machine() -> dict[str, str]:
    """Return what the bits of a loss depend on beside the code."""
    processor = platform.processor() + platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = (line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines())
        found = {name.strip(): value.strip() for name, _, value in lines}
        processor = "; ".join([processor, *(found.get(name, "") for name in CPU_FIELDS)])
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": hashlib.sha256(processor.encode()).hexdigest()[:12],
    }


def golden_difference(losses: Losses, name: str) -> Difference | None:
    """Where ``losses`` leave those recorded for a debug config: exactly on the same kind of machine, else roughly."""
    recorded = json.loads((GOLDEN / f"{name}.json").read_text())
    relative = 0.0 if recorded["machine"] == machine() else ELSEWHERE
    return first_difference(losses, dict(enumerate(recorded["losses"])), relative)


def record(losses: Losses, name: str) -> None:
    """Make ``losses`` the golden ones of a debug config."""
    content: dict[str, Any] = {"machine": machine(), "losses": [losses[step] for step in sorted(losses)]}
    (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


#: The kernels that the tests use, instead of those that are fastest on this machine.
KERNELS = "gemm=onednn,grad_weight=float32,attention=blocked"


def run(config: Path) -> Losses:
    """Train ``config`` with one process and one thread on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "INTERNLM_DEVICE": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    environment["INTERNLM_CPU_KERNELS"] = KERNELS
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*torchrun, str(ROOT / "train.py"), "--config", str(config), "--set", f"log_folder={folder}"]
        subprocess.run(command, env=environment, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        return read_losses(Path(folder))


def compare_golden(update: bool) -> bool:
    """Compare, or record, every debug config; whether all is well."""
    fine = True
    for config in sorted(CONFIGS.glob("*.py")):
        losses = run(config)
        if update:
            record(losses, config.stem)
        difference = golden_difference(losses, config.stem)
        print(f"{config.stem}: {difference or 'equal'}")
        fine &= difference is None
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 where all is equal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="two metrics.jsonl files, or their folders")
    parser.add_argument("--update", action="store_true", help="record the losses of the debug configs anew")
    given = parser.parse_args(arguments)
    if given.runs and (given.update or len(given.runs) != 2):
        parser.error("give two runs; or none, and perhaps --update")
    if not given.runs:
        return 0 if compare_golden(given.update) else 1
    difference = first_difference(*map(read_losses, given.runs))
    print(difference or "equal")
    return 0 if difference is None else 1


if __name__ == "__main__":
    sys.exit(main())
