"""Execution of one rank's plan, for any pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from internlm.accelerator import Mark
from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action, Message
from internlm.core.scheduler.channels import Channels
from internlm.core.scheduler.compute import Compute, InFlight, backward, keep_in_flight, weight_gradients
from internlm.core.scheduler.plan import Receive, Step
from internlm.core.scheduler.timeline import Record
from internlm.utils.progress import enter_phase


class ActionMarks(NamedTuple):
    """Marks of one executed action on the compute stream, as the times of a :class:`Record`."""

    action: Action
    begin: Mark
    ready: Mark
    end: Mark
    sent: Mark

    def record(self, start: Mark) -> Record:
        """Return the times in seconds since ``start``; call this after the step, since it waits for the device."""
        return Record(self.action, *(mark.seconds_since(start) for mark in self[1:]))


class Executor:
    """Executor of one rank's plan: for each step, receive the input, run the action and send the output.

    Messages between two chunks of this rank do not pass through a channel. ``peak_in_flight`` is the largest number of
    (chunk, micro-batch) pairs in flight, that is, between their F and their last action (B or W).

    Args:
        steps: Plan of this rank.
        compute: Computation of the actions.
        channels: Channels to and from the other stages; None for a pipeline of one rank.
        backward: Whether to compute gradients. False: no state is kept after F.
    """

    def __init__(self, steps: Sequence[Step], compute: Compute, channels: Channels | None, backward: bool) -> None:
        self.steps, self.compute, self.channels, self.backward = steps, compute, channels, backward
        self.peak_in_flight = 0
        self._in_flight: dict[tuple[int, int], InFlight] = {}
        self._local_messages: dict[Message, Tensor] = {}
        self._run: dict[str, Callable[[Step, Tensor | None], Tensor | None]] = {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            WEIGHT: self._weight,
        }

    def run(self, after_action: Callable[[ActionMarks], None] | None = None) -> None:
        """Run all steps of the plan, and call ``after_action``, if given, after each action."""
        with torch.set_grad_enabled(self.backward):
            for step in self.steps:
                if after_action is None:
                    self._run_step(step)
                else:
                    after_action(self._run_marked(step))
            if self.channels:
                self.channels.flush()
        self.compute.options.learned_specs.end_step()

    def _run_step(self, step: Step, mark: Callable[[], object] = lambda: None) -> None:
        """Run one step; call ``mark`` before it, when its input is there, after its action, and after the send."""
        mark()
        # Post receives first: the plan is free of deadlock only if they are posted before the action runs.
        for receive in step.receives:
            self._post_receive(receive)
        received = self._receive(step)
        if self.backward:  # an evaluation is one phase
            enter_phase("forward" if step.action.type == FORWARD else "backward")
        mark()
        result = self._run[step.action.type](step, received)
        mark()
        self._send(step, result)
        mark()

    def _run_marked(self, step: Step) -> ActionMarks:
        # Marks, since a synchronisation of the device would also wait for receives that were posted ahead, whose
        # senders wait for this rank.
        marks: list[Mark] = []
        self._run_step(step, lambda: marks.append(Mark()))
        return ActionMarks(step.action, *marks)

    # -- actions ------------------------------------------------------------------------------------------------------
    def _forward(self, step: Step, hidden: Tensor | None) -> Tensor | None:
        _, index, chunk = step.action
        if not self.backward:
            return self.compute.forward(chunk, index, hidden)
        self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight) + 1)
        if hidden is not None:
            # The received tensor is a leaf: its .grad is sent back to the previous stage.
            hidden.requires_grad_()
        output = self.compute.forward(chunk, index, hidden)
        assert output is not None, "backward needs a loss"
        self._in_flight[chunk, index] = keep_in_flight(hidden, output)
        # A sent tensor with a reference to the graph would keep the saved tensors of the whole chunk alive.
        return output.detach()

    def _backward(self, step: Step, grad_output: Tensor | None) -> Tensor | None:
        _, index, chunk = step.action
        state = self._in_flight[chunk, index]
        if grad_output is None:  # the loss is a sum that is already scaled
            shape, dtype = state.output_spec
            grad_output = torch.ones(shape, dtype=dtype, device=self.compute.sums.device)
        gradient = backward(state, grad_output, step.defers_weight)
        if not step.defers_weight:
            del self._in_flight[chunk, index]
        return gradient

    def _weight(self, step: Step, _no_input: Tensor | None) -> None:
        _, index, chunk = step.action
        weight_gradients(self._in_flight.pop((chunk, index)))

    # -- messages -----------------------------------------------------------------------------------------------------
    def _post_receive(self, receive: Receive) -> None:
        assert self.channels is not None
        source, message, chunk = receive
        if message.type == FORWARD:
            spec = self.compute.hidden_spec(message)
        else:  # a gradient has the shape and dtype of the output that this rank sent
            spec = self._in_flight[chunk, message.micro_batch].output_spec
        self.channels.post_receive(source, message, spec)

    def _receive(self, step: Step) -> Tensor | None:
        if step.input is None:
            return None
        if step.input in self._local_messages:
            return self._local_messages.pop(step.input)
        assert self.channels is not None
        received = self.channels.receive(step.source, step.input)
        if step.input.type == FORWARD:
            self.compute.note_hidden(step.input, received)
        return received

    def _send(self, step: Step, result: Tensor | None) -> None:
        if step.output is None:
            return
        assert result is not None
        if self.channels is None or step.target == self.channels.stage.rank:
            self._local_messages[step.output] = result
        else:
            expected = step.output.type == BACKWARD or self.compute.check_hidden(step.output, result)
            self.channels.send(step.target, step.output, result, expected)
            if step.output.type == FORWARD:
                self.compute.note_hidden(step.output, result)
