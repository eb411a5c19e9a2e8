"""A rank ends, or does nothing any more: the others name it once, and end in time with its state and exit code 3."""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from internlm.core.context import global_context as gpc
from internlm.core.scheduler.executor import ActionMarks
from internlm.core.trainer import Hook, Trainer
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.utils import progress
from internlm.utils.errors import LostPeerError, Problem, UserError, exit_on_user_error
from internlm.utils.logger import get_logger
from internlm.utils.lost_ranks import EXIT_LOST_PEER
from internlm.utils.progress import own_phase
from internlm.verify.processes import RankProcesses
from tests.dist.tiny import TINY
from tests.harness.ports import free_port
from tests.integration.jobs import script

#: Seconds: what a rank waits, how much longer it may take until it has ended, between two beacons, and until a process
#: that has failed is ended.
TIMEOUT, GRACE, BEAT, LIMIT = 2, 5, 0.25, 1


def _raise_bug() -> None:
    raise ValueError("a bug")


def _block_and_raise_bug() -> None:
    threading.Thread(target=time.sleep, args=[1000]).start()
    _raise_bug()


def _raise_user_error() -> None:
    raise UserError(Problem("data.bin", "is gone", "Restore it"))


#: Ways to fail.
FATES: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stuck": lambda: time.sleep(1000),
    "bug": _raise_bug,
    "bug, with a thread that never ends": _block_and_raise_bug,
    "user's error": _raise_user_error,
    "end": lambda: os._exit(0),
}


@dataclass(frozen=True)
class Fault:
    """Failure of one rank in its second step."""

    rank: int
    phase: str
    fate: str
    #: Whether something is registered that blocks the end of every process.
    blocks_exit: bool = False

    def __call__(self) -> None:
        """Fail, after a beacon has told the phase."""
        time.sleep(3 * BEAT)
        Path("failed").write_text(str(time.time()))
        FATES[self.fate]()


