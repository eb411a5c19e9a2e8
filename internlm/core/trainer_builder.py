"""Trainer builder, which assembles a trainer and runs it: ``TrainerBuilder(model, train_dl, …).fit()``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from internlm import accelerator
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.trainer import Hook, Trainer, TrainState
from internlm.data.loader import TrainLoader, ValidLoader
from internlm.eval import token_bytes_of
from internlm.initialize.build_trainer import initialize_trainer
from internlm.initialize.launch import ConfigLike, leave_at_exit
from internlm.monitor import MetricsWriter, initialize_monitor_manager, open_writers
from internlm.train import hooks
from internlm.train.build_checkpoints import initialize_checkpoint_manager
from internlm.train.build_optimizer import initialize_optimizer
from internlm.train.parallelize import initialize_model_and_parallel_communicator
from internlm.utils.errors import Problem, UserError, did_you_mean
from internlm.utils.stop_signals import catching_signals

#: Built-in arguments of the command line that ``initialize_distributed_env`` takes. A builder accepts and ignores them,
#: so that a script can pass all of its parsed arguments (``**vars(args)``).
LAUNCH_ARGUMENTS = frozenset({"launcher", "host", "port", "world_size", "rank", "local_rank", "backend", "seed", "set"})


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Options of :class:`TrainerBuilder`, passed as keyword arguments."""

    profiling: bool = False
    """Write torch profiler traces and a memory report."""
    ledger: bool = False
    """Log the bytes sent, by parallel mode and collective, at the end of the run."""
    pipeline_trace: bool = False
    """Draw the pipeline timeline of one training step, as measured and as simulated."""
    dataset_types: Sequence[str] | None = None
    """Names of the dataset types by which metrics are split; None: the types of the training loader."""
    extra_hooks: Sequence[Hook] = ()
    """Hooks that run after the metrics are logged and before a checkpoint is saved."""

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> TrainerOptions:
        """Create the options from ``keywords``, which may also contain built-in command-line arguments.

        Raises:
            UserError: A keyword is neither an option nor a built-in argument.
        """
        options = {field.name for field in fields(cls)}
        known = {*options, *LAUNCH_ARGUMENTS, "config", "val_dls"}
        problems = [
            Problem(f"TrainerBuilder({name}=…)", "unknown keyword", did_you_mean(name, known))
            for name in keywords
            if name not in known
        ]
        if problems:
            raise UserError(*problems)
        return cls(**{name: value for name, value in keywords.items() if name in options})


