"""Between the stages of a pipeline.

Each direction between two ranks is a channel of its own, first in, first out: what is sent comes in that order, and
nothing waits for anything but what is before it in its channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.context.group import Group
from internlm.core.context.peer_failure import attributing_peer_failure
from internlm.core.parallel.ledger import LEDGER
from internlm.core.scheduler.actions import FORWARD
from internlm.core.scheduler.compute import Form
from internlm.core.scheduler.plan import Message

#: What a header says of a tensor that nobody can foretell: type, dimensions, and so many sizes.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_DIMENSIONS = 8


@dataclass(eq=False)
class _Incoming:
    message: Message
    form: Form | None  # None: a header tells
    buffer: Tensor | None = None
    work: dist.Work | None = None


@dataclass(frozen=True, eq=False)
class _Outgoing:
    message: Message
    tensor: Tensor  # must live until it was sent
    work: dist.Work
    awaited: bool  # False: it is taken when it is needed, which may be late, so nobody may wait for it before the end


class Channels:
    """This rank's channels to and from other stages, by their numbers.

    With ``overlap`` what is sent is on its way while this rank goes on; otherwise it first waits until it was taken.
    A wait of more than ``timeout`` seconds, or the end of the other rank, raises :class:`LostPeerError`.
    """

    def __init__(
        self,
        stage: Group,
        incoming: Mapping[int, Group],
        outgoing: Mapping[int, Group],
        device: torch.device,
        timeout: float,
        overlap: bool = True,
    ) -> None:
        self.stage, self.incoming, self.outgoing = stage, incoming, outgoing
        self.device, self.timeout, self.overlap = device, timedelta(seconds=timeout), overlap
        self._coming: dict[int, deque[_Incoming]] = {source: deque() for source in incoming}
        self._going: dict[int, deque[_Outgoing]] = {target: deque() for target in outgoing}

    # -- receiving ----------------------------------------------------------------------------------------------------
    def begin_receive(self, source: int, message: Message, form: Form | None) -> None:
        """Offer a buffer for the next message of a channel; where its form is unknown, when it is needed."""
        self._coming[source].append(_Incoming(message, form))
        self._begin_known(source)

    def receive(self, source: int, message: Message) -> Tensor:
        """A message that was begun, once it is here."""
        for incoming in self._coming[source]:
            if incoming.work is None:
                self._begin(source, incoming)
            if incoming.message == message:
                break
        self._coming[source].remove(incoming)
        self._begin_known(source)
        work, buffer = incoming.work, incoming.buffer
        assert work is not None
        assert buffer is not None
        self._wait(work, source, message, "send")
        return buffer

    def _begin_known(self, source: int) -> None:
        """What is in turn, up to the first whose form is unknown."""
        for incoming in self._coming[source]:
            if incoming.work is None and incoming.form is None:
                return
            if incoming.work is None:
                self._begin(source, incoming)

    def _begin(self, source: int, incoming: _Incoming) -> None:
        shape, dtype = incoming.form or self._read_header(source, incoming.message)
        incoming.buffer = torch.empty(shape, dtype=dtype, device=self.device)
        incoming.work = self._irecv(incoming.buffer, source, incoming.message)

    def _read_header(self, source: int, message: Message) -> Form:
        header = torch.empty(2 + _MOST_DIMENSIONS, dtype=torch.int64, device=self.device)
        self._wait(self._irecv(header, source, message), source, message, "send")
        dtype, dimensions, *sizes = header.tolist()
        return tuple(sizes[:dimensions]), _DTYPES[dtype]

    def _irecv(self, buffer: Tensor, source: int, message: Message) -> dist.Work:
        group = self.incoming[source]
        with self._may_lose(source, message, "send"):
            work = dist.irecv(buffer, group=group.handle, group_src=1 - group.rank)
        assert work is not None
        return work

    # -- sending ------------------------------------------------------------------------------------------------------
    def send(self, target: int, message: Message, tensor: Tensor, announced: bool) -> None:
        """Send ``tensor``; unless its form is ``announced``, that the other rank knows it, after a header."""
        tensor = tensor.contiguous()
        if not announced:
            self._isend(target, message, _header(tensor), awaited=False)
        self._isend(target, message, tensor, awaited=announced)
        going = self._going[target]
        while len(going) > self.overlap and (going[0].awaited or going[0].work.is_completed()):
            self._wait_sent(target)

    def flush(self) -> None:
        """Wait until everything was taken."""
        for target, going in self._going.items():
            while going:
                self._wait_sent(target)

    def _isend(self, target: int, message: Message, tensor: Tensor, awaited: bool) -> None:
        group = self.outgoing[target]
        LEDGER.record(group.mode, "send", tensor.nbytes)
        with self._may_lose(target, message, "take"):
            work = dist.isend(tensor, group=group.handle, group_dst=1 - group.rank)
        assert work is not None
        self._going[target].append(_Outgoing(message, tensor, work, awaited))

    def _wait_sent(self, target: int) -> None:
        outgoing = self._going[target].popleft()
        self._wait(outgoing.work, target, outgoing.message, "take")

    def _wait(self, work: dist.Work, other: int, message: Message, verb: str) -> None:
        with self._may_lose(other, message, verb):
            work.wait()  # for as long as the group waits, which is so made

    def _may_lose(self, other: int, message: Message, verb: str) -> AbstractContextManager[None]:
        """Any of what is done within fails where ``other`` is gone."""
        return attributing_peer_failure(self.stage, other, f"{verb} {_told(message)}", self.timeout)


def _header(tensor: Tensor) -> Tensor:
    assert tensor.dim() <= _MOST_DIMENSIONS, f"{tensor.dim()} dimensions between stages"
    sizes = [*tensor.shape, *[0] * (_MOST_DIMENSIONS - tensor.dim())]
    return torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *sizes], device=tensor.device)


def _told(message: Message) -> str:
    what = "the hidden units" if message.kind == FORWARD else "their gradient"
    return f"{what} of micro-batch {message.micro_batch} for virtual stage {message.virtual}"
