"""Walk along the tensors of the forward and backward passes, in the order in which one process computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from internlm.verify.record import Call, Pass, RankRecord, Site, by_sample
from internlm.verify.relations import Relation, explain, factor_of, is_close, relate, widened
from internlm.verify.tensors import assemble, join_shards, relative_l2

#: Tensors smaller than this, relative to the largest of their pass, are compared as if they were as large: they are
#: rounding of sums that cancel.
SMALLEST = 1e-9


@dataclass(frozen=True, kw_only=True)
class Found:
    """First tensor of a pass that differs."""

    site: Site
    after: Site | None
    """Last tensor before it that agrees."""
    micro_batch: int
    data_rank: int
    shards: list[Tensor]
    """Tensor of each rank of the tensor group."""
    wanted: Pass
    """Pass of one process."""
    found: Pass
    """Pass of the first rank of the tensor group."""
    crosses_stages: bool
    """Whether the two are on different stages of a pipeline."""

    @property
    def reference(self) -> Tensor:
        """Tensor of one process."""
        return self.wanted.tensors[self.site]

    @property
    def caller(self) -> str | None:
        """Module in whose code the tensor is between its own module and another; None for the model's caller."""
        caller = self.wanted.callers.get(self.site.module)
        while not self.site.is_input and caller and self._is_output_of(caller):
            caller = self.wanted.callers.get(caller)  # it returns what the module returned
        return caller

    @property
    def module(self) -> str | None:
        """Module whose code computes the tensor; None: the model's caller.

        A module computes its output and the gradient of its input. What comes before its input, or after its output in
        the backward pass, is code of its caller.
        """
        return self.site.module if self.site.is_input == self.site.is_gradient else self.caller

    @property
    def calls(self) -> list[Call]:
        """Collectives called in the code of this module."""
        return self.calls_of(self.found)

    def calls_of(self, its_pass: Pass) -> list[Call]:
        """Return the collectives that this module called in the pass of a rank."""
        backward = self.site.is_gradient
        return [call for call in its_pass.calls if call.module == self.module and call.in_backward == backward]

    def _is_output_of(self, module: str) -> bool:
        tensor = self.wanted.tensors.get(self.site._replace(module=module))
        return tensor is not None and tensor.equal(self.reference)

    @property
    def difference(self) -> float:
        """Largest relative difference of the tensors, or of the tensor that they are shards of."""
        wholes = join_shards(self.shards, self.reference.shape)
        return max((relative_l2(whole, self.reference) for whole in wholes), default=float("inf"))

    @property
    def where(self) -> str:
        """Micro-batch and data rank, if they are not the first."""
        parts = [f"micro-batch {self.micro_batch}"] * bool(self.micro_batch)
        parts += [f"data rank {self.data_rank}"] * bool(self.data_rank)
        return f" ({', '.join(parts)})" if parts else ""


Selects = Callable[[Site], bool]


class _Last(NamedTuple):
    site: Site | None
    stage: int


class Walk:
    """Walk along the passes of one step of several ranks, beside those of one process.

    Args:
        reference: Detailed record of one process: the micro-batches of the first data rank, then of the second, ...
        ranks: Detailed record of each rank.
        limit: Relative difference up to which tensors count as equal.
    """

    def __init__(self, reference: RankRecord, ranks: Sequence[RankRecord], limit: float) -> None:
        self.reference, self.limit = reference, limit
        self.groups = [list(stages.values()) for stages in by_sample(ranks).values()]
        """Records by data rank, stage and tensor rank."""
        self.unresolved: list[Found] = []
        """Parts of a sum after which no tensor of the pass agrees: a mistake if gradients are wrong too."""
        self.micro_batches = len(reference.passes) // max(1, len(self.groups))

    def passes(self) -> Iterator[tuple[int, int, Pass]]:
        """Yield micro-batch, data rank and the pass of one process, first micro-batches first."""
        for micro_batch in range(self.micro_batches):
            for data_rank in range(len(self.groups)):
                yield micro_batch, data_rank, self.reference.passes[data_rank * self.micro_batches + micro_batch]

    def never_run(self) -> str | None:
        """Return the first micro-batch that some rank, or the one process, has never run, in words."""
        for micro_batch, data_rank, wanted in self.passes():
            if not wanted.tensors:
                return f"micro-batch {micro_batch} of data rank {data_rank} never runs on one process"
            for stage, group in enumerate(self.groups[data_rank]):
                if any(len(r.passes) <= micro_batch or not r.passes[micro_batch].tensors for r in group):
                    return f"micro-batch {micro_batch} of data rank {data_rank} never runs on stage {stage}"
        return None

    def compared(self) -> int:
        """Return the number of tensors of one process that some stage has, whole or as shards that fit together."""
        relations = (
            relate([each.tensors[site] for each in passes], wanted.tensors[site], self.limit)
            for micro_batch, data_rank, wanted in self.passes()
            for site, _, passes in self._sites(micro_batch, data_rank, wanted)
        )
        return sum(relation is not Relation.UNKNOWN for relation in relations)

    def _sites(self, micro_batch: int, data_rank: int, wanted: Pass) -> Iterator[tuple[Site, int, list[Pass]]]:
        """Yield each site of a pass of one process, with each stage that has it and the passes of its ranks."""
        stages = [[record.passes[micro_batch] for record in group] for group in self.groups[data_rank]]
        for site in wanted.tensors:
            for stage, passes in enumerate(stages):
                if all(site in each.tensors for each in passes):
                    yield site, stage, passes

    def first(self, selects: Selects) -> Found | None:
        """Return the first tensor that differs in any pass, of those at the sites that ``selects`` returns true for."""
        found = (self._first_of(m, d, wanted, selects) for m, d, wanted in self.passes())
        return next((each for each in found if each is not None), None)

    def _first_of(self, micro_batch: int, data_rank: int, wanted: Pass, selects: Selects) -> Found | None:
        """Walk along one pass.

        Parts of a sum may be on the ranks for a while: they are a mistake only if what follows from them is wrong.
        """
        # A mistake in one tensor makes all tensors after it wrong, so the walk ends at the first.
        floor, agreeing, partial = _floor(wanted, selects), _Last(None, 0), list[Found]()
        for site, stage, passes in self._sites(micro_batch, data_rank, wanted):
            if not selects(site):
                continue
            shards = [each.tensors[site] for each in passes]
            relation = relate(shards, wanted.tensors[site], self.limit, floor)
            if relation is Relation.EQUAL:
                agreeing = _Last(site, stage)
                if partial and _is_new(site, wanted):
                    # What follows from the parts agrees, so something has added them.
                    partial.clear()
            elif relation is not Relation.UNKNOWN:
                found = Found(
                    site=site,
                    after=agreeing.site,
                    micro_batch=micro_batch,
                    data_rank=data_rank,
                    shards=shards,
                    wanted=wanted,
                    found=passes[0],
                    crosses_stages=agreeing.site is not None and stage != agreeing.stage,
                )
                if relation is Relation.DIFFERENT:
                    return partial[0] if partial else found
                partial.append(found)
        self.unresolved += partial[:1]
        return None

    def same_place(self, found: Found) -> list[tuple[str, Tensor]]:
        """Return the tensors of one process at the same place in other micro-batches, with their names in words."""
        return [
            (f"micro-batch {micro_batch} of data rank {data_rank}", each.tensors[found.site])
            for micro_batch, data_rank, each in self.passes()
            if (micro_batch, data_rank) != (found.micro_batch, found.data_rank) and found.site in each.tensors
        ]


