"""Build the data loaders of this rank from the global config."""

from __future__ import annotations

from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.build import build_train_loader, build_valid_loaders
from internlm.data.loader import TrainLoader, ValidLoader


def build_train_loader_with_data_type() -> tuple[TrainLoader, list[str]]:
    """Build the training loader of this rank from the global config; return it with the names of the data-set types."""
    return build_train_loader(gpc.config.data, gpc.config.model.vocab_size, gpc.seed, _replica(), _sequence_shard())


def build_valid_loader_with_data_type() -> dict[str, ValidLoader]:
    """Build the validation loaders of this rank from the global config, one for each data-set type."""
    return build_valid_loaders(gpc.config.data, gpc.config.model.vocab_size, gpc.seed, _replica(), _sequence_shard())


get_train_data_loader = build_train_loader_with_data_type
get_validation_data_loader = build_valid_loader_with_data_type


def _replica() -> GroupPosition:
    """Return the position of this rank among the ranks that read different samples."""
    return GroupPosition(gpc.get_local_rank(ParallelMode.DATA), gpc.get_world_size(ParallelMode.DATA))


def _sequence_shard() -> GroupPosition:
    """Return the position of this rank among the ranks that split every row along the sequence."""
    if gpc.config.parallel.tensor.mode != "isp":
        return ALONE  # msp and fsp split the sequence inside the model, after the embedding
    return GroupPosition(gpc.get_local_rank(ParallelMode.TENSOR), gpc.get_world_size(ParallelMode.TENSOR))
