"""Build the data loaders of this rank from the global config."""

from __future__ import annotations

import os

from internlm.config.schema.parallel import round_size_of
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.build import build_train_loader, build_valid_loaders
from internlm.data.loader import TrainLoader, ValidLoader
from internlm.utils.compat import naming_current_call


def build_train_loader_with_data_type() -> tuple[TrainLoader, list[str]]:
    """Build this rank's training loader from the global config.

    Returns:
        The loader, and the names of the dataset types.

    Raises:
        DataError: ``data.train_folder`` is missing, or a file in it is damaged.
    """
    config = gpc.config
    # The threads that read ahead tokenize in parallel; a tokenizer's own threads would take cores from the model.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    round_size = round_size_of(config.parallel.pipeline, config.model.num_chunks)
    return build_train_loader(config.data, config.model.vocab_size, gpc.seed, _replica(), _sequence_shard(), round_size)


def build_valid_loader_with_data_type() -> dict[str, ValidLoader]:
    """Build this rank's validation loaders from the global config, one for each dataset type.

    Returns:
        Loaders by dataset type; empty if only ``data.train_folder`` is set.

    Raises:
        DataError: ``data.valid_folder`` is missing, or a file in it is damaged.
    """
    return build_valid_loaders(gpc.config.data, gpc.config.model.vocab_size, gpc.seed, _replica(), _sequence_shard())


@naming_current_call("get_train_data_loader(num_worker); the config names the data and its packing")
def get_train_data_loader(num_worker: int | None = None) -> tuple[TrainLoader, list[str]]:
    """Build this rank's training loader as :func:`build_train_loader_with_data_type` does, by its older name.

    Args:
        num_worker: Number of threads that read batches ahead; default: ``data.num_worker`` of the config.
    """
    loader, types = build_train_loader_with_data_type()
    if num_worker is not None:
        loader.num_worker = num_worker
    return loader, types


@naming_current_call("get_validation_data_loader(num_worker); the config names the data and its packing")
def get_validation_data_loader(num_worker: int | None = None) -> dict[str, ValidLoader]:
    """Build this rank's validation loaders as :func:`build_valid_loader_with_data_type` does, by its older name.

    Args:
        num_worker: Number of threads that read batches ahead; default: ``data.num_worker`` of the config.
    """
    loaders = build_valid_loader_with_data_type()
    for loader in loaders.values():
        loader.num_worker = loader.num_worker if num_worker is None else num_worker
    return loaders


def _replica() -> GroupPosition:
    """Return this rank's position in the data group, whose ranks read different samples."""
    return GroupPosition(gpc.get_local_rank(ParallelMode.DATA), gpc.get_world_size(ParallelMode.DATA))


def _sequence_shard() -> GroupPosition:
    """Return this rank's position in the group whose ranks load different sequence shards of the same rows."""
    if gpc.config.parallel.tensor.mode != "isp":
        return ALONE  # msp and fsp split the sequence inside the model, after the embedding
    return GroupPosition(gpc.get_local_rank(ParallelMode.TENSOR), gpc.get_world_size(ParallelMode.TENSOR))
