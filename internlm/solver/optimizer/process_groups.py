"""The groups of ranks that an optimizer talks to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.parallel_mode import ParallelMode

#: A rank that shares its state with nobody.
ALONE = Group(ParallelMode.ZERO1)


@dataclass(frozen=True)
class ProcessGroups:
    """``zero`` shares one copy of the optimizer's state, ``replica`` joins the ranks that hold the same shard of it;
    ``split`` are the groups over which parameters are split, or gradients of whole ones still partial sums;
    ``pipeline`` joins the stages, ``ends`` the first and the last, which may share an embedding."""

    zero: Group = ALONE
    replica: Group = ALONE
    split: tuple[Group, ...] = ()
    pipeline: Group = NO_PIPELINE
    ends: Group = NO_PIPELINE

    @property
    def by_split(self) -> Mapping[ParallelMode, Group]:
        """Those over which parameters are split."""
        return {group.mode: group for group in self.split}

    def of_partial(self, mode: ParallelMode) -> Group:
        """The group over which gradients are partial sums that are ``partial_over`` a mode."""
        return self.ends if mode is ParallelMode.PIPELINE else self.by_split[mode]