class Failing(Hook):
    """Makes this rank fail in a phase of the second step."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def before_step(self, trainer: Trainer) -> None:
        """Plant the failure."""
        if trainer.state.step != 1:
            return
        if self.fault.phase == "forward":
            trainer.model.register_forward_pre_hook(lambda *_: self.fault())
        elif self.fault.phase == "backward":
            norm = next(parameter for parameter in trainer.model.parameters() if parameter.dim() == 1)
            norm.register_hook(lambda _: self.fault())


# -- jobs whose rank 0 has the store ----------------------------------------------------------------------------------
def _run(rank: int, world_size: int, folder: Path, port: int, fault: Fault, overrides: tuple[str, ...]) -> None:
    """Run a rank as a process of its own, from joining the job to its end."""
    dist.destroy_process_group()
    os.chdir(folder)
    os.environ["MASTER_PORT"] = str(port)
    progress.SECONDS, progress.EXIT_SECONDS = BEAT, LIMIT
    get_logger().setLevel(logging.ERROR)
    with Path(f"stderr-{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    code: Any = 0
    try:
        _main(rank, fault, overrides)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends a process: it waits for threads, then calls what is registered.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


@exit_on_user_error
def _main(rank: int, fault: Fault, overrides: tuple[str, ...]) -> None:
    if rank == fault.rank and fault.phase == "start":
        initialize = gpc.initialize
        gpc.initialize = lambda *args: (fault(), initialize(*args))[1]
    saving = "ckpt.enable_save_ckpt=True", "ckpt.save_ckpt_folder=ckpt", "ckpt.checkpoint_every=2"
    initialize_distributed_env(TINY, "torch", overrides=(f"parallel.timeout={TIMEOUT}", *saving, *overrides))
    loader, types = build_train_loader_with_data_type()
    hooks = [Failing(fault)] if rank == fault.rank else []
    builder = TrainerBuilder(create_model(), loader, dataset_types=types, extra_hooks=hooks)
    if rank == fault.rank and fault.phase == "data wait":
        read = loader.read
        loader.read = lambda step: (step == 1 and fault(), read(step))[1]
    if rank == fault.rank and fault.phase == "save":
        tensors = builder.checkpoints.content.tensors
        # Its sizes are read before training, too.
        builder.checkpoints.content.tensors = lambda: ("save" in own_phase() and fault(), tensors())[1]
    if fault.blocks_exit:
        atexit.register(time.sleep, 1000)
    builder.fit()


@dataclass(frozen=True)
class Outcome:
    """What a job with a fault left."""

    codes: dict[int, int | None]
    """Exit codes by rank; None for a rank that has not ended."""
    seconds: float
    """Seconds from the failure until the last of the other ranks had ended."""
    stderr: str
    """What all ranks have printed."""


def job(folder: Path, ranks: int, fault: Fault, *overrides: str) -> Outcome:
    """Run a job and wait for all ranks, except for one that cannot end."""
    processes = RankProcesses(ranks)
    try:
        processes.send(_run, (folder, free_port(), fault, overrides))
        for rank, process in enumerate(processes.processes):
            if rank != fault.rank:
                process.join(40)
        seconds = time.time() - float((folder / "failed").read_text())
        if fault.fate != "stopped":
            processes.processes[fault.rank].join(2 * GRACE)
        codes = {rank: process.exitcode for rank, process in enumerate(processes.processes)}
    finally:
        processes.close()
    return Outcome(codes, seconds, "".join((folder / f"stderr-{rank}").read_text() for rank in range(ranks)))


def _rows() -> Iterator[Any]:
    """Yield every phase with both ranks."""
    for phase in ("forward", "data wait", "save"):
        for rank in (0, 1):
            chosen = (phase, rank) in {("forward", 0), ("save", 1)}
            yield pytest.param(phase, rank, marks=() if chosen else pytest.mark.wide)


@pytest.mark.parametrize(("phase", "rank"), list(_rows()))
def test_a_stopped_rank_is_silent(phase: str, rank: int, tmp_path: Path) -> None:
    """Also if it has the store, which then answers nothing."""
    outcome = job(tmp_path, 2, Fault(rank, phase, "stopped"))
    assert re.fullmatch(rf"rank {rank} silent for [2-6] s, last seen in {phase} of step 1\n", outcome.stderr)
    assert outcome.codes == {rank: None, 1 - rank: EXIT_LOST_PEER}
    assert outcome.seconds < TIMEOUT + GRACE


@pytest.mark.wide
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_silent_while_groups_are_made(rank: int, tmp_path: Path) -> None:
    """The others are blocked in the store, which rank 0 has."""
    outcome = job(tmp_path, 2, Fault(rank, "start", "stopped"), "parallel.zero1.size=1")
    assert re.fullmatch(rf"rank {rank} (silent for [2-6] s, last seen in start|did not start)\n", outcome.stderr)
    assert outcome.codes == {rank: None, 1 - rank: EXIT_LOST_PEER}
    assert outcome.seconds < TIMEOUT + GRACE


@pytest.mark.parametrize(
    ("phase", "rank"), [("forward", 0), ("save", 1), pytest.param("save", 0, marks=pytest.mark.wide)]
)
def test_a_killed_rank_is_gone(phase: str, rank: int, tmp_path: Path) -> None:
    """No checkpoint is published without it."""
    outcome = job(tmp_path, 3, Fault(rank, phase, "killed"))
    assert outcome.stderr == f"rank {rank} is gone, last seen in {phase} of step 1\n"
    assert outcome.codes == {0: EXIT_LOST_PEER, 1: EXIT_LOST_PEER, 2: EXIT_LOST_PEER, rank: -signal.SIGKILL}
    assert outcome.seconds < TIMEOUT + GRACE
    assert not list(tmp_path.glob("ckpt/step-*/manifest.json"))


@pytest.mark.wide
def test_a_rank_that_ends_on_its_own_is_gone(tmp_path: Path) -> None:
    outcome = job(tmp_path, 2, Fault(1, "data wait", "end"))
    assert outcome.stderr == "rank 1 is gone, last seen in data wait of step 1\n"
    assert outcome.codes == {0: EXIT_LOST_PEER, 1: 0}


@pytest.mark.parametrize("fate", [pytest.param("bug", marks=pytest.mark.wide), "bug, with a thread that never ends"])
def test_the_traceback_of_a_bug_comes_once(fate: str, tmp_path: Path) -> None:
    """And all ranks end."""
    outcome = job(tmp_path, 3, Fault(1, "backward", fate))
    traceback, line = outcome.stderr.count("Traceback"), "rank 1 stopped with ValueError in backward of step 1. See its"
    assert (traceback, outcome.stderr.count("ValueError: a bug")) == (1, 1), outcome.stderr
    assert outcome.stderr.count(f"{line} traceback\n") == 1
    assert outcome.codes == {0: EXIT_LOST_PEER, 1: 1, 2: EXIT_LOST_PEER}


@pytest.mark.wide
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_the_user_can_fix_comes_once(rank: int, tmp_path: Path) -> None:
    """And is the exit code of all ranks."""
    outcome = job(tmp_path, 3, Fault(rank, "data wait", "user's error"))
    assert outcome.stderr == "data.bin: is gone. Restore it\n"
    assert outcome.codes == {0: 2, 1: 2, 2: 2}


def test_a_rank_that_is_stuck_shows_its_stack_and_ends_as_well(tmp_path: Path) -> None:
    outcome = job(tmp_path, 2, Fault(1, "data wait", "stuck", blocks_exit=True))
    line = r"rank 1 has been in data wait of step 1 for [2-6] s \(internlm/data/read_ahead.py:\d+\)\n"
    assert len(re.findall(line, outcome.stderr)) == 1, outcome.stderr
    assert re.search(r"Current thread (.*\n)*?.*test_lost_rank.py\", line \d+ in __call__", outcome.stderr)
    assert outcome.codes == {0: EXIT_LOST_PEER, 1: EXIT_LOST_PEER}
    assert outcome.seconds < TIMEOUT + GRACE


# -- pipelines: most stages wait for a neighbour that waits as well ---------------------------------------------------
class StopAfter:
    """Stops its process after so many actions."""

    def __init__(self, actions: int, stop: Callable[[], object]) -> None:
        self.left, self.stop = actions, stop

    def __call__(self, marks: ActionMarks) -> None:
        self.left -= 1
        if not self.left:
            self.stop()


def _train(
    rank: int, world_size: int, folder: Path, overrides: tuple[str, ...], stage: int, actions: int, fate: str
) -> None:
    """Train until a stage is lost; leave in ``folder`` after how many seconds, and what was said then."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))  # as if the job had begun with it
    progress.SECONDS = BEAT
    sizes = f"parallel.pipeline.size={world_size}", f"parallel.timeout={TIMEOUT}"
    initialize_distributed_env(TINY, overrides=(*sizes, *overrides))
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    loader, types = build_train_loader_with_data_type()
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=len(types))
    batches = iter(loader)
    trainer.train_step(batches)
    start = time.monotonic()
    if rank == stage:
        trainer.scheduler.after_action = StopAfter(actions, FATES[fate])
    try:
        trainer.train_step(batches)
    except LostPeerError as error:
        (folder / str(rank)).write_text(f"{time.monotonic() - start} {error}")
    os._exit(EXIT_LOST_PEER)


