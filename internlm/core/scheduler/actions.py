"""Actions of a pipeline schedule, the messages between them, and the table that orders them. Pure.

=====  =======================================================================================================
``F``  forward of a chunk for a micro-batch
``B``  backward: the gradient of the chunk's input; without a W in the table, also of its weights
``W``  the gradient of the chunk's weights, deferred to fill idle time (Zero Bubble, arXiv 2401.10241, sec. 2)
=====  =======================================================================================================

F of virtual stage v needs the hidden states that F of v − 1 computed; B of v needs their gradient from B of v + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, NamedTuple, TypeAlias

from internlm.core.scheduler.stage_layout import StageLayout

ActionType: TypeAlias = Literal["F", "B", "W"]
FORWARD: Final = "F"
BACKWARD: Final = "B"
WEIGHT: Final = "W"


class Action(NamedTuple):
    """Action of a rank for a micro-batch and a chunk; as text ``F3``, or ``F3.1`` for chunk 1."""

    type: ActionType
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.type}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


class Message(NamedTuple):
    """Tensor sent from one virtual stage to the next: hidden states for F, their gradient for B."""

    type: ActionType
    virtual: int  # virtual stage that receives it
    micro_batch: int

    @property
    def sender(self) -> int:
        """Virtual stage that computes this tensor and sends it."""
        return self.virtual + (-1 if self.type == FORWARD else 1)


def input_message(layout: StageLayout, rank: int, action: Action) -> Message | None:
    """Return the message that ``action`` of ``rank`` needs; None for W and at the ends of the model."""
    virtual = layout.virtual(rank, action.chunk)
    first = virtual == 0 and action.type == FORWARD
    last = virtual == layout.virtual_stages - 1 and action.type == BACKWARD
    if action.type == WEIGHT or first or last:
        return None
    return Message(action.type, virtual, action.micro_batch)


def output_message(layout: StageLayout, rank: int, action: Action) -> Message | None:
    """Return the message that ``action`` of ``rank`` computes; None for W and at the ends of the model."""
    if action.type == WEIGHT:
        return None
    receiver = layout.virtual(rank, action.chunk) + (1 if action.type == FORWARD else -1)
    if not 0 <= receiver < layout.virtual_stages:
        return None
    return Message(action.type, receiver, action.micro_batch)


@dataclass(frozen=True)
class Table:
    """A schedule: ``actions[rank]`` in the order in which that rank runs them."""

    schedule: str  # name of the schedule: one of SCHEDULES, or the name of a CSV file
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
            if action.type == WEIGHT
        )

    def defers_weight(self, rank: int, action: Action) -> bool:
        """Whether ``action``, a B of ``rank``, leaves the gradient of the weights to a W."""
        return (rank, action.chunk, action.micro_batch) in self._deferred

    def forward_only(self) -> Table:
        """Return the table without B and W, for validation."""
        rows = tuple(tuple(action for action in row if action.type == FORWARD) for row in self.actions)
        return Table(self.schedule, self.stage_layout, self.micro_batches, rows)
