"""Data assembly."""

from __future__ import annotations

from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.build import build_train_loader, build_valid_loaders
from internlm.data.loader import TrainLoader, ValidLoader


def build_train_loader_with_data_type() -> tuple[TrainLoader, list[str]]:
    """The training loader of this rank, and the names of the data-set types, as the global config describes them."""
    return build_train_loader(gpc.config.data, *_arguments())


def build_valid_loader_with_data_type() -> dict[str, ValidLoader]:
    """The validation loaders of this rank by data-set type, as the global config describes them."""
    return build_valid_loaders(gpc.config.data, *_arguments())


get_train_data_loader = build_train_loader_with_data_type
get_validation_data_loader = build_valid_loader_with_data_type


def _arguments() -> tuple[int, int, int, int, GroupPosition]:
    """Vocabulary, seed, this rank's place among those that read different samples, and its part of each row."""
    data, tensor = ParallelMode.DATA, ParallelMode.TENSOR
    isp = gpc.config.parallel.tensor.mode == "isp"
    part = GroupPosition(gpc.get_local_rank(tensor), gpc.get_world_size(tensor)) if isp else ALONE
    return gpc.config.model.vocab_size, gpc.seed, gpc.get_local_rank(data), gpc.get_world_size(data), part
