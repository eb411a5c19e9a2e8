"""Actions of a pipeline schedule, the messages between them, and the table that orders them.

=====  =======================================================================================================
``F``  forward of a chunk for a micro-batch
``B``  backward: gradients of the chunk's input and, if no W computes them, of its weights
``W``  gradients of the chunk's weights, deferred to fill idle time (Zero Bubble, arXiv 2401.10241, sec. 2)
=====  =======================================================================================================

F of virtual stage v takes the hidden states that F of v − 1 returned. B of v takes the gradient of the hidden states
that F of v returned; B of v + 1 computes it.
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
    """Forward, backward or weight-gradient computation of one chunk for one micro-batch.

    Formatted as ``F3`` (forward, micro-batch 3), or ``F3.1`` for chunk 1.
    """

    type: ActionType
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.type}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


class Message(NamedTuple):
    """Identifier of a tensor passed between adjacent virtual stages: hidden states (F) or their gradient (B)."""

    type: ActionType
    virtual: int  # receiving virtual stage
    micro_batch: int

    @property
    def sender(self) -> int:
        """Virtual stage that computes and sends the tensor."""
        return self.virtual + (-1 if self.type == FORWARD else 1)


def input_message(layout: StageLayout, rank: int, action: Action) -> Message | None:
    """Return the message that ``action`` on ``rank`` takes as input, if any.

    The result is None for W, for F of the first virtual stage, and for B of the last.
    """
    virtual = layout.virtual(rank, action.chunk)
    first = virtual == 0 and action.type == FORWARD
    last = virtual == layout.virtual_stages - 1 and action.type == BACKWARD
    if action.type == WEIGHT or first or last:
        return None
    return Message(action.type, virtual, action.micro_batch)


def output_message(layout: StageLayout, rank: int, action: Action) -> Message | None:
    """Return the message that ``action`` on ``rank`` produces, if any.

    The result is None for W, for F of the last virtual stage, and for B of the first.
    """
    if action.type == WEIGHT:
        return None
    receiver = layout.virtual(rank, action.chunk) + (1 if action.type == FORWARD else -1)
    if not 0 <= receiver < layout.virtual_stages:
        return None
    return Message(action.type, receiver, action.micro_batch)


@dataclass(frozen=True)
class Table:
    """Action table of a pipeline schedule: ``actions[rank]`` contains the actions of a rank in execution order."""

    schedule: str  # name of the schedule: one of SCHEDULES, or the name of a CSV file
    stage_layout: StageLayout
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @cached_property
    def _deferred(self) -> frozenset[tuple[int, int, int]]:
        """Return the set of (rank, chunk, micro-batch) triples that have a W."""
        return frozenset(
            (rank, action.chunk, action.micro_batch)
            for rank, row in enumerate(self.actions)
            for action in row
            if action.type == WEIGHT
        )

    def defers_weight(self, rank: int, action: Action) -> bool:
        """Return whether ``action``, a B of ``rank``, leaves the weight gradients to a W."""
        return (rank, action.chunk, action.micro_batch) in self._deferred

    def forward_only(self) -> Table:
        """Return this table without B and W, for steps without gradients."""
        rows = tuple(tuple(action for action in row if action.type == FORWARD) for row in self.actions)
        return Table(self.schedule, self.stage_layout, self.micro_batches, rows)
