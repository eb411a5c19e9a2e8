"""Build the checkpoint manager of a run from the global config."""

from __future__ import annotations

from datetime import timedelta

from torch import nn

from internlm.checkpoint import CheckpointManager
from internlm.config import masked_dict
from internlm.core.context import global_context as gpc
from internlm.data.loader import TrainLoader
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.errors import Problem, UserError


def initialize_checkpoint_manager(
    model: nn.Module, optimizer: HybridZeroOptimizer, train_dl: TrainLoader
) -> CheckpointManager:
    """Build the checkpoint manager of a run, as the ``ckpt`` section of the global config says.

    In a loop of a script, call ``try_resume_training(trainer.state)`` before iterating over ``train_dl``, and
    ``try_save_checkpoint(trainer.state)`` after each step.

    Args:
        model: Model that :func:`~internlm.train.initialize_model_and_parallel_communicator` prepared.
        optimizer: Optimizer of ``model``.
        train_dl: Training loader, whose data position is saved and restored.

    Raises:
        UserError: ``train_dl`` is no training loader.
    """
    if not isinstance(train_dl, TrainLoader):
        message = f"expected a training loader, got {type(train_dl).__name__}"
        todo = "Pass the loader itself, not an iterator over it: its position is saved"
        raise UserError(Problem("initialize_checkpoint_manager(train_dl=...)", message, todo))
    config = gpc.config
    manager = CheckpointManager(
        config.ckpt,
        model,
        optimizer,
        gpc.random_streams,
        config.data.total_steps,
        run_info={
            "config": masked_dict(config),
            "data": train_dl.fingerprint(),
            "data_files": train_dl.files(),
            "seed": gpc.seed,
        },
        sampler=train_dl,
    )
    manager.exchange.timeout = timedelta(seconds=config.parallel.timeout)
    return manager
