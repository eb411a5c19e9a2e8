"""What a pipeline schedule is made of. Pure.

A model is cut into virtual stages 0 … S − 1, in the order of its layers; the ranks of a pipeline, its *stages*, hold
``chunks`` of them each. A schedule is a :class:`Table`: for each rank, in which order it runs which actions.

=====  ==================================================================================================
``F``  forward of a chunk for a micro-batch
``B``  backward: the gradient of the chunk's input; of its weights too, where the table has no W for it
``W``  the gradient of the chunk's weights, put off to fill time in which the rank would have to wait
=====  ==================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

FORWARD, BACKWARD, WEIGHT = "F", "B", "W"


class Action(NamedTuple):
    """One action of a rank; as text ``F3``, or ``F3.1`` for chunk 1."""

    kind: str
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class StageLayout:
    """How virtual stages lie on the ranks of a pipeline.

    Usually chunk c of rank r is virtual stage c · stages + r. In a V, odd chunks run back from the last rank to the
    first.
    """

    stages: int
    chunks: int = 1
    v_shaped: bool = False

    @property
    def virtual_stages(self) -> int:
        """S."""
        return self.stages * self.chunks

    def virtual(self, rank: int, chunk: int) -> int:
        """The virtual stage that is chunk ``chunk`` of ``rank``."""
        back = self.v_shaped and chunk % 2
        return chunk * self.stages + (self.stages - 1 - rank if back else rank)

    def rank_of(self, virtual: int) -> int:
        """The rank that holds a virtual stage."""
        chunk, place = divmod(virtual, self.stages)
        return self.stages - 1 - place if self.v_shaped and chunk % 2 else place

    def chunk_of(self, virtual: int) -> int:
        """Which of its rank's chunks a virtual stage is."""
        return virtual // self.stages


@dataclass(frozen=True)
class Table:
    """A schedule: ``actions[rank]`` in the order in which that rank runs them."""

    kind: str
    stage_layout: StageLayout
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @cached_property
    def _deferred(self) -> frozenset[tuple[int, int, int]]:
        """(rank, chunk, micro-batch) of every W."""
        return frozenset(
            (rank, action.chunk, action.micro_batch)
            for rank, row in enumerate(self.actions)
            for action in row
            if action.kind == WEIGHT
        )

    def defers_weight(self, rank: int, action: Action) -> bool:
        """Whether ``action``, a B of ``rank``, leaves the gradient of the weights to a W."""
        return (rank, action.chunk, action.micro_batch) in self._deferred

    def forward_only(self) -> Table:
        """The same without backward, for validation."""
        rows = tuple(tuple(action for action in row if action.kind == FORWARD) for row in self.actions)
        return Table(self.kind, self.stage_layout, self.micro_batches, rows)
