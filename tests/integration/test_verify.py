"""``internlm verify`` as a user types it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm.cli.main import main

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from internlm.cli.main import main; raise SystemExit(main())", "verify"]
DEBUG = str(ROOT / "configs" / "debug" / "internlm2.py")
#: Seconds that processes get to see that their parent has gone.
LAST_WORDS = 5.0


def _start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def _end(process: subprocess.Popen[str]) -> int:
    """Kill what is left, and return how many processes outlived ``process`` by more than a moment."""
    _wait_until(lambda: process.poll() is None or not _session(process))
    left = len(_session(process))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return left


def _session(process: subprocess.Popen[str]) -> list[str]:
    """Ids of the processes that ``process`` started, itself included, but for those that have ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = file.read_text().rpartition(")")[2].split()[:4]
            if session == str(process.pid) and state != "Z":
                found.append(file.parent.name)
    return found


def _wait_until(condition: Callable[[], bool], seconds: float = LAST_WORDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# -- within this process, whose server of ranks has torch loaded


def test_a_shipped_config_in_debug_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "7B_internlm2.py")
    options = ("--debug-size", "--steps", "2", "--set", "parallel.tensor.size=2", "--json", "report.json")
    assert main(["verify", config, *options, "--world", "2"]) == 0
    out = capfd.readouterr().out
    assert "2 ranks (mtp, tensor 2;" in out
    assert out.splitlines()[-1] == "PASS"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert len(report["losses"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]  # nothing else is written


def test_a_pipeline_with_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ("F0,F1,B0,B1", "F0,B0,F1,B1")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    sizes = ("--set", "parallel.pipeline.size=2", "--set", "data.micro_num=2", "--world", "2", "--steps", "2")
    assert main(["verify", DEBUG, *sizes, "--set", "parallel.pipeline.table=own.csv"]) == 0
    out = capfd.readouterr().out
    assert "pipeline 2 x 1 1F1B by own.csv" in out
    assert out.splitlines()[-1] == "PASS"


def test_a_typo_in_the_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.py"
    file.write_text(Path(DEBUG).read_text().replace("hidden_size", "hiden_size"))
    code, error = _refused(capfd, str(file))
    assert code == 2
    assert error.count("model.hiden_size: unknown key. Did you mean 'hidden_size'?") == 1, error


def test_a_device_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("INTERNLM_DEVICE", "cpu")
    code, error = _refused(capfd, DEBUG, "--device", "cuda")
    assert code == 2
    assert error == "--device: 'cuda' cannot be used: INTERNLM_DEVICE is 'cpu'. Use 'cpu'\n"


def test_a_mistake_that_a_rank_finds(capfd: pytest.CaptureFixture[str]) -> None:
    code, error = _refused(capfd, DEBUG, "--set", "data.train_folder=nowhere")
    assert code == 2
    assert error.count("nowhere: no such folder. Set data.train_folder to ") == 1, error


def _refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Return exit code and standard error of a command that is refused, which print no traceback."""
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments])
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return ended.value.code, error


#: A user's model: features are split over the tensor group, and normalised by their mean square over all of them.
OWN_MODEL = """
import torch.distributed as dist
from torch import nn

from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel import ParallelEmbedding, ParallelHead, ParallelLinear
from internlm.core.parallel.placement import normal
from internlm.model.registry import model_initializer


class WholeNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        square = x.detach().square().sum(-1, keepdim=True)
        dist.all_reduce(square, group=gpc.get_group(ParallelMode.MODE))
        return x / (square / self.size).sqrt()


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up = ParallelLinear(c.hidden_size, c.intermediate_size, normal(0.02))
        self.norm = WholeNorm(c.intermediate_size)
        self.down = ParallelLinear(c.intermediate_size, c.hidden_size, normal(0.02), role="row")

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)))


@model_initializer.register_module(module_name="OVER_MODE")
class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding = ParallelEmbedding(c.vocab_size, c.hidden_size, std=0.02, split_hidden=True)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.output = ParallelHead(c.hidden_size, c.vocab_size, normal(0.02))

    def forward(self, input_ids, cu_seqlens=None, indexes=None, labels=None, *, label_smoothing=0.0, grad_scale=1.0):
        x = self.embedding(input_ids.flatten())
        for layer in self.layers:
            x = layer(x)
        return self.output.loss(x, labels.flatten(), label_smoothing, grad_scale)

"""
CONFIG_OF_IT = """
import over_MODE

model_type = "OVER_MODE"
model = dict(num_layers=3, hidden_size=16, num_attention_heads=4, vocab_size=32, multiple_of=8)
data = dict(seq_len=16, micro_bsz=2, micro_num=2, total_steps=20)
adam = dict(lr=1e-3)
"""


def _own_model(folder: Path, mode: str) -> str:
    """Write a model whose sum is over the group of ``mode``, and its config; return the path of the config."""
    (folder / f"over_{mode}.py").write_text(OWN_MODEL.replace("MODE", mode))
    config = folder / f"config_{mode}.py"
    config.write_text(CONFIG_OF_IT.replace("MODE", mode))
    return str(config)


def test_the_culprit_in_a_model_of_the_users_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--world", "4", "--steps", "2", "--set", "parallel.tensor.size=2")
    assert main(["verify", _own_model(tmp_path, "TENSOR"), *options]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "PASS"
    wrong = _own_model(tmp_path, "DATA")
    assert main(["verify", wrong, *options, "--json", str(tmp_path / "report.json")]) == 1
    out = capfd.readouterr().out
    # As small as it gets: one layer, one micro-batch, and no data parallelism.
    assert "smallest layout that still differs: OVER_DATA, torch.float64, seed 1024, on cpu: 2 ranks (mtp" in out
    assert "culprit: layers.0.norm, forward\n  first to differ: output of layers.0.norm" in out
    assert "last to agree: input[0] of layers.0.norm" in out
    assert "collectives called there: all-reduce over this rank alone\n" in out
    location = json.loads((tmp_path / "report.json").read_text())["location"]
    assert location["culprit"]["module"] == "layers.0.norm"
    assert location["world_size"] == 2
    assert "--set model.num_layers=1" in location["command"]
    arguments = shlex.split(location["command"])[1:]
    assert main([*arguments, "--no-locate"]) == 1  # as the command says


def test_a_search_that_fails_leaves_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, module = _own_model(tmp_path, "DATA"), tmp_path / "over_DATA.py"
    raises = "if LEDGER.observer is not None:\n            raise RuntimeError('recorded')\n        "
    code = module.read_text().replace("square = ", f"{raises}square = ")
    module.write_text(f"from internlm.core.parallel.ledger import LEDGER\n{code}")
    options = ("--world", "2", "--steps", "1", "--set", "parallel.tensor.size=2", "--set", "model.num_layers=1")
    assert main(["verify", config, *options, "--debug-size", "--json", str(tmp_path / "report.json")]) == 1
    captured = capfd.readouterr()
    assert "FAIL, " in captured.out
    assert "no culprit, since the run that records all tensors failed: rank 0 of 1:" in captured.err
    assert "recorded" in captured.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"]
    assert report["location"] is None


# -- a process of its own


@pytest.mark.wide
def test_ranks_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    process = _start(DEBUG, "--set", "data.total_steps=100000", "--steps", "100000", cwd=tmp_path)
    try:
        assert _wait_until(lambda: len(_session(process)) > 3, 60)  # beside its helpers, a rank
        process.kill()
        process.communicate()
    finally:
        left = _end(process)
    assert left == 0
