"""Runs the actions of one rank, whatever the schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from internlm import accelerator
from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action
from internlm.core.scheduler.channels import Channels
from internlm.core.scheduler.compute import Compute, InFlight, backward, in_flight, weight_gradients
from internlm.core.scheduler.plan import Message, Receive, Step


class Record(NamedTuple):
    """When an action ran: seconds on this machine's monotonic clock. From ``begin`` to ``ready`` it waited for what it
    needed, from ``ready`` to ``end`` it was computed, from ``end`` to ``sent`` what it gave was handed on."""

    action: Action
    begin: float
    ready: float
    end: float
    sent: float


class Executor:
    """Runs the steps of a plan once.

    What a rank gives to itself, from one of its chunks to another, goes from hand to hand. With ``backward`` off
    nothing is kept for it. ``peak_in_flight`` counts pairs of chunk and micro-batch whose F had begun and whose last
    action had not ended, at their most.
    """

    def __init__(self, steps: Sequence[Step], compute: Compute, channels: Channels | None, backward: bool) -> None:
        self.steps, self.compute, self.channels, self.backward = steps, compute, channels, backward
        self.peak_in_flight = 0
        self._kept: dict[tuple[int, int], InFlight] = {}
        self._at_hand: dict[Message, Tensor] = {}
        self._run: dict[str, Callable[[Step, Tensor | None], Tensor | None]] = {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            WEIGHT: self._weight,
        }

    def run(self, records: list[Record] | None = None) -> None:
        """Run all of them; ``records`` is told of each."""
        now = _no_clock if records is None else _clock
        with torch.set_grad_enabled(self.backward):
            for step in self.steps:
                record = self._do(step, now)
                if records is not None:
                    records.append(record)
            if self.channels:
                self.channels.flush()

    def _do(self, step: Step, now: Callable[[], float]) -> Record:
        begin = now()
        for receive in step.begins:
            self._begin_receive(receive)
        given = self._take(step)
        ready = now()
        result = self._run[step.action.kind](step, given)
        end = now()
        self._give(step, result)
        return Record(step.action, begin, ready, end, now())

    # -- actions ------------------------------------------------------------------------------------------------------
    def _forward(self, step: Step, hidden: Tensor | None) -> Tensor | None:
        _, number, chunk = step.action
        if not self.backward:
            return self.compute.forward(chunk, number, hidden)
        self.peak_in_flight = max(self.peak_in_flight, len(self._kept) + 1)
        if hidden is not None:
            hidden.requires_grad_()
        output = self.compute.forward(chunk, number, hidden)
        assert output is not None, "backward needs a loss"
        self._kept[chunk, number] = in_flight(hidden, output)
        return output.detach()

    def _backward(self, step: Step, grad_output: Tensor | None) -> Tensor | None:
        _, number, chunk = step.action
        kept = self._kept[chunk, number]
        if grad_output is None:  # the loss is a sum already
            grad_output = torch.ones(kept.form[0], dtype=kept.form[1], device=self.compute.sums.device)
        gradient = backward(kept, grad_output, step.defers_weight)
        if not step.defers_weight:
            del self._kept[chunk, number]
        return gradient

    def _weight(self, step: Step, _nothing: Tensor | None) -> None:
        _, number, chunk = step.action
        weight_gradients(self._kept.pop((chunk, number)))

    # -- what goes between --------------------------------------------------------------------------------------------
    def _begin_receive(self, receive: Receive) -> None:
        assert self.channels is not None
        source, message, chunk = receive
        if message.kind == FORWARD:
            form = self.compute.hidden_form(message.micro_batch)
        else:  # what was sent has the form of its gradient
            form = self._kept[chunk, message.micro_batch].form
        self.channels.begin_receive(source, message, form)

    def _take(self, step: Step) -> Tensor | None:
        if step.takes is None:
            return None
        if step.takes in self._at_hand:
            return self._at_hand.pop(step.takes)
        assert self.channels is not None
        return self.channels.receive(step.source, step.takes)

    def _give(self, step: Step, result: Tensor | None) -> None:
        if step.gives is None:
            return
        assert result is not None
        if self.channels is None or step.target == self.channels.stage.rank:
            self._at_hand[step.gives] = result
        else:
            announced = step.gives.kind == BACKWARD or self.compute.check_form(step.action.micro_batch, result)
            self.channels.send(step.target, step.gives, result, announced)


def _clock() -> float:
    accelerator.synchronize()  # what was asked for is done
    return time.perf_counter()


def _no_clock() -> float:
    return 0.0
