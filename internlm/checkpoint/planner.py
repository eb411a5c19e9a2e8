"""The default planners of ``torch.distributed.checkpoint``, over a flat dict of :class:`LogicalTensor`."""

from __future__ import annotations

import io
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from internlm.utils.errors import CheckpointError, Problem


class LogicalSavePlanner(DefaultSavePlanner):
    """Writes the boxes of logical tensors; a box that several ranks hold is written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box at ``index``, rounded to what it is written as."""
        logical = self.state_dict[index.fqn]
        tensor: Tensor = logical.__get_tensor_shard__(index).to(logical.dtype)
        return tensor


class LogicalLoadPlanner(DefaultLoadPlanner):
    """Reads into the boxes of logical tensors, from whatever boxes they were written as."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict as it is; the default would rebuild it, for tensors on the meta device."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The memory of the box at ``index``."""
        tensor: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse what is no tensor: the default would unpickle it."""
        name = read_item.dest_index.fqn
        raise CheckpointError(Problem(name, "is a pickled object, not a tensor", "Load another checkpoint"))
