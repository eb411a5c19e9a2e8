"""Channels: point-to-point transfers between the stages of a pipeline.

Each direction between two ranks is a first-in, first-out channel with its own process group: messages arrive in the
order in which they were sent, and a late message delays only later messages of its channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.accelerator import device_kind, to_device, to_host
from internlm.core.context.group import Group
from internlm.core.parallel.ledger import LEDGER
from internlm.core.scheduler.actions import FORWARD, Message
from internlm.core.scheduler.compute import TensorSpec
from internlm.utils.errors import LostPeerError, Problem, UserError, is_peer_failure, lost_peer_error

#: A header consists of the index of the dtype in this tuple, the number of dimensions, and the sizes, padded to
#: ``_MAX_DIMENSIONS``.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_DIMENSIONS = 8


@dataclass(eq=False)
class _Incoming:
    message: Message
    spec: TensorSpec | None  # None: a header with shape and dtype precedes the tensor
    buffer: Tensor | None = None
    work: dist.Work | None = None


@dataclass(frozen=True, eq=False)
class _Outgoing:
    message: Message
    tensor: Tensor  # must be kept alive until it has been sent
    work: dist.Work
    #: False if the receiver posts its receive only when it needs the message: blocking on such a send before the end of
    #: the step could deadlock.
    may_block: bool


class Channels:
    """Point-to-point channels between this rank and the other stages of its pipeline.

    Args:
        stage: Group of this rank's pipeline.
        incoming: Process group of each channel to this rank, by sending stage.
        outgoing: Process group of each channel from this rank, by receiving stage.
        device: Device of the tensors.
        overlap: Whether sends overlap with compute. False: block until a send has completed, if that cannot deadlock.
    """

    def __init__(
        self,
        stage: Group,
        incoming: Mapping[int, Group],
        outgoing: Mapping[int, Group],
        device: torch.device,
        overlap: bool = True,
    ) -> None:
        self.stage, self.incoming, self.outgoing = stage, incoming, outgoing
        self.device, self.overlap = device, overlap
        self._receiving: dict[int, deque[_Incoming]] = {source: deque() for source in incoming}
        self._sending: dict[int, deque[_Outgoing]] = {target: deque() for target in outgoing}

    # -- receiving ----------------------------------------------------------------------------------------------------
    def post_receive(self, source: int, message: Message, spec: TensorSpec | None) -> None:
        """Queue a receive on the channel from ``source``, and post it if the shape of the message is known.

        The receives of a channel are posted in order: a receive without ``spec`` delays all receives queued after it.

        Args:
            source: Sending stage.
            message: Message to receive.
            spec: Shape and dtype of the tensor. None: a header with both precedes the tensor.
        """
        self._receiving[source].append(_Incoming(message, spec))
        self._post_known(source)

    def receive(self, source: int, message: Message) -> Tensor:
        """Wait for the receive of ``message`` that :meth:`post_receive` queued, and return the received tensor."""
        # Receives of earlier messages must be posted first, since the channel matches them in order.
        for incoming in self._receiving[source]:
            if incoming.work is None:
                self._post(source, incoming)
            if incoming.message == message:
                break
        self._receiving[source].remove(incoming)
        self._post_known(source)
        work, buffer = incoming.work, incoming.buffer
        assert work is not None
        assert buffer is not None
        self._wait(work, source, message, "send")
        return buffer

    def _post_known(self, source: int) -> None:
        """Post the queued receives of a channel, up to the first whose shape is unknown."""
        for incoming in self._receiving[source]:
            if incoming.work is None and incoming.spec is None:
                return
            if incoming.work is None:
                self._post(source, incoming)

    def _post(self, source: int, incoming: _Incoming) -> None:
        shape, dtype = incoming.spec or self._receive_header(source, incoming.message)
        incoming.buffer = torch.empty(shape, dtype=dtype, device=self.device)
        incoming.work = self._irecv(incoming.buffer, source, incoming.message)

    def _receive_header(self, source: int, message: Message) -> TensorSpec:
        if not device_kind().has_values:
            todo = "Give the model a method hidden_like(inputs) that returns it"
            raise UserError(Problem("model", "a dry run cannot receive hidden states whose shape is unknown", todo))
        header = torch.empty(2 + _MAX_DIMENSIONS, dtype=torch.int64, device=self.device)
        self._wait(self._irecv(header, source, message), source, message, "send")
        dtype, dimensions, *sizes = to_host(header, "shape of hidden states").tolist()
        return tuple(sizes[:dimensions]), _DTYPES[dtype]

    def _irecv(self, buffer: Tensor, source: int, message: Message) -> dist.Work:
        group = self.incoming[source]
        with self._attributing(source, message, "send"):
            work = dist.irecv(buffer, group=group.handle, group_src=1 - group.rank)
        assert work is not None
        return work

    # -- sending ------------------------------------------------------------------------------------------------------
    def send(self, target: int, message: Message, tensor: Tensor, declared: bool) -> None:
        """Send a tensor to another stage.

        Args:
            target: Receiving stage.
            message: Identifier of the tensor.
            tensor: Tensor to send.
            declared: Whether the receiver can compute the tensor's shape and dtype. False: send both in a header first.
        """
        # gloo and NCCL require contiguous tensors.
        tensor = tensor.contiguous()
        if not declared:
            self._isend(target, message, _header(tensor), may_block=False)
        self._isend(target, message, tensor, may_block=declared)
        # With overlap, one send per channel stays in flight; its tensor is freed at the next send.
        sending = self._sending[target]
        while len(sending) > self.overlap and (sending[0].may_block or sending[0].work.is_completed()):
            self._wait_sent(target)

    def flush(self) -> None:
        """Wait until every send has completed."""
        for target, sending in self._sending.items():
            while sending:
                self._wait_sent(target)

    def _isend(self, target: int, message: Message, tensor: Tensor, may_block: bool) -> None:
        group = self.outgoing[target]
        LEDGER.record(group.mode, "send", tensor.nbytes, tensor)
        with self._attributing(target, message, "receive"):
            work = dist.isend(tensor, group=group.handle, group_dst=1 - group.rank)
        assert work is not None
        self._sending[target].append(_Outgoing(message, tensor, work, may_block))

    def _wait_sent(self, target: int) -> None:
        outgoing = self._sending[target].popleft()
        self._wait(outgoing.work, target, outgoing.message, "receive")

    def _wait(self, work: dist.Work, peer: int, message: Message, verb: Literal["send", "receive"]) -> None:
        with self._attributing(peer, message, verb):
            work.wait()  # without an argument, the group's timeout applies

    @contextmanager
    def _attributing(self, peer: int, message: Message, verb: Literal["send", "receive"]) -> Iterator[None]:
        """Convert a failure in the ``with`` block into a ``LostPeerError`` that names the lost rank."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LostPeerError) or not is_peer_failure(error):
                raise
            waited_for = f"stage {self.stage.rank} waited for stage {peer} to {verb} {_format_message(message)}"
            raise lost_peer_error(error, waited_for) from None


def _header(tensor: Tensor) -> Tensor:
    """Encode shape and dtype of the hidden states ``tensor`` as an int64 tensor.

    Raises:
        UserError: A header cannot describe the tensor.
    """
    problems = []
    if tensor.dtype not in _DTYPES:
        message = f"expected a dtype among {', '.join(map(str, _DTYPES))}, got {tensor.dtype}"
        problems.append(Problem("hidden states of the model", message, "Return them in model.dtype"))
    if tensor.dim() > _MAX_DIMENSIONS:
        message = f"expected at most {_MAX_DIMENSIONS} dimensions, got {tensor.dim()}"
        problems.append(Problem("hidden states of the model", message, "Flatten some of them"))
    if problems:
        raise UserError(*problems)
    sizes = [*tensor.shape, *[0] * (_MAX_DIMENSIONS - tensor.dim())]
    return to_device(torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *sizes]), tensor.device)


def _format_message(message: Message) -> str:
    content = "the hidden states" if message.type == FORWARD else "their gradient"
    return f"{content} of micro-batch {message.micro_batch} for virtual stage {message.virtual}"
