"""Attaching communicators: a table from mode and role to what a layer shall talk through.

A layer says its ``role`` (``"column"``, ``"row"``, ``"head"``, ``"embedding"``, ``"attention"``, ``"model"``) and has
an attribute ``communicator``. For a role of your own, whose weights are split like those of another::

    @register_communicator("msp", "my role", like="column")
    def build(ties: Ties, layer: nn.Module) -> Communicator: ...

In modes for which nothing is registered, the layer gets what that other role gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import nn

from internlm.core.context.group import Group
from internlm.core.parallel.blocks import containing_block, declared_blocks
from internlm.core.parallel.communicator import IDENTITY, Communicator
from internlm.core.parallel.isp import IspAttention, IspEmbedding, IspHead, IspLinear, IspModel, TokensHead
from internlm.core.parallel.param_state import placement_of
from internlm.core.parallel.sharding import LIKE
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
    VocabEmbedding,
    sum_to_all,
    sum_to_tokens,
    units_to_all,
    units_to_tokens,
)
from internlm.core.parallel.weight_gatherer import Linear, Overlap, WeightGatherer

SPLITS_WEIGHT_ROLES = ("column", "row", "head")


@dataclass(frozen=True)
class CommContext:
    """The groups over which a model is split; under isp also who gathers its weights."""

    tensor: Group
    weight: Group
    gatherer: WeightGatherer | None = None
    numbers: Mapping[nn.Module, int] = field(default_factory=dict)  # of the linears, in the order in which they run
    blocks: Mapping[nn.Module, int] = field(default_factory=dict)  # in which each module lies


Build = Callable[[CommContext, Any], Any]
TABLE: dict[tuple[str, str], Build] = {}


def register_communicator(mode: str, role: str, like: str | None = None) -> Callable[[Build], Build]:
    """Decorate a function that builds the communicator of a layer in ``role`` under ``mode``. A role of your own must
    be registered before the model is built, and says of which other it is ``like``."""

    def register(build: Build) -> Build:
        TABLE[mode, role] = build
        if like is not None:
            LIKE[role] = like
        return build

    return register


def _embedding(combine_units: Any, combine_sum: Any) -> Build:
    def build(ties: CommContext, layer: Any) -> VocabEmbedding | HiddenEmbedding:
        placement = placement_of(layer.weight)
        if placement.shard is not None and placement.shard.axis is not None:
            return HiddenEmbedding(ties.tensor, combine_units)
        return VocabEmbedding(ties.tensor, placement, combine_sum)

    return build


def _isp_linear(ties: CommContext, layer: Any) -> Communicator:
    return IspLinear(ties.gatherer, ties.numbers[layer]) if ties.gatherer else IDENTITY


def _isp_head(ties: CommContext, layer: Any) -> TokensHead:
    return IspHead(ties.gatherer, ties.numbers[layer], ties.tensor) if ties.gatherer else TokensHead(ties.tensor)


def _isp_attention(ties: CommContext, layer: Any) -> IspAttention:
    gatherer = ties.gatherer
    before = partial(gatherer.before_attention, ties.blocks[layer]) if gatherer else lambda: None
    return IspAttention(ties.tensor, before)


TABLE |= {
    ("mtp", "column"): lambda ties, layer: MtpColumn(ties.tensor),
    ("mtp", "row"): lambda ties, layer: MtpRow(ties.tensor),
    ("mtp", "head"): lambda ties, layer: SplitHead(ties.tensor, placement_of(layer.weight)),
    ("mtp", "embedding"): _embedding(units_to_all, sum_to_all),
    ("msp", "column"): lambda ties, layer: MspColumn(ties.tensor),
    ("msp", "row"): lambda ties, layer: SequenceRow(ties.tensor),
    ("msp", "head"): lambda ties, layer: SequenceHead(ties.tensor, placement_of(layer.weight)),
    ("msp", "embedding"): _embedding(units_to_tokens, sum_to_tokens),
    ("msp", "model"): lambda ties, layer: SequenceModel(ties.tensor),
    ("fsp", "column"): lambda ties, layer: FspColumn(ties.tensor),
    ("fsp", "row"): lambda ties, layer: SequenceRow(ties.tensor),
    ("fsp", "head"): lambda ties, layer: SequenceHead(ties.tensor, placement_of(layer.weight)),
    ("fsp", "embedding"): _embedding(units_to_tokens, sum_to_tokens),
    ("fsp", "model"): lambda ties, layer: SequenceModel(ties.tensor),
    ("isp", "column"): _isp_linear,
    ("isp", "row"): _isp_linear,
    ("isp", "head"): _isp_head,
    ("isp", "embedding"): lambda ties, layer: IspEmbedding(ties.weight, placement_of(layer.weight).global_shape[0]),
    ("isp", "attention"): _isp_attention,
    ("isp", "model"): lambda ties, layer: IspModel(ties.tensor),
}


def attach_communicators(
    model: nn.Module, mode: str, tensor: Group, weight: Group, overlap: Overlap | None = None
) -> WeightGatherer | None:
    """Give every layer of ``model`` that has a role its communicator; under isp, return who gathers the weights."""
    split = weight.size * tensor.size > 1 if mode == "isp" else tensor.size > 1
    if not split:
        return None
    gathers = mode == "isp" and weight.size > 1
    ties = _isp_ties(model, tensor, weight, overlap or Overlap()) if gathers else CommContext(tensor, weight)
    for module in model.modules():
        role = getattr(module, "role", "")
        build = TABLE.get((mode, role)) or TABLE.get((mode, LIKE.get(role, "")))
        if build is not None:
            module.communicator = build(ties, module)
    return ties.gatherer


def _isp_ties(model: nn.Module, tensor: Group, weight: Group, overlap: Overlap) -> CommContext:
    names = {module: name for name, module in model.named_modules()}
    declared = declared_blocks(model)
    enclosing = {name: containing_block(name, declared) for name in names.values()}
    numbers: dict[nn.Module, int] = {}
    members: dict[str, int] = {}  # linears of each block so far; the order of its keys is that of the blocks
    linears: list[Linear] = []
    for module, name in names.items():
        role = getattr(module, "role", "")
        if LIKE.get(role, role) in SPLITS_WEIGHT_ROLES:
            parameter = cast(nn.Parameter, module.weight)
            block = enclosing[name]
            place = members.get(block, 0)
            members[block] = place + 1
            numbers[module] = len(linears)
            rows = math.prod(placement_of(parameter, name).global_shape[:-1])
            chunk = getattr(model.get_submodule(block), "chunk", 0)
            linears.append(Linear(parameter, rows, list(members).index(block), place, chunk))
    blocks = {
        module: list(members).index(enclosing[name]) for module, name in names.items() if enclosing[name] in members
    }
    return CommContext(tensor, weight, WeightGatherer(weight, linears, overlap), numbers, blocks)
