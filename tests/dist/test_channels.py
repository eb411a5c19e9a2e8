"""What goes between stages comes in the order in which it was sent, whatever its form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.ledger import LEDGER, Entry
from internlm.core.scheduler.actions import Message
from internlm.core.scheduler.channels import Channels, _header
from internlm.utils.errors import UserError
from tests.harness.pool import run_ranks

CPU = torch.device("cpu")
COUNT = 5
HEADER = 10 * 8  # bytes
PIPELINE = ParallelMode.PIPELINE


def channels(rank: int, world_size: int, overlap: bool) -> Channels:
    """From every rank to every other."""
    incoming, outgoing = {}, {}
    for source, target in permutations(range(world_size), 2):
        handle = dist.new_group([source, target])
        if rank == source:
            outgoing[target] = Group.of(PIPELINE, handle)
        if rank == target:
            incoming[source] = Group.of(PIPELINE, handle)
    assert dist.group.WORLD is not None
    return Channels(Group.of(PIPELINE, dist.group.WORLD), incoming, outgoing, CPU, overlap)


def value(number: int, source: int = 0) -> Tensor:
    """[number + 1, 2], of another type each."""
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[number % 4]
    return torch.full((number + 1, 2), number + 10.0 * source, dtype=dtype)


def message(number: int, kind: str = "F") -> Message:
    return Message(kind, 1, number)


def form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


# -- headers


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.ones(2, dtype=torch.int32), "hidden states of the model: expected a dtype among torch.float32, torch."),
        (torch.ones([1] * 9), "hidden states of the model: expected at most 8 dimensions, got 9. Flatten some of them"),
    ],
    ids=["integers", "nine dimensions"],
)
def test_what_a_header_cannot_describe_is_refused(hidden: Tensor, message: str) -> None:
    with pytest.raises(UserError) as caught:
        _header(hidden)
    assert str(caught.value).startswith(message)


# -- order


def _both_ways(rank: int, world_size: int, overlap: bool, announced: bool) -> list[Tensor]:
    """All to all: each rank offers all its buffers, sends, and only then takes what came."""
    ours = channels(rank, world_size, overlap)
    others = [other for other in range(world_size) if other != rank]
    for number in range(COUNT):
        for other in others:
            ours.post_receive(other, message(number), form(value(number)) if announced else None)
    for number in range(COUNT):
        for other in others:
            ours.send(other, message(number), value(number, rank), announced)
    came = [ours.receive(other, message(number)) for number in range(COUNT) for other in others]
    ours.flush()
    assert not any(ours._sending.values())
    assert not any(ours._receiving.values())
    return came


@pytest.mark.parametrize("announced", [True, False], ids=["known forms", "headers"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_first_in_first_out(world_size: int, overlap: bool, announced: bool) -> None:
    for rank, came in enumerate(run_ranks(world_size, _both_ways, overlap, announced)):
        sent = [value(number, other) for number in range(COUNT) for other in range(world_size) if other != rank]
        assert list(map(form, came)) == list(map(form, sent))
        assert all(map(torch.equal, came, sent))


#: Message by message, whether its form is known.
MIXED = [True, False, False, True, True, False]


def _mixed(rank: int, world_size: int, overlap: bool, taken: Sequence[int]) -> list[Tensor]:
    """Some forms known, some not, in one channel, and not taken in the order in which they were sent."""
    ours = channels(rank, world_size, overlap)
    if rank == 0:
        for number, known in enumerate(MIXED):
            ours.send(1, message(number), value(number), known)
        ours.flush()
        return []
    for number, known in enumerate(MIXED):
        ours.post_receive(0, message(number), form(value(number)) if known else None)
    return [ours.receive(0, message(number)) for number in taken]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("taken", [range(6), [3, 0, 2, 5, 1, 4], range(5, -1, -1)], ids=str)
def test_known_and_unknown_forms_in_one_channel(taken: Sequence[int], overlap: bool) -> None:
    _, came = run_ranks(2, _mixed, overlap, taken)
    assert all(torch.equal(ours, value(number)) for ours, number in zip(came, taken, strict=True))


def _shapes(rank: int, world_size: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    ours = channels(rank, world_size, True)
    for number, tensor in enumerate(tensors):
        if rank == 0:
            ours.send(1, message(number), tensor, False)
        else:
            ours.post_receive(0, message(number), None)
    ours.flush()
    return [ours.receive(0, message(number)) for number in range(len(tensors))] if rank else []


def test_a_header_says_what_comes() -> None:
    """A number alone, nothing at all, and what does not lie in one piece."""
    sent = [torch.tensor(3.0), torch.empty(0, 4), torch.arange(6.0).view(2, 3).T, torch.ones([1] * 7 + [2])]
    _, came = run_ranks(2, _shapes, [*sent, *[each.double() for each in sent]])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(came, sent, strict=False))
    assert [each.dtype for each in came] == [torch.float32] * 4 + [torch.float64] * 4
    assert [each.shape for each in came[:4]] == [each.shape for each in sent]


# -- who waits


def _early(rank: int, world_size: int, overlap: bool) -> list[str]:
    """What rank 0 has sent when; rank 1 takes nothing until it is told to, on another channel."""
    ours, told = channels(rank, world_size, overlap), []
    go = torch.zeros(())
    if rank == 1:
        ours.post_receive(0, message(0), form(value(0)))
        ours.receive(0, message(0))
        for number in range(1, 3):  # offered, long before they are taken
            ours.post_receive(0, message(number), form(value(number)))
        dist.recv(go, 0)  # rank 0 has sent all: nobody keeps it waiting
        return [str(ours.receive(0, message(number))[0, 0].item()) for number in range(1, 3)]
    for number in range(3):
        ours.send(1, message(number), value(number), True)
        told.append(str(len(ours._sending[1])))
    ours.flush()
    dist.send(go, 1)
    return told


@pytest.mark.parametrize("overlap", [True, False])
def test_what_was_begun_early_keeps_nobody_waiting(overlap: bool) -> None:
    """With overlap one message may be on its way, otherwise none."""
    sent, taken = run_ranks(2, _early, overlap)
    assert sent == [str(int(overlap))] * 3
    assert taken == ["1.0", "2.0"]


def _late_headers(rank: int, world_size: int, overlap: bool) -> float:
    """Forms unknown, and then one that is known, none of which rank 1 takes before it was told that all were sent."""
    ours, go = channels(rank, world_size, overlap), torch.zeros(())
    if rank == 1:
        for number in range(3):
            ours.post_receive(0, message(number), form(value(2)) if number == 2 else None)
        dist.recv(go, 0)
        return ours.receive(0, message(2)).sum().item()
    for number in range(3):
        ours.send(1, message(number), value(number), number == 2)
    dist.send(go, 1)
    ours.flush()
    return 0.0


@pytest.mark.parametrize("overlap", [True, False])
def test_nobody_waits_for_what_is_behind_an_unknown_form(overlap: bool) -> None:
    """It can't be taken until somebody needs what is before it."""
    assert run_ranks(2, _late_headers, overlap)[1] == value(2).sum().item()


