"""Attach a communicator to each layer of a model, selected by the tensor mode and the role of the layer.

A parallel layer has two attributes: its ``role`` (``"column"``, ``"row"``, ``"head"``, ``"embedding"``,
``"attention"``, ``"model"``) and its ``communicator``. A custom role, whose weights are split like those of a built-in
role, is registered as follows::

    @register_communicator("msp", "my role", like="column")
    def build(context: CommContext, layer: nn.Module) -> Communicator: ...

In modes for which no function is registered, a layer with the custom role gets the communicator of the built-in role.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from internlm.core.context.group import Group
from internlm.core.parallel.blocks import containing_block, declared_blocks
from internlm.core.parallel.communicator import IDENTITY, Communicator
from internlm.core.parallel.isp import IspAttention, IspEmbedding, IspHead, IspLinear, IspModel, TokensHead
from internlm.core.parallel.param_state import placement_of
from internlm.core.parallel.sharding import CUSTOM_ROLES, Role, TensorMode
from internlm.core.parallel.tensor_parallel import (
    FspColumn,
    HiddenEmbedding,
    MspColumn,
    MtpColumn,
    MtpRow,
    SequenceHead,
    SequenceModel,
    SequenceRow,
    SplitHead,
    SplitHeads,
    VocabEmbedding,
    all_gather_hidden,
    all_reduce_embedding,
    all_to_all_tokens,
    reduce_scatter_tokens,
)
from internlm.core.parallel.weight_gatherer import GatheredLinear, Overlap, WeightGatherer

#: Roles whose weights isp gathers for each matmul. The table of an embedding is gathered once, for the look-up.
GATHERED_ROLES = ("column", "row", "head")


@dataclass(frozen=True, kw_only=True)
class CommContext:
    """Context for building communicators: process groups and, under isp, the weight gatherer."""

    tensor: Group
    weight: Group
    gatherer: WeightGatherer | None = None
    linear_index: Mapping[nn.Module, int] = field(default_factory=dict)
    """Index of each linear in the weight gatherer, in execution order."""
    block_index: Mapping[nn.Module, int] = field(default_factory=dict)
    """Index of the enclosing block for each module."""


#: Function that builds the communicator of a layer: (context, layer) → communicator.
Build = Callable[[CommContext, Any], Any]
TABLE: dict[tuple[TensorMode, str], Build] = {}


def register_communicator(mode: TensorMode, role: str, like: Role | None = None) -> Callable[[Build], Build]:
    """Register the decorated function to build the communicators of all layers with ``role`` under ``mode``.

    Args:
        mode: Tensor mode.
        role: Role of the layers. A custom role must be registered before the model is built.
        like: Built-in role that determines how the weights of a custom role are split. None: ``role`` is built in.
    """

    def register(build: Build) -> Build:
        TABLE[mode, role] = build
        if like is not None:
            CUSTOM_ROLES[role] = like
        return build

    return register


Combine = Callable[[Tensor, Group], Tensor]


def _embedding(combine_hidden: Combine, combine_vocab: Combine) -> Build:
    def build(context: CommContext, layer: Any) -> VocabEmbedding | HiddenEmbedding:
        placement = placement_of(layer.weight)
        # Read from the placement, not from the config: a tied table is split by vocabulary in any case.
        if placement.shard is not None and placement.shard.axis is not None:
            return HiddenEmbedding(context.tensor, combine_hidden)
        return VocabEmbedding(context.tensor, placement, combine_vocab)

    return build


# Under isp with a weight group of one rank there is no gatherer: weights are whole, only tokens are split.


def _isp_linear(context: CommContext, layer: Any) -> Communicator:
    return IspLinear(context.gatherer, context.linear_index[layer]) if context.gatherer else IDENTITY


def _isp_head(context: CommContext, layer: Any) -> TokensHead:
    if context.gatherer is None:
        return TokensHead(context.tensor)
    return IspHead(context.gatherer, context.linear_index[layer], context.tensor)


def _isp_attention(context: CommContext, layer: Any) -> IspAttention:
    gatherer = context.gatherer
    before = partial(gatherer.before_attention, context.block_index[layer]) if gatherer else lambda: None
    return IspAttention(context.tensor, before)


def _isp_embedding(context: CommContext, layer: Any) -> IspEmbedding:
    return IspEmbedding(context.weight, placement_of(layer.weight).global_shape[0])


TABLE |= {
    # No entry ("mtp", "model"): every rank holds all tokens between layers, so the identity communicator applies.
    ("mtp", "column"): lambda context, layer: MtpColumn(context.tensor),
    ("mtp", "row"): lambda context, layer: MtpRow(context.tensor),
    ("mtp", "heads"): lambda context, layer: SplitHeads(context.tensor),
    ("mtp", "head"): lambda context, layer: SplitHead(context.tensor, placement_of(layer.weight)),
    ("mtp", "embedding"): _embedding(all_gather_hidden, all_reduce_embedding),
    ("msp", "column"): lambda context, layer: MspColumn(context.tensor),
    ("msp", "row"): lambda context, layer: SequenceRow(context.tensor),
    ("msp", "heads"): lambda context, layer: SplitHeads(context.tensor),
    ("msp", "head"): lambda context, layer: SequenceHead(context.tensor, placement_of(layer.weight)),
    ("msp", "embedding"): _embedding(all_to_all_tokens, reduce_scatter_tokens),
    ("msp", "model"): lambda context, layer: SequenceModel(context.tensor),
    ("fsp", "column"): lambda context, layer: FspColumn(context.tensor),
    ("fsp", "row"): lambda context, layer: SequenceRow(context.tensor),
    ("fsp", "heads"): lambda context, layer: SplitHeads(context.tensor),
    ("fsp", "head"): lambda context, layer: SequenceHead(context.tensor, placement_of(layer.weight)),
    ("fsp", "embedding"): _embedding(all_to_all_tokens, reduce_scatter_tokens),
    ("fsp", "model"): lambda context, layer: SequenceModel(context.tensor),
    ("isp", "column"): _isp_linear,
    ("isp", "row"): _isp_linear,
    ("isp", "head"): _isp_head,
    ("isp", "embedding"): _isp_embedding,
    ("isp", "attention"): _isp_attention,
    ("isp", "model"): lambda context, layer: IspModel(context.tensor),
}


def attach_communicators(
    model: nn.Module, mode: TensorMode, tensor: Group, weight: Group, overlap: Overlap | None = None
) -> WeightGatherer | None:
    """Attach a communicator to every layer of ``model`` that has a role.

    Args:
        model: Model built with the shards of this rank.
        mode: Tensor mode.
        tensor: Tensor group, over which activations and, in all modes except isp, weights are split.
        weight: Weight group, over which isp splits weights.
        overlap: Settings of the weight prefetch under isp. None: no prefetch.

    Returns:
        The weight gatherer if the mode is isp and the weight group has several ranks, else None.
    """
    split = weight.size * tensor.size > 1 if mode == "isp" else tensor.size > 1
    if not split:
        return None  # the layers keep their identity communicators, which cost nothing
    if mode == "isp" and weight.size > 1:
        context = _gathering_context(model, tensor, weight, overlap or Overlap())
    else:
        context = CommContext(tensor=tensor, weight=weight)
    for module in model.modules():
        role = getattr(module, "role", "")
        build = TABLE.get((mode, role)) or TABLE.get((mode, CUSTOM_ROLES.get(role, "")))
        if build is not None:
            module.communicator = build(context, module)
    return context.gatherer


def _gathering_context(model: nn.Module, tensor: Group, weight: Group, overlap: Overlap) -> CommContext:
    """Build the communicator context of ``model`` for isp: the weight gatherer and the indices of linears and blocks.

    Linears are indexed in the order of ``named_modules``, which must be the order in which the forward pass calls them.
    """
    # A linear outside of all blocks, such as the head, is treated as a block of its own.
    names = {module: name for name, module in model.named_modules()}
    declared = declared_blocks(model)
    enclosing = {name: containing_block(name, declared) for name in names.values()}
    linear_index: dict[nn.Module, int] = {}
    linears_in: dict[str, int] = {}  # number of positions of each block so far, in the order of the blocks
    linears: list[GatheredLinear] = []
    for module, name in names.items():
        role = getattr(module, "role", "")
        if CUSTOM_ROLES.get(role, role) not in GATHERED_ROLES:
            continue
        parameter, block = cast(nn.Parameter, module.weight), enclosing[name]
        # Linears with one input have one position, whatever their number.
        position = linears_in.get(block, 0) - getattr(module, "shares_input", False)
        linears_in[block] = position + 1
        linear_index[module] = len(linears)
        linears.append(
            GatheredLinear(
                weight=parameter,
                rows=math.prod(placement_of(parameter, name).global_shape[:-1]),
                block=list(linears_in).index(block),
                position=position,
                chunk=getattr(model.get_submodule(block), "chunk", 0),
            )
        )
    blocks = list(linears_in)
    return CommContext(
        tensor=tensor,
        weight=weight,
        gatherer=WeightGatherer(weight, linears, overlap),
        linear_index=linear_index,
        block_index={m: blocks.index(enclosing[name]) for m, name in names.items() if enclosing[name] in linears_in},
    )
