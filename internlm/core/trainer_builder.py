"""From a model and its data to a run: ``TrainerBuilder(model, train_dl, val_dls, config=…).fit()``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from internlm import accelerator
from internlm.checkpoint import CheckpointManager
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.trainer import Hook, Trainer, TrainState
from internlm.data.loader import TrainLoader, ValidLoader
from internlm.initialize.build_trainer import initialize_trainer
from internlm.monitor import MetricsWriter, initialize_monitor_manager, open_writers
from internlm.train import hooks
from internlm.train.build_optimizer import initialize_optimizer
from internlm.train.parallelize import initialize_model_and_parallel_communicator


class TrainerBuilder:
    """Builds optimizer, trainer, checkpoints and hooks around ``model``, and runs the training.

    ``extra_hooks`` run after the figures are logged and before the model is saved.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dl: TrainLoader,
        val_dls: Mapping[str, ValidLoader] | None = None,
        config: Config | str | None = None,
        profiling: bool = False,
        ledger: bool = False,
        pipeline_trace: bool = False,
        dataset_types: Sequence[str] | None = None,
        extra_hooks: Sequence[Hook] = (),
        **_: Any,  # whatever else a script's parsed arguments hold
    ) -> None:
        self.config = gpc.config  # the resolved config; ``config`` may be the path that it came from
        self.types = list(dataset_types or train_dl.types)
        self.train_dl = train_dl
        model, isp_communicator = initialize_model_and_parallel_communicator(model)
        optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, isp_communicator)
        self.trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=len(self.types))
        self.checkpoints = CheckpointManager(
            self.config.ckpt,
            model,
            optimizer,
            gpc.random_streams,
            self.config.data.total_steps,
            run_info={
                "config": self.config.model_dump(mode="json"),
                "data": train_dl.fingerprint(),
                "seed": gpc.seed,
            },
            sampler=train_dl,
        )
        self.folder = _new_folder(Path(self.config.log_folder) / self.config.JOB_NAME)
        self.stop = hooks.StopOnSignal(accelerator.current_device())
        self._val_dls, self._extra_hooks = val_dls or {}, extra_hooks
        self._profiling, self._ledger, self._pipeline_trace = profiling, ledger, pipeline_trace

    def fit(self) -> TrainState:
        """Resume if there is something to resume, train to the end, and return the final state.

        A run ended by SIGTERM or SIGINT exits the process with 128 + the signal.
        """
        alerts = initialize_monitor_manager(self.config.JOB_NAME, self.config.monitor.alert)
        with self.stop.listening(), alerts:
            self.checkpoints.try_resume_training(self.trainer.state)
            state = self.trainer.fit(self.train_dl, self.config.data.total_steps, self._hooks(self.trainer))
        if self.stop.exit_code and state.step < self.config.data.total_steps:
            raise SystemExit(self.stop.exit_code)
        return state

    def _hooks(self, trainer: Trainer) -> list[Hook]:
        """In the order in which they run after a step."""
        data, writer = self.config.data, self._writer(trainer.state.step)
        world, data_size = dist.get_world_size(), trainer.scheduler.data_group.size
        return [
            *([hooks.LogMemoryPlan()] if writer else []),
            *([hooks.LogMetrics(self.config, self.types, world, data_size, writer)] if writer else []),
            hooks.Upkeep(data.empty_cache_and_diag_interval, data.diag_outlier_ratio, accelerator.current_device()),
            hooks.Validate(self._val_dls, data.valid_every, data.total_steps, writer),
            *self._extra_hooks,  # which may ask for a stop
            self.stop,
            hooks.SaveCheckpoints(self.checkpoints),
            *([hooks.ReportTraffic()] if self._ledger and writer else []),
            *([self._recorder()] if self._pipeline_trace else []),
            *([hooks.ProfileRun(self.folder, dist.get_rank())] if self._profiling else []),
        ]

    def _recorder(self) -> hooks.RecordPipeline:
        """The pipeline that has the logging rank is drawn."""
        folder = self.folder if gpc.is_rank_for_log() else None
        return hooks.RecordPipeline(gpc.group(ParallelMode.PIPELINE), folder)

    def _writer(self, first_step: int) -> MetricsWriter | None:
        """Where the logging rank writes; None on the others."""
        if not gpc.is_rank_for_log():
            return None
        config = self.config
        tensorboard = Path(config.tensorboard_folder or self.folder / "tensorboards") if config.enable_tb else None
        queue = config.monitor.tensorboard.queue_max_length
        return open_writers(
            self.folder, tensorboard, queue, config.data.total_steps, first_step, devices=dist.get_world_size()
        )


def _new_folder(parent: Path) -> Path:
    """A folder in ``parent`` that no other run has, named by rank 0's clock; the same on all ranks."""
    chosen = [_claim(parent) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, src=0)
    assert chosen[0] is not None
    return chosen[0]


def _claim(parent: Path) -> Path:
    name = folder = parent / time.strftime("%b%d_%H-%M-%S")
    others = 0
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            others += 1
            folder = name.with_name(f"{name.name}_{others}")
            continue
        except OSError:  # whoever writes there first will say what is wrong
            pass
        return folder
