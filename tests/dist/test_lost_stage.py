"""A stage of a pipeline ends, or does nothing any more: all the others say which it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from internlm.core.scheduler.executor import ActionMarks
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.utils.errors import EXIT_LOST_PEER, LostPeerError
from internlm.verify.processes import RankProcesses
from tests.dist.tiny import TINY
from tests.integration.jobs import script

#: Seconds: what a rank waits, and how much longer it may take until it has said whom it waited for.
TIMEOUT, GRACE = 2, 5

#: Ways to stop.
STOPS: dict[str, Callable[[], object]] = {
    "gone": lambda: os._exit(9),
    "silent": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


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
        trainer.scheduler.after_action = StopAfter(actions, STOPS[fate])
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
        (4, FOUR_LAYERS, 2, 5, "silent"),
        (4, FOUR_LAYERS, 0, 5, "silent"),  # the last stage has done its part
        (3, V, 1, 9, "gone"),
    ],
)
def test_every_other_stage_names_it(
    stages: int, overrides: tuple[str, ...], stage: int, actions: int, fate: str, tmp_path: Path
) -> None:
    """And not the neighbour that waits as well."""
    said = said_by(stages, tmp_path, overrides, stage, actions, fate)
    assert said.keys() == set(range(stages)) - {stage}
    for rank, (seconds, text) in said.items():
        assert text.startswith(f"pipeline stage {stage} (rank {stage}) is {fate}: stage {rank} (rank {rank}) waited ")
        assert seconds < TIMEOUT + GRACE


SCRIPT = """
import signal
import sys

import torch.distributed as dist

from internlm.core.trainer import Hook
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type, build_valid_loader_with_data_type
from internlm.initialize import get_default_parser, initialize_distributed_env
from internlm.model.builder import create_model
from internlm.utils.errors import exit_on_user_error
from tests.dist.test_lost_stage import StopAfter


def stop():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's
    signal.pause()


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


def test_a_job_ends_and_says_why(tmp_path: Path) -> None:
    """Once, without a traceback, and with nothing left running."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    overrides = "parallel.pipeline.size=2", "data.micro_num=4", "parallel.timeout=8"
    job = script(str(file), 2, "configs/debug/internlm2.py", tmp_path, *overrides)
    said = "pipeline stage 1 (rank 1) is silent: stage 0 (rank 0) waited 8 s for stage 1 to "
    assert job.stderr.count(said) == 1, job.stderr
    assert f"exitcode  : {EXIT_LOST_PEER} " in job.stderr
    assert "/internlm/" not in job.stderr, job.stderr  # no traceback of ours
    assert "terminate called" not in job.stderr
    assert (job.returncode, job.left_behind) == (1, 0)
