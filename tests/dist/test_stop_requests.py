"""Requests to save or to stop, which all ranks follow at the same step: signals, the stop file, and threads."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.accelerator import kinds
from internlm.accelerator.kinds import CPU, DeviceKind
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.train.hooks import FollowRequests
from internlm.utils.stop_requests import Request
from internlm.utils.stop_signals import REPEAT_SECONDS
from tests.dist.whole_runs import Outcome, Rank, assert_same_tensors, build_run, finish_run, fit, saving, take_signals
from tests.harness.pool import run_ranks

SIGNALLED = ["data.valid_every=2", "data.valid_max_batches=2"]


class _Signal(Hook):
    """Send this process a signal, on one rank, somewhere in one step; ``times`` times, ``apart`` seconds."""

    def __init__(self, number: int, rank: int, step: int, where: str, times: int = 1, apart: float = 0) -> None:
        self.number, self.rank, self.step, self.where = number, rank, step, where
        self.times, self.apart = times, apart

    def before_run(self, trainer: Trainer) -> None:
        trainer.model.register_forward_pre_hook(lambda model, inputs: self._reached("forward", trainer, model.training))
        trainer.model.register_forward_pre_hook(
            lambda model, inputs: self._reached("eval", trainer, not model.training)
        )

    def before_step(self, trainer: Trainer) -> None:
        self._reached("before", trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self._reached("after", trainer)

    def after_run(self, trainer: Trainer) -> None:
        self._reached("after the run", trainer)

    def _reached(self, where: str, trainer: Trainer, really: bool = True) -> None:
        here = (where, trainer.state.step, os.environ["RANK"]) == (self.where, self.step, str(self.rank))
        if here and really:
            self.step = -1
            for repeat in range(self.times):
                time.sleep(self.apart if repeat else 0)
                os.kill(os.getpid(), self.number)


class _Accelerator(DeviceKind):
    """The CPU, treated as if reading a tensor of the current step were a host sync."""

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor

    def read(self, tensor: Tensor) -> Tensor:
        return tensor

    def begin_copy(self, tensor: Tensor) -> tuple[Tensor, torch.Event]:
        return tensor.clone(), torch.Event("cpu")


class _OnAccelerator(Hook):
    def before_run(self, trainer: Trainer) -> None:
        kinds._KINDS["cpu"] = _Accelerator(name="cpu", backend="gloo")

    def after_run(self, trainer: Trainer) -> None:
        kinds._KINDS["cpu"] = CPU


def _on(device: str) -> list[Hook]:
    return [_OnAccelerator()] if device == "accelerator" else []


def _saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "ckpts").glob("step-*"))


def _records(folder: Path) -> list[dict[str, Any]]:
    (records,) = (folder / "logs" / "internlm").iterdir()
    return [json.loads(line) for line in (records / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that nobody stops."""
    return fit(2, saving(tmp_path_factory.mktemp("straight"), *SIGNALLED, every=3, total=8))


# -- signals


@pytest.mark.parametrize(
    ("number", "where", "step", "last"),
    [
        (signal.SIGTERM, "before", 3, 4),
        (signal.SIGINT, "forward", 3, 4),
        (signal.SIGTERM, "eval", 4, 4),
        (signal.SIGINT, "after", 4, 4),
        pytest.param(signal.SIGTERM, "forward", 3, 4, marks=pytest.mark.wide),
        pytest.param(signal.SIGTERM, "after", 4, 4, marks=pytest.mark.wide),
    ],
)
def test_a_signal_to_one_rank(number: int, where: str, step: int, last: int, straight: Outcome, tmp_path: Path) -> None:
    """All ranks stop at most one step later, save, and exit alike; the resumed run is the straight one."""
    overrides = saving(tmp_path, *SIGNALLED, every=3, total=8)
    stopped = fit(2, overrides, hooks=[_Signal(number, 1, step, where)])
    code = 128 + number
    assert stopped.message == f"exit {code}"
    assert stopped.state["step"] == last
    name = signal.Signals(number).name
    assert stopped.ranks[0].warnings == [f"{name} on rank 1: saved step {last}, exiting {code}"]
    assert _saved_steps(tmp_path) == ["step-3", f"step-{last}"]
    # A validation ends before the next batch: a long one would outlast the patience of whoever sent the signal.
    assert [record["step"] for record in _records(tmp_path) if "valid/loss" in record] == [1, *[3] * (where == "after")]
    resumed = fit(2, overrides)
    assert stopped.log + resumed.log == straight.log
    assert_same_tensors(resumed.tensors, straight.tensors)


