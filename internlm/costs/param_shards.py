"""Inventory of the parameters on a rank, and their layout in the optimizer's flat buffers.

``internlm.train.inventory`` lists the parameters of a sharded model: the model of the run or, before a run, a model
built on the meta device. The list comes from the model, not from a formula, so the inventory covers users' own models
too. Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.parallel.placement import ParamPlacement
from internlm.costs.symbols import GroupSymbols, NoCostFormulaError, Symbols, group_symbols, rows_per_rank
from internlm.model.spec import DecoderSpec
from internlm.solver.optimizer.flat_buffers import Layout, bucket_size, lay_out
from internlm.solver.optimizer.param_groups import ParamGroupKey, param_group_key
from internlm.utils.dtype import torch_dtype, wide


@dataclass(frozen=True, kw_only=True)
class ParamShard:
    """Shard of one parameter on a rank of the tensor or weight group, before the zero group splits it further."""

    name: str
    placement: ParamPlacement
    dtype: torch.dtype
    """Compute dtype of the parameter."""
    rows: int
    """Number of rows, with padding rows if ``placement`` splits unevenly; ``fully_shard`` splits along this axis."""
    width: int
    """Number of elements of a row."""
    block: str = ""
    """Name of the block (FSDP unit) that holds the parameter; empty for the root."""
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Number of elements of the shard."""
        return self.rows * self.width

    def padded_numel(self, zero: Group) -> int:
        """Return the number of elements that ``fully_shard`` gathers, with rows padded to equal shards."""
        return zero.size * self.numel_per_rank(zero)

    def numel_per_rank(self, zero: Group) -> int:
        """Return the number of elements that ``fully_shard`` allocates on each rank of the zero group, with padding."""
        return rows_per_rank(self.rows, zero) * self.width

    def owned_numel(self, zero: Group, zero_rank: int) -> int:
        """Return the number of elements that ``zero_rank`` owns, without padding; the last ranks may own none."""
        # As torch.chunk does: 5 rows over 4 ranks are 2, 2, 1 and 0.
        rows = rows_per_rank(self.rows, zero)
        return max(min(rows, self.rows - zero_rank * rows), 0) * self.width


@dataclass(frozen=True, kw_only=True)
class ParamInventory:
    """Inventory of the parameters that each rank of one pipeline stage holds, in model order."""

    config: Config
    """Resolved config."""
    world_size: int
    stage: int
    shards: tuple[ParamShard, ...]
    spec: DecoderSpec | None
    """Spec of the built-in decoder; None for other models, whose activations and collectives have no formula."""

    @cached_property
    def groups(self) -> GroupSymbols:
        """Sizes of the parallel groups."""
        return group_symbols(self.config, self.world_size)

    @cached_property
    def symbols(self) -> Symbols:
        """Values of the cost formulas' symbols for this stage of the decoder.

        Raises:
            NoCostFormulaError: The model is not the built-in decoder.
        """
        if self.spec is None:
            raise NoCostFormulaError(self.config.model_type, "which does not build the decoder of internlm.model")
        return Symbols.of(self.config, self.world_size, self.stage, self.spec)

    @cached_property
    def param_groups(self) -> dict[ParamGroupKey, list[ParamShard]]:
        """Trainable parameters by param-group key."""
        # Use the optimizer's own key function, because grouping is a decision, not a cost. Only the formulas of bytes
        # and collectives must be independent of the code that they check.
        found: dict[ParamGroupKey, list[ParamShard]] = {}
        for shard in self.shards:
            if shard.trainable:
                key = param_group_key(shard.name, shard.placement, shard.dtype, self.config.adam, self.config.optimizer)
                found.setdefault(key, []).append(shard)
        return found

    @cached_property
    def flat_buffers(self) -> dict[ParamGroupKey, FlatBuffer]:
        """Flat buffer of each param group; not used if the zero group shards parameters."""
        zero, found = self.config.hybrid_zero_optimizer, dict[ParamGroupKey, FlatBuffer]()
        for key, shards in self.param_groups.items():
            # Muon updates whole matrices, so no bucket may split a matrix.
            by_parameter = key.needs_matrices or not zero.use_split_tensor_optim
            sizes = [shard.numel for shard in shards]
            found[key] = FlatBuffer(shards, lay_out(sizes, self.groups.z.size, bucket_size(zero), by_parameter))
        return found


class FlatBuffer(NamedTuple):
    """Flat buffer of one param group: its parameters, in model order, and their layout in the buffer."""

    shards: Sequence[ParamShard]
    layout: Layout

    def owned_by(self, zero_rank: int) -> list[ParamShard]:
        """Return the parameters whose first element ``zero_rank`` owns."""
        runs = [bucket.shard(zero_rank) for bucket in self.layout.buckets]
        starts = zip(self.shards, self.layout.starts, strict=True)
        return [shard for shard, start in starts if any(run.start <= start < run.stop for run in runs)]


def partial_sum_group(s: GroupSymbols, mode: ParallelMode) -> Group:
    """Return the group over which gradients with ``partial_over=mode`` are summed."""
    # Only the first and the last stage hold a copy of a tied embedding, so its gradient is summed over these two.
    return Group(ParallelMode.PIPELINE, size=2) if mode is ParallelMode.PIPELINE else s.split


def reduced_itemsize(config: Config, dtype: torch.dtype) -> int:
    """Return c, the bytes per element of the reduced gradient of a parameter of ``dtype``."""
    if config.reduce_comm_dtype is not None:
        return torch_dtype(config.reduce_comm_dtype).itemsize
    return (wide(dtype) if config.hybrid_zero_optimizer.fp32_grad_accum else dtype).itemsize
