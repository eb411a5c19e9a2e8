"""The parameters that a rank holds, and how they lie in the optimizer's flat buffers: from the config alone.

The symbols are those of :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.parallel.placement import ParamPlacement, ShardSpec, constant
from internlm.costs.symbols import Symbols
from internlm.costs.traffic_model import Linear, block_linears, by_hidden_units, share
from internlm.solver.optimizer.flat_buffers import Layout, bucket_size, lay_out
from internlm.solver.optimizer.param_groups import ParamGroupKey, param_group_key
from internlm.utils.dtype import torch_dtype, wide

NAMES = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")


class Parameter(NamedTuple):
    """One of them, and its elements on this rank; ``width`` of them make a row of a matrix."""

    name: str
    elements: int
    width: int = 1
    is_matrix: bool = True
    is_hidden: bool = False
    is_norm: bool = False
    split_over: ParallelMode | None = None
    partial_over: ParallelMode | None = None

    @property
    def rows(self) -> int:
        """Of a matrix; of a vector, elements."""
        return self.elements // self.width


class Buffer(NamedTuple):
    """The parameters of one kind, in the order of the model, and how they lie side by side."""

    parameters: list[Parameter]
    layout: Layout

    def owned(self, rank: int) -> list[Parameter]:
        """Those of which ``rank`` of the zero group owns the first element."""
        runs = [bucket.run(rank) for bucket in self.layout.buckets]
        starts = zip(self.parameters, self.layout.starts, strict=True)
        return [each for each, start in starts if any(run.start <= start < run.stop for run in runs)]


def kinds(s: Symbols) -> Mapping[ParamGroupKey, list[Parameter]]:
    """The parameters of each kind."""
    config, found = s.config, dict[ParamGroupKey, list[Parameter]]()
    for each in parameters(s):
        shard = ShardSpec(each.split_over, 0, s.split.size) if each.split_over else None
        placement = ParamPlacement(
            (each.elements,),
            constant(0.0),
            shard=shard,
            partial_over=each.partial_over,
            is_matrix=each.is_matrix,
            is_hidden=each.is_hidden,
        )
        kind = param_group_key(each.name, placement, _dtype(s, each), config.adam, config.optimizer)
        found.setdefault(kind, []).append(each)
    return found


def buffers(s: Symbols) -> Mapping[ParamGroupKey, Buffer]:
    """The flat buffers of a rank."""
    zero, found = s.config.hybrid_zero_optimizer, {}
    for kind, members in kinds(s).items():
        whole = kind.needs_matrices or not zero.use_split_tensor_optim
        found[kind] = Buffer(members, lay_out([m.elements for m in members], s.z.size, bucket_size(zero), whole))
    return found


def _dtype(s: Symbols, parameter: Parameter) -> torch.dtype:
    dtype = torch_dtype(str(s.config.model.dtype))
    return wide(dtype) if parameter.is_norm and s.config.use_fp32_norm else dtype


def parameters(s: Symbols) -> Iterator[Parameter]:
    """In the order of the model: of matrices, of biases split like the output that they are added to (of columns, but
    under isp), and of vectors that are whole (other biases, and norms: 2 in a block and 1 after the last, with bias for
    layernorm)."""
    if s.stage_layers.has_embedding or (s.stage_layers.has_head and s.config.model.tie_word_embeddings):
        yield _table(s, "embedding.weight")
    for number in sorted(number for chunk in s.stage_layers.chunks for number in chunk):
        yield from _block(s, f"layers.{number}")
    if s.stage_layers.has_head:
        yield from _norm(s, "norm")
        if not s.config.model.tie_word_embeddings:
            yield _table(s, "output.weight")


def _block(s: Symbols, name: str) -> Iterator[Parameter]:
    wqkv, wo, w13, w2 = zip(NAMES, block_linears(s), strict=True)
    yield from _norm(s, f"{name}.attention_norm")
    for each, weight in (wqkv, wo):
        yield from _linear(s, f"{name}.{each}", weight)
    yield from _norm(s, f"{name}.ffn_norm")
    for each, weight in (w13, w2):
        yield from _linear(s, f"{name}.{each}", weight)


def _linear(s: Symbols, name: str, weight: Linear) -> Iterator[Parameter]:
    """Of its weight, isp splits the rows and pads them, the other modes split evenly."""
    n, mode = s.split.size, s.split.mode if s.split.size > 1 else None
    elements, width = weight.outputs * weight.inputs // n, weight.inputs
    if s.mode == "isp":
        elements = share(weight.outputs, s.w) * weight.inputs
    elif weight.role == "row":
        width //= n
    yield Parameter(f"{name}.weight", elements, width, is_hidden=True, split_over=mode)
    if weight.bias and weight.role == "column" and s.mode != "isp":
        yield Parameter(f"{name}.bias", weight.outputs // n, is_matrix=False, split_over=mode)
    elif weight.bias:
        yield Parameter(f"{name}.bias", weight.outputs, is_matrix=False, partial_over=_partial(s))


def _norm(s: Symbols, name: str) -> Iterator[Parameter]:
    vector = Parameter(f"{name}.weight", s.H, is_matrix=False, is_norm=True, partial_over=_partial(s))
    yield vector
    if s.config.model.norm_type == "layernorm":
        yield vector._replace(name=f"{name}.bias")


def _table(s: Symbols, name: str) -> Parameter:
    """Embedding or head, split by words but for an embedding that is split by hidden units; a tied one is one table, of
    which a stage that has either of the two alone holds a copy."""
    elements, width, stage_layers = share(s.V, s.split) * s.H, s.H, s.stage_layers
    if name == "embedding.weight" and s.mode != "isp" and by_hidden_units(s):
        elements, width = s.V * s.H // s.t.size, s.H // s.t.size
    is_copy = s.config.model.tie_word_embeddings and stage_layers.has_embedding != stage_layers.has_head
    return Parameter(
        name,
        elements,
        width,
        split_over=s.split.mode if s.split.size > 1 else None,
        partial_over=ParallelMode.PIPELINE if is_copy else None,
    )


def _partial(s: Symbols) -> ParallelMode | None:
    """The mode over which gradients of whole vectors are partial sums."""
    return None if s.mode == "mtp" else s.split.mode


def group_of_partial(s: Symbols, mode: ParallelMode) -> Group:
    """The ranks that have parts of such a sum."""
    return Group(ParallelMode.PIPELINE, size=2) if mode is ParallelMode.PIPELINE else s.split


def reduced_size(s: Symbols, dtype: torch.dtype) -> int:
    """Bytes of an element of a gradient of parameters of ``dtype``, as it is sent."""
    config = s.config
    if config.reduce_comm_dtype is not None:
        return torch_dtype(config.reduce_comm_dtype).itemsize
    return (wide(dtype) if config.hybrid_zero_optimizer.fp32_grad_accum else dtype).itemsize