def test_a_second_signal_quits_at_once(tmp_path: Path) -> None:
    straight = fit(1, saving(tmp_path / "straight", every=3, total=8))
    twice = _Signal(signal.SIGINT, 0, 4, "before", times=2, apart=REPEAT_SECONDS + 0.1)
    stopped = fit(1, saving(tmp_path, every=3, total=8), hooks=[twice])
    assert stopped.message == "exit 130"
    assert "SIGINT on rank 0 again: exiting 130 at once. Complete checkpoints stay intact" in stopped.ranks[0].warnings
    assert _saved_steps(tmp_path) == ["step-3"]
    resumed = fit(1, saving(tmp_path, every=3, total=8))
    assert stopped.log[:3] + resumed.log == straight.log
    assert [line["step"] for line in _records(tmp_path) if "loss" in line] == [*range(len(stopped.log)), *range(3, 8)]


def test_signals_in_quick_succession_are_one_request(tmp_path: Path) -> None:
    """As where a rank receives one from whoever ends the job, and another from its launcher."""
    repeated = _Signal(signal.SIGTERM, 1, 4, "before", times=3, apart=0.01)
    stopped = fit(2, saving(tmp_path, every=3, total=8), hooks=[repeated])
    assert stopped.message == "exit 143"
    assert _saved_steps(tmp_path) == ["step-3", "step-5"]


def test_on_an_accelerator_a_signal_is_read_one_step_later(tmp_path: Path) -> None:
    hooks = [_OnAccelerator(), _Signal(signal.SIGTERM, 1, 3, "before")]
    stopped = fit(2, saving(tmp_path, every=3, total=8), hooks=hooks)
    assert stopped.message == "exit 143"
    assert _saved_steps(tmp_path) == ["step-3", "step-5"]


@pytest.mark.parametrize(("device", "where", "step"), [("cpu", "after", 8), ("accelerator", "before", 7)])
def test_a_signal_in_the_last_step(device: str, where: str, step: int, tmp_path: Path) -> None:
    """The run is done, and the exit code says that it was stopped."""
    overrides = saving(tmp_path, every=3, total=8)
    done = fit(2, overrides, hooks=[*_on(device), _Signal(signal.SIGTERM, 1, step, where)])
    assert (done.state["step"], done.message) == (8, "exit 143")
    assert done.ranks[0].warnings == ["SIGTERM on rank 1: saved step 8, exiting 143"]
    assert _saved_steps(tmp_path) == ["step-3", "step-6", "step-8"]


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGTERM, marks=pytest.mark.wide)])
def test_a_signal_after_the_last_exchange_gives_the_exit_code(number: int, tmp_path: Path) -> None:
    """Of the rank that received it, which logs it."""
    done = fit(1, saving(tmp_path, total=2), hooks=[_Signal(number, 0, 2, "after the run")])
    name, code = signal.Signals(number).name, 128 + number
    assert (done.message, done.ranks[0].warnings) == (
        f"exit {code}",
        [f"{name} on rank 0: step 2 is saved, exiting {code}"],
    )


@pytest.mark.parametrize(("device", "saved"), [("cpu", "step-4"), ("accelerator", "step-5")])
def test_sigusr1_saves_and_training_goes_on(device: str, saved: str, straight: Outcome, tmp_path: Path) -> None:
    hooks = [*_on(device), _Signal(signal.SIGUSR1, 1, 3, "before")]
    done = fit(2, saving(tmp_path, *SIGNALLED, every=3, total=8), hooks=hooks)
    assert _saved_steps(tmp_path) == ["step-3", saved, "step-6", "step-8"]
    assert done.log == straight.log or device == "accelerator"  # whose kernels differ
    assert not done.message.startswith("exit")


def test_a_stop_and_a_save_in_one_step_are_both_followed(tmp_path: Path) -> None:
    hooks = [_Signal(signal.SIGUSR1, 1, 3, "before"), _Signal(signal.SIGINT, 0, 3, "before")]
    stopped = fit(2, saving(tmp_path, every=3, total=8), hooks=hooks)
    assert stopped.message == "exit 130"
    assert stopped.ranks[0].warnings == ["SIGINT on rank 0: saved step 4, exiting 130"]
    assert _saved_steps(tmp_path) == ["step-3", "step-4"]


def test_a_run_without_checkpoints_is_stopped_unsaved(tmp_path: Path) -> None:
    overrides = [f"log_folder={tmp_path}", "data.total_steps=8"]
    stopped = fit(2, overrides, hooks=[_Signal(signal.SIGTERM, 1, 3, "before")])
    assert stopped.message == "exit 143"
    assert stopped.ranks[0].warnings == ["SIGTERM on rank 1: step 4 is not saved, exiting 143"]