def _known_behind_unknown(rank: int, world_size: int) -> None:
    """Rank 0 waits for all that it sends, and rank 1 takes the first only before it was told to go on."""
    ours, go = channels(rank, world_size, False), torch.zeros(())
    if rank == 1:
        for number in range(2):
            ours.post_receive(0, message(number), form(value(1)) if number else None)
        ours.receive(0, message(0))
        dist.recv(go, 0)
        ours.receive(0, message(1))
        return
    for number in range(2):
        ours.send(1, message(number), value(number), number == 1)
    ours.flush()
    dist.send(go, 1)


def test_once_an_unknown_form_is_here_those_behind_it_are_begun() -> None:
    run_ranks(2, _known_behind_unknown)


# -- the ledger


def _traffic(rank: int, world_size: int, announced: bool) -> dict[tuple[ParallelMode, str], Entry]:
    before = LEDGER.snapshot()
    _both_ways(rank, world_size, True, announced)
    return dict(LEDGER.since(before))


@pytest.mark.parametrize("announced", [True, False])
def test_the_sender_counts_bytes(announced: bool) -> None:
    each = sum(value(number).nbytes for number in range(COUNT))
    entry = Entry(COUNT, each) if announced else Entry(2 * COUNT, each + COUNT * HEADER)
    assert run_ranks(2, _traffic, announced) == [{(PIPELINE, "send"): entry}] * 2