class TrainerBuilder:
    """Builder that assembles optimizer, trainer, checkpoints and hooks for a model, and runs the training.

    Args:
        model: Model to pass to :func:`~internlm.train.initialize_model_and_parallel_communicator`.
        train_dl: Loader of the training data.
        val_dls: Loaders of the validation data by dataset type; default: no validation.
        config: Config as passed to ``initialize_distributed_env``. The run always uses the resolved config,
            overrides included; a :class:`~internlm.config.Config` passed here must equal it.
        keywords: Fields of :class:`TrainerOptions`, and built-in command-line arguments, which are ignored.

    Raises:
        UserError: A keyword is unknown, or the config differs from the resolved one.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dl: TrainLoader,
        val_dls: Mapping[str, ValidLoader] | None = None,
        config: ConfigLike | None = None,
        **keywords: Any,
    ) -> None:
        self.options = TrainerOptions.from_keywords(keywords)
        self.config = gpc.config
        if isinstance(config, Config) and config != self.config:
            message = "differs from the config that initialize_distributed_env resolved"
            todo = "Omit config, or pass the resolved config (gpc.config)"
            raise UserError(Problem("TrainerBuilder(config=…)", message, todo))
        self.types = list(self.options.dataset_types or train_dl.types)
        self.train_dl = train_dl
        model, isp_communicator = initialize_model_and_parallel_communicator(model)
        optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, isp_communicator)
        self.trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=len(self.types))
        self.checkpoints = initialize_checkpoint_manager(model, optimizer, train_dl)
        self.requests = hooks.FollowRequests(accelerator.current_device(), self.config.ckpt.stop_file_path)
        """Requests to save or to stop; ``requests.request(…)`` may be called by any thread."""
        self._val_dls = val_dls or {}

    def fit(self) -> TrainState:
        """Resume from a checkpoint if there is one, and train to the end.

        Returns:
            Progress of the run at the end.

        Raises:
            SystemExit: A request with an exit code stopped the run; after a signal, this code is 128 + the signal
                number.
            UserError: The checkpoint cannot be loaded or saved, or too many steps in a row were skipped.
        """
        alerts = initialize_monitor_manager(self.config.JOB_NAME, alert=self.config.monitor.alert)
        with catching_signals(), alerts, self.checkpoints:
            self.checkpoints.try_resume_training(self.trainer.state)
            parent = Path(self.config.log_folder) / self.config.JOB_NAME
            folder = _run_folder(parent.resolve(), self.checkpoints.resumed_folder)
            self.checkpoints.run_info["run_folder"] = str(folder)
            state = self.trainer.fit(self.train_dl, self.config.data.total_steps, self._hooks(self.trainer, folder))
            self.checkpoints.wait_async_upload_finish()
            self.requests.finish(state.step, self.checkpoints.last_saved)
        leave_at_exit()
        if self.requests.exit_code:
            raise SystemExit(self.requests.exit_code)
        return state

    def _hooks(self, trainer: Trainer, folder: Path) -> list[Hook]:
        """Return the hooks in the order in which they run after a step; they write to ``folder``."""
        data, writer = self.config.data, self._writer(folder, trainer.state.step)
        data_size = trainer.scheduler.data_group.size
        return [
            *([hooks.LogMemoryPlan()] if writer else []),
            *([self._log_metrics(writer, data_size)] if writer else []),
            hooks.WarnOfSkippedSteps(self.config.hybrid_zero_optimizer.max_skipped_steps, is_logging=bool(writer)),
            hooks.Upkeep(data.empty_cache_and_diag_interval, data.diag_outlier_ratio, accelerator.current_device()),
            self._validate(writer),
            *self.options.extra_hooks,  # before SaveCheckpoints, because they may set stop_requested
            self.requests,
            hooks.SaveCheckpoints(self.checkpoints, self.requests),
            *([hooks.ReportTraffic()] if self.options.ledger and writer else []),
            *([self._recorder(folder)] if self.options.pipeline_trace else []),
            *([hooks.ProfileRun(folder, dist.get_rank())] if self.options.profiling else []),
        ]

    def _validate(self, writer: MetricsWriter | None) -> hooks.Validate:
        data, stop_is_asked = self.config.data, self.requests.stop_is_asked
        loaders, token_bytes = self._val_dls, self._token_bytes()
        return hooks.Validate(loaders, data.valid_every, data.total_steps, writer, token_bytes, stop_is_asked)

    def _log_metrics(self, writer: MetricsWriter, data_size: int) -> hooks.LogMetrics:
        world_size = dist.get_world_size()
        return hooks.LogMetrics(self.config, self.types, world_size, data_size, writer, self.train_dl)

    def _token_bytes(self) -> Tensor | None:
        """Return the bytes of text of each token id, if a validation needs them and a tokenizer is given."""
        path = self.config.data.tokenizer_path
        if path is None or not self._val_dls or not self.config.data.valid_every:
            return None
        return token_bytes_of(path, self.config.model.vocab_size)

    def _recorder(self, folder: Path) -> hooks.RecordPipeline:
        """Return the hook that draws the pipeline; only the logging rank writes the drawing."""
        return hooks.RecordPipeline(gpc.group(ParallelMode.PIPELINE), folder if gpc.is_rank_for_log() else None)

    def _writer(self, folder: Path, first_step: int) -> MetricsWriter | None:
        """Return the metrics writer on the logging rank, None on other ranks."""
        if not gpc.is_rank_for_log():
            return None
        config = self.config
        tensorboard = Path(config.tensorboard_folder or folder / "tensorboards") if config.enable_tb else None
        queue = config.monitor.tensorboard.queue_max_length
        return open_writers(
            folder, tensorboard, queue, config.data.total_steps, first_step, devices=dist.get_world_size()
        )


def _run_folder(parent: Path, resumed: str | None) -> Path:
    """Return the folder of this run's records on all ranks: that of the resumed run, or a new one in ``parent``.

    Args:
        parent: Absolute path of the folder of all runs of this name.
        resumed: Absolute path of the records of the resumed run, if there is one.
    """
    chosen = [_choose(parent, resumed) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, src=0)
    assert chosen[0] is not None
    return chosen[0]


def _choose(parent: Path, resumed: str | None) -> Path:
    # Another log_folder or JOB_NAME asks for other records.
    if resumed and Path(resumed).parent == parent and Path(resumed).is_dir():
        return Path(resumed)
    return _claim(parent)


def _claim(parent: Path) -> Path:
    """Create a folder in ``parent`` named after the current time; append a number if the name is taken."""
    name = folder = parent / time.strftime("%Y-%m-%dT%H-%M-%S")  # names that sort by time
    others = 0
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            others += 1
            folder = name.with_name(f"{name.name}_{others}")
            continue
        except OSError:  # such as no permission: the first writer reports it, with the name of its file
            pass
        return folder