def said_by(
    world_size: int, folder: Path, overrides: tuple[str, ...], stage: int, actions: int, fate: str
) -> dict[int, tuple[float, str]]:
    """By rank, seconds that passed until it said something, and what."""
    ranks = RankProcesses(world_size)
    try:
        ranks.send(_train, (folder, overrides, stage, actions, fate))
        for rank, process in enumerate(ranks.processes):  # they end one by one, as those of a real job do
            if rank != stage:
                process.join(40)
    finally:
        ranks.close()
    texts = {int(file.name): file.read_text().partition(" ") for file in folder.iterdir()}
    return {rank: (float(seconds), text) for rank, (seconds, _, text) in texts.items()}


FOUR_LAYERS = ("model.num_layers=4", "data.micro_num=4")
V = ("parallel.pipeline.mode=ZBV", "model.num_layers=8", "data.micro_num=4")


@pytest.mark.parametrize(
    ("stages", "overrides", "stage", "actions", "fate"),
    [
        (4, FOUR_LAYERS, 2, 5, "stopped"),
        # The last stage has done its part.
        pytest.param(4, FOUR_LAYERS, 0, 5, "stopped", marks=pytest.mark.wide),
        (4, FOUR_LAYERS, 1, 3, "stuck"),
        (3, V, 1, 9, "killed"),
    ],
)
def test_every_other_stage_names_it(
    stages: int, overrides: tuple[str, ...], stage: int, actions: int, fate: str, tmp_path: Path
) -> None:
    """And not the neighbour that waits as well."""
    said = said_by(stages, tmp_path, overrides, stage, actions, fate)
    assert said.keys() == set(range(stages)) - {stage}
    fates = {"stopped": r"silent for \d s, last seen", "stuck": "has been", "killed": "is gone, last seen"}
    for seconds, text in said.values():
        assert re.match(rf"rank {stage} {fates[fate]} in \w+( wait)? of step [01]\b", text)
        assert seconds < TIMEOUT + GRACE
    waited_for = re.compile(r"\(stage \d waited for stage \d to (send|receive) ")
    assert any(waited_for.search(text) for _, text in said.values())


SCRIPT = """
import signal
import time

import torch.distributed as dist

from internlm.core.trainer import Hook
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type, build_valid_loader_with_data_type
from internlm.initialize import get_default_parser, initialize_distributed_env
from internlm.model.builder import create_model
from internlm.utils.errors import exit_on_user_error
from tests.dist.test_lost_rank import StopAfter


def stop():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's
    time.sleep(1000)


class StopStageOne(Hook):
    def before_step(self, trainer):
        if dist.get_rank() == 1 and trainer.state.step == 1:
            trainer.scheduler.after_action = StopAfter(2, stop)


@exit_on_user_error
def main():
    args = get_default_parser().parse_args()
    initialize_distributed_env(args.config, overrides=args.set)
    model = create_model()
    train_dl, types = build_train_loader_with_data_type()
    val_dls = build_valid_loader_with_data_type()
    TrainerBuilder(model, train_dl, val_dls, dataset_types=types, extra_hooks=[StopStageOne()]).fit()


main()
"""


@pytest.mark.wide
def test_a_job_ends_and_says_why(tmp_path: Path) -> None:
    """Once, without a traceback, and with nothing left running."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    overrides = "parallel.pipeline.size=2", "data.micro_num=4", "parallel.timeout=8"
    job = script(str(file), 2, "configs/debug/internlm2.py", tmp_path, *overrides)
    line = r"\nrank 1 has been in (forward|backward) of step 1 for \d+ s \(.*\) \(stage 0 waited for stage 1 to send "
    assert len(re.findall(line, job.stderr)) == 1, job.stderr
    assert f"exitcode  : {EXIT_LOST_PEER} " in job.stderr
    assert job.stderr.count("Traceback") == 1, job.stderr  # the launcher's
    assert "terminate called" not in job.stderr
    assert (job.returncode, job.left_behind) == (1, 0)
