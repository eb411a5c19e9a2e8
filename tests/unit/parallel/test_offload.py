"""Offloading: what leaves, what stays, and what comes back when."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from internlm.core.parallel import offload
from internlm.core.parallel.offload import ChunkOffload, _Saved, _SavedTensor

Block = Callable[[Tensor], Tensor]
SIZE = 6


class Noted(torch.autograd.Function):
    """Saves a tensor of its own, and notes how many such tensors of blocks are here."""

    most = 0

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        own = x * factor
        ctx.save_for_backward(own)
        Noted.note(own)
        return own + 1

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (own,) = ctx.saved_tensors
        Noted.note(own)
        return dy * own, None

    @staticmethod
    def note(own: Tensor) -> None:
        originals = [each.storage.original for each in parked()]
        here = [own, *originals, *(each.tensor for each in parked())]
        Noted.most = max(Noted.most, len({each.untyped_storage().data_ptr() for each in here if each is not None}))


def run(blocks: list[Block], x: Tensor, count: int, shared: list[Tensor] | None = None) -> Tensor:
    chunk = ChunkOffload(len(blocks), count)
    for position, block in enumerate(blocks):
        compute = partial(block, x)
        x = chunk.run(position, compute, x.device, shared or []) if position <= count else compute()
    return x


def parked() -> list[_SavedTensor]:
    return [each for each in gc.get_objects() if type(each) is _SavedTensor]


def start() -> Tensor:
    return torch.linspace(-1, 1, SIZE * SIZE, dtype=torch.float64).view(SIZE, SIZE).requires_grad_()


def views(x: Tensor) -> Tensor:
    """Saves several views of one storage, none of them the whole of it."""
    y = x * 2
    return (y[1:] @ y[:-1].T).sum() * y.T[2:].T.exp().sum() + (y[:, 0] * y[0]).sum() * x


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_are_the_same_bits(count: int) -> None:
    blocks: list[Block] = [torch.sin, views, lambda x: torch.softmax(x, 1) * x]
    plain, offloaded = start(), start()
    run(blocks, plain, 0).sum().backward()
    y = run(blocks, offloaded, count)
    assert parked()
    y.sum().backward()
    assert plain.grad is not None
    assert offloaded.grad is not None
    assert torch.equal(plain.grad, offloaded.grad)
    del y
    assert not parked()


def test_views_of_one_storage_are_copied_once() -> None:
    y = run([views], start(), 1)
    stores = {id(each.storage): each.storage for each in parked()}
    sizes = [sum(part.nbytes for part in store.host) for store in stores.values()]
    assert len(parked()) > len(stores)
    assert sorted(sizes)[-2:] == [8 * SIZE * SIZE] * 2  # y, and its exponential at the most: x was sent
    assert all(store.original is None for store in stores.values())
    del y


def test_what_others_keep_stays() -> None:
    weight, x = start(), start()
    y = run([lambda x: x * weight], x, 1, [weight, x])
    assert parked() == []
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


def test_two_blocks_at_the_most_are_here() -> None:
    blocks: list[Block] = [lambda x: Noted.apply(x, 0.5)] * 8
    Noted.most = 0
    y = run(blocks, start(), 7)
    assert Noted.most == 2
    assert all(each.storage.original is None for each in parked())
    Noted.most = 0
    y.sum().backward()
    assert Noted.most == 2


def test_what_a_block_saved_comes_while_the_one_after_it_runs_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    bring_back = _Saved._copy_back
    numbers: dict[int, int] = {}

    def noted(saved: _Saved, parked: list[_SavedTensor]) -> None:
        events.append(f"fetch {numbers.setdefault(id(saved), 2 - len(numbers))}")
        bring_back(saved, parked)

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, number: int) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.number = number
            return x.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
            events.append(f"block {ctx.number}")
            return dy, None

    def block(number: int) -> Block:
        return lambda x: Mark.apply(torch.sin(x), number).cos()

    monkeypatch.setattr(_Saved, "_copy_back", noted)
    run([block(number) for number in range(4)], start(), 3).sum().backward()
    assert events == ["fetch 2", "block 3", "fetch 1", "block 2", "fetch 0", "block 1", "block 0"]


def test_a_graph_may_be_run_twice() -> None:
    x = start()
    y = run([torch.sin, torch.exp], x, 2).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_host_memory_comes_in_segments_that_are_filled_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SEGMENT_BYTES", 64)
    sizes = [100, 1, 27, 64, 8, 0, 5]
    storages = list(offload.host_memory(sizes, torch.device("cpu")))
    assert [sum(part.nbytes for part in parts) for parts in storages] == sizes
    segments = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for p in storages for part in p}
    assert list(segments.values()) == [64, 64, 64, 13]
    pieces = [(part.untyped_storage().data_ptr(), part.storage_offset(), part.nbytes) for p in storages for part in p]
    assert len({(at, offset + i) for at, offset, size in pieces for i in range(size)}) == sum(sizes)  # no overlap


@pytest.mark.parametrize("count", [1, 3])
def test_tensors_that_span_segments_come_back_as_they_were(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for segment in (offload.SEGMENT_BYTES, 8 * SIZE + 1):  # the second cuts every tensor, within its elements
        monkeypatch.setattr(offload, "SEGMENT_BYTES", segment)
        x = start()
        run([torch.sin, views, torch.exp, torch.sin], x, count).sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert torch.equal(*gradients)


def test_nothing_is_offloaded_without_gradients() -> None:
    with torch.no_grad():
        y = run([torch.sin], start(), 1)
    assert parked() == []
    assert torch.equal(y, torch.sin(start()))