# -- the stop file


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_the_stop_file_saves_and_stops_after_its_step(device: str, straight: Outcome, tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("5\n")
    overrides = saving(tmp_path, *SIGNALLED, f"ckpt.stop_file_path={tmp_path / 'stop'}", every=3, total=8)
    stopped = fit(2, overrides, hooks=_on(device))
    assert stopped.state["step"] == 5
    assert not stopped.message.startswith("exit")
    assert stopped.ranks[0].warnings == ["stop file: saved step 5, exiting 0"]
    assert _saved_steps(tmp_path) == ["step-3", "step-5"]
    resumed = fit(2, overrides)  # the file is still there
    (line,) = resumed.ranks[0].warnings
    assert "asks for step 5, but step 6 is the earliest that is left" in line
    assert stopped.log + resumed.log == straight.log or device == "accelerator"  # whose kernels differ


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_the_stop_file_saves_a_step_and_training_goes_on(device: str, tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("-4")
    done = fit(2, saving(tmp_path, f"ckpt.stop_file_path={tmp_path / 'stop'}", every=3, total=6), hooks=_on(device))
    assert (done.state["step"], _saved_steps(tmp_path)) == (6, ["step-3", "step-4", "step-6"])


class _Rewrite(Hook):
    """Write another content into the stop file before each step."""

    def __init__(self, path: Path, contents: dict[int, str]) -> None:
        self.path, self.contents = path, contents

    def before_step(self, trainer: Trainer) -> None:
        if os.environ["RANK"] == "0" and trainer.state.step in self.contents:
            self.path.write_text(self.contents[trainer.state.step])


def test_training_goes_on_whatever_the_stop_file_holds(straight: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "stop"
    hooks = [_Rewrite(path, {1: "", 2: "stop!", 4: "-", 6: "stop!"})]
    overrides = saving(tmp_path, *SIGNALLED, f"ckpt.stop_file_path={path}", every=3, total=8)
    done = fit(2, overrides, hooks=hooks)
    assert done.log == straight.log
    held = [line.partition(" holds ")[2].partition(",")[0] for line in done.ranks[0].warnings]
    assert held == ["nothing", "'stop!'", "'-'"]


# -- requests of threads


class _Ask(Hook):
    """Call ``requests.request`` in a thread on one rank, before step 3."""

    def __init__(self, requests: FollowRequests, request: Request, rank: int) -> None:
        self.requests, self.request, self.rank = requests, request, rank

    def before_step(self, trainer: Trainer) -> None:
        if (trainer.state.step, os.environ["RANK"]) == (3, str(self.rank)):
            thread = threading.Thread(target=self.requests.request, args=(self.request,))
            thread.start()
            thread.join()


def _asked(rank: int, world_size: int, overrides: tuple[str, ...], request: Request) -> tuple[Rank, list[int]]:
    take_signals()
    hooks: list[Hook] = []
    builder = build_run(world_size, overrides, hooks)
    hooks.append(_Ask(builder.requests, request, rank=1))
    followed: list[int] = []
    builder.requests.callbacks[request] = lambda of: followed.extend((of, builder.trainer.state.step))
    return finish_run(builder, builder.fit, []), followed


LEASE = "the lease of the save folder, found lost by rank 1"


@pytest.mark.parametrize(
    ("request_", "every", "steps", "message"),
    [
        (Request.SAVE, 2, ["step-2", "step-4", "step-5"], ""),
        (Request.SAVE, 3, ["step-3", "step-4", "step-5"], ""),
        (Request.LEASE_LOST, 2, ["step-2"], f"{LEASE}: step 4 is not saved, exiting 2"),
    ],
)
def test_a_thread_of_one_rank_asks_and_all_follow_after_the_same_step(
    request_: Request, every: int, steps: list[str], message: str, tmp_path: Path
) -> None:
    """A step is not saved after a request that forbids it, even if it is due."""
    outcomes = run_ranks(2, _asked, tuple(saving(tmp_path, every=every, total=5)), request_)
    assert [followed for _, followed in outcomes] == [[1, 4]] * 2, [rank.message for rank, _ in outcomes]
    assert _saved_steps(tmp_path) == steps
    assert {rank.message == "exit 2" for rank, _ in outcomes} == {bool(message)}
    assert outcomes[0][0].warnings == ([message] if message else [])