def _floor(wanted: Pass, selects: Selects) -> float:
    tensors = (t for site, t in wanted.tensors.items() if selects(site) and t.is_floating_point())
    return SMALLEST * max((tensor.double().norm().item() for tensor in tensors), default=0.0)


def _is_new(site: Site, wanted: Pass) -> bool:
    """Return whether a tensor is computed here, rather than passed on from before, as masks and rotary tables are."""
    tensor = wanted.tensors[site]
    earlier = takewhile(lambda other: other != site, wanted.tensors)
    return tensor.is_floating_point() and not any(wanted.tensors[other].equal(tensor) for other in earlier)


def explain_found(found: Found, walk: Walk) -> str:
    """Return in words how a tensor differs; empty if no simple relation holds."""
    return (
        _by_calls(found, walk)
        or _by_bias(found, walk)
        or explain(found.shards, found.reference, walk.same_place(found), walk.limit)
    )


def _by_bias(found: Found, walk: Walk) -> str:
    """Say how often a bias of the module is added, if that is all that differs."""
    details, wholes = walk.reference.details, join_shards(found.shards, found.reference.shape)
    if details is None or found.site.is_gradient or not wholes or found.reference.dtype != torch.float64:
        return ""  # in lower precision, rounding is as large as a bias
    for name in details.order:
        if name.rpartition(".")[0] != found.site.module:
            continue
        bias = assemble([{name: details.initial[name]}]).tensors[name].double()
        if bias.dim() == 1 and bias.shape[-1:] == found.reference.shape[-1:]:
            excess = wholes[0].double() - found.reference.double()
            factor = factor_of(excess, bias.expand_as(excess), walk.limit * 1e4)
            if factor is not None:
                return f"{name} is added {1 + factor:.6g} times"
    return ""


def _by_calls(found: Found, walk: Walk) -> str:
    """Explain a difference by what the collectives of the module were given."""
    group = next(g for g in walk.groups[found.data_rank] if found.site in g[0].passes[found.micro_batch].tensors)
    # Ranks of one group call the same collectives in the same order, or else they hang.
    by_rank = [found.calls_of(record.passes[found.micro_batch]) for record in group]
    for calls in zip(*by_rank, strict=False):
        sent = [call.sent for call in calls if call.sent is not None]
        collective, mode = calls[0].collective, calls[0].mode
        if len(sent) != len(group) or not collective.endswith(("reduce", "reduce-scatter")):
            continue
        wanted = found.reference.reshape(-1)
        flat = [tensor.double().reshape(-1) for tensor in sent]
        if any(tensor.shape != wanted.shape for tensor in flat):
            continue
        # A sum of what is complete is the mistake, even if a later division hid it from the values of one process.
        complete = all(is_close(tensor, wanted, widened(walk.limit)) for tensor in flat)
        if complete and len(group) > 1:
            return f"the {collective} over {mode} is given what is already complete: it is doubled"
        if len(group) > 1 and is_close(torch.stack(flat).sum(0), wanted, widened(walk.limit)) and mode != "tensor":
            return f"the {collective} is over {mode}, but the parts of the sum are on the ranks of tensor"
    return ""
