"""The order in which isp gathers and uses weights is the documented one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm.config.schema import AdamConfig
from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.attach import attach_communicators
from internlm.core.parallel.param_state import attach_main_grad, main_grad_of
from internlm.core.parallel.products import deferring
from internlm.core.parallel.sharding import GroupPosition, Sharding, StageLayers, building
from internlm.core.parallel.weight_gatherer import Overlap, WeightGatherer
from internlm.solver.optimizer import HybridZeroOptimizer
from tests.dist.isp_ranks import (
    CUTS,
    NONE,
    OVERLAPS,
    Case,
    assert_nothing_is_left,
    loss_of,
    own,
    split,
)
from tests.harness.pool import run_ranks
from tests.unit.model.samples import decoder


def watch(gatherer: WeightGatherer) -> list[str]:
    """Record events from now on: ``f3``, weight 3 is gathered; ``u3``, it is used; ``U3``, in a backward product."""
    events: list[str] = []
    numbers = {linear.weight.data_ptr(): number for number, linear in enumerate(gatherer.linears)}
    make, acquire = gatherer._new_buffer, gatherer.acquire

    def fetched(shard: Tensor) -> Tensor:
        events.append(f"f{numbers[shard.data_ptr()]}")
        return make(shard)

    def acquired(number: int, backward: bool) -> Tensor:
        whole = acquire(number, backward)
        events.append(f"{'U' if backward else 'u'}{number}")
        return whole

    gatherer._new_buffer, gatherer.acquire = fetched, acquired
    return events


def _orders(rank: int, world_size: int, case: Case) -> tuple[str, str, str]:
    """Return the events of a forward pass, and of the first and the second backward pass."""
    ranks = split(rank, world_size, case)
    HybridZeroOptimizer(ranks.model, AdamConfig(lr=1e-2))
    events, found = watch(ranks.gatherer), []
    for _ in range(2):
        loss = loss_of(ranks, 1)
        found.append(take_all(events))
        loss.backward()
        found.append(take_all(events))
    assert found[0] == found[2]
    return found[0], found[1], found[3]


def take_all(events: list[str]) -> str:
    text = " ".join(events)
    events.clear()
    return text


#: Two blocks of wqkv, wo, w13 and w2, and the head, 8.
AS_NEEDED = "f0 u0 f1 u1 f2 u2 f3 u3 f4 u4 f5 u5 f6 u6 f7 u7 f8 u8"
FORWARD = {
    "module": "f0 f1 u0 f2 u1 f3 u2 f4 u3 f5 u4 f6 u5 f7 u6 f8 u7 u8",
    "layer, wqkv": "f0 f4 f5 f6 f7 u0 f1 u1 f2 u2 f3 u3 f8 u4 u5 u6 u7 u8",
    "layer, attn": "f0 u0 f4 f5 f6 f7 f1 u1 f2 u2 f3 u3 u4 f8 u5 u6 u7 u8",
    "layer, wo": "f0 u0 f1 f4 f5 f6 f7 u1 f2 u2 f3 u3 u4 f8 u5 u6 u7 u8",
    "layer, w1": "f0 u0 f1 u1 f2 f4 f5 f6 f7 u2 f3 u3 u4 u5 f8 u6 u7 u8",
}
BACKWARD = "f7 f6 U7 f5 U6 f4 U5 f3 U4 f2 U3 f1 U2 f0 U1 U0"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_order(overlap: str) -> None:
    """Forward by layer or by module, backward always one ahead."""
    assert run_ranks(2, _orders, Case(OVERLAPS[overlap])) == [(FORWARD[overlap], BACKWARD, BACKWARD)] * 2


def test_order_without_overlap() -> None:
    backward = "f7 U7 f6 U6 f5 U5 f4 U4 f3 U3 f2 U2 f1 U1 f0 U0"
    assert run_ranks(2, _orders, NONE_CASE) == [(AS_NEEDED, backward, backward)] * 2


NONE_CASE = Case()
#: Block 1 is recomputed and goes backward, up to its last product; the same of block 0.
AGAIN_1 = "f4 f5 u4 f6 u5 f7 u6 u7 f7 f6 U7 f5 U6 f4 U5"
AGAIN_0 = "f1 u0 f2 u1 f3 u2 u3 f3 f2 U3 f1 U2 f0 U1 U0"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_order_where_all_is_recomputed(overlap: str) -> None:
    """The second backward pass prefetches the first weight of a recomputed block rather than the last."""
    first = f"{AGAIN_1} f3 U4 f0 f1 u0 f2 u1 u2 u3 f3 f2 U3 f1 U2 f0 U1 U0"
    second = f"{AGAIN_1} f0 U4 {AGAIN_0}"
    assert run_ranks(2, _orders, Case(OVERLAPS[overlap], 1.0)) == [(FORWARD[overlap], first, second)] * 2


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_order_where_the_first_layer_is_recomputed(overlap: str) -> None:
    first = "f7 f6 U7 f5 U6 f4 U5 f3 U4 f0 f1 u0 f2 u1 u2 u3 f3 f2 U3 f1 U2 f0 U1 U0"
    second = f"f7 f6 U7 f5 U6 f4 U5 f0 U4 {AGAIN_0}"
    assert run_ranks(2, _orders, Case(OVERLAPS[overlap], 0.5)) == [(FORWARD[overlap], first, second)] * 2


# -- chunks of a pipeline stage


def _of_two_chunks(rank: int, world_size: int, overlap: Overlap) -> tuple[list[str], dict[str, Tensor]]:
    """Return the events of F and B of both chunks, and the gradients."""
    share = GroupPosition(rank, world_size)
    with building(Sharding("isp", share, share), StageLayers(2, (range(1), range(1, 2)))):
        model = decoder()
    world = dist.group.WORLD
    assert world is not None
    group = Group.of(ParallelMode.WEIGHT, world)
    gatherer = attach_communicators(model, "isp", Group.of(ParallelMode.TENSOR, world), group, overlap)
    assert gatherer is not None
    for parameter in model.parameters():
        attach_main_grad(parameter, torch.zeros_like(parameter))
    events, found = watch(gatherer), []

    def done() -> None:
        found.append(take_all(events))
        assert_nothing_is_left(gatherer)

    ids, labels = own(group, 1), own(group, 2)
    hidden = model(ids, CUTS, chunk=0)
    done()
    given = hidden.detach().requires_grad_()
    loss = model(ids, CUTS, labels=labels, chunk=1, hidden=given).loss_sum
    done()
    loss.backward()
    done()
    with deferring() as tasks:
        hidden.backward(given.grad)
    done()
    for task in tasks:
        task()
    assert_nothing_is_left(gatherer)
    return found, {name: main_grad_of(parameter).clone() for name, parameter in model.named_parameters()}


#: Uses in F of chunk 0, F of chunk 1, B of chunk 1 and B of chunk 0.
CHUNKS = "u0 u1 u2 u3", "u4 u5 u6 u7 u8", "U7 U6 U5 U4", "U3 U2 U1 U0"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_no_gather_crosses_the_border_of_a_chunk(overlap: str) -> None:
    """A weight gathered in an action is used in it; gradients are delivered, deferred or not."""
    found, wanted = (run_ranks(2, _of_two_chunks, o) for o in (OVERLAPS[overlap], NONE))
    for (actions, gradients), (_, reference) in zip(found, wanted, strict=True):
        for action, used in zip(actions, CHUNKS, strict=True):
            events = action.split()
            assert [event for event in events if event[0] != "f"] == used.split()
            assert {event[1:] for event in events if event[0] == "f"} == {event[1:] for event in used.split()}
        assert actions[2].startswith("f7 f6 U7")  # ahead, that is
        assert actions[3].startswith("f3 f2 U3")
        assert not [name for name in reference if not torch.equal(gradients[name], reference[name])]
        assert all(gradient.any() for gradient in gradients.values())
