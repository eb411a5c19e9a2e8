"""One rank of a training run: the calls of a script of your own, with the built-in models (doc/initialize.md)."""

from __future__ import annotations

import argparse

from internlm.core.context import global_context as gpc
from internlm.core.trainer_builder import TrainerBuilder
from internlm.initialize.launch import initialize_distributed_env
from internlm.train.build_data import build_train_loader_with_data_type, build_valid_loader_with_data_type
from internlm.train.build_model import create_model


def join_ranks(arguments: argparse.Namespace) -> None:
    """Join the process group, with the config and the process that the arguments of a command name.

    Args:
        arguments: Arguments ``config`` and ``set``, and those of :func:`internlm.utils.common.add_process_arguments`.

    Raises:
        UserError: The config or an argument is wrong, or another rank cannot be reached.
    """
    initialize_distributed_env(
        config=arguments.config,
        launcher=arguments.launcher,
        master_port=arguments.port,
        seed=arguments.seed,
        host=arguments.host,
        backend=arguments.backend,
        overrides=arguments.set,
        rank=arguments.rank,
        world_size=arguments.world_size,
        local_rank=arguments.local_rank,
    )


def train_rank(arguments: argparse.Namespace) -> None:
    """Build the model, the data loaders and the trainer, and train.

    Args:
        arguments: Arguments of :func:`internlm.utils.common.get_default_parser`.

    Raises:
        UserError: Something that the user can fix prevents the run.
        SystemExit: A request with an exit code stopped the run.
    """
    join_ranks(arguments)
    model = create_model(model_type=gpc.config.model_type, deferred=True)
    train_dl, dataset_types = build_train_loader_with_data_type()
    val_dls = build_valid_loader_with_data_type()
    TrainerBuilder(
        model,
        train_dl,
        val_dls,
        dataset_types=dataset_types,
        profiling=arguments.profiling,
        ledger=arguments.ledger,
        pipeline_trace=arguments.pipeline_trace,
    ).fit()
