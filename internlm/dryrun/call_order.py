"""Collectives of a rank in the order in which it calls them, and the comparison of this order between ranks.

NCCL runs the collectives of a communicator in the order of the calls. Two ranks that call the collectives of a group,
or of two groups that both belong to, in different orders may wait for each other forever, or mix up their data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

#: Names in torch's ``c10d`` namespace that differ from the usual ones.
_NAMES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "recv_": "receive",
    "reduce_": "reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
}


TRANSFER = "transfer"


class Call(NamedTuple):
    """Call of a collective, or of one end of a point-to-point transfer."""

    group: tuple[int, ...]
    """Global ranks of the group; of a transfer, the sender and the receiver."""
    name: str
    nbytes: int
    """Size of all its tensors."""

    def __str__(self) -> str:
        return f"{self.name} of {self.nbytes} bytes over ranks {_short(self.group)}"


def call_of(func: Any, args: Sequence[Any], rank: int) -> Call:
    """Describe the call of an operator of the namespace ``c10d`` by ``rank``."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(named["process_group"])))
    name = func._schema.name.removeprefix("c10d::")
    name = _NAMES.get(name, name)
    nbytes = sum(tensor.nbytes for value in args for tensor in _tensors(value))
    if name == "send":
        return Call((rank, ranks[named["dst"]]), TRANSFER, nbytes)
    if name == "receive":
        return Call((ranks[named["src"]], rank), TRANSFER, nbytes)
    return Call(ranks, name, nbytes)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def order_problems(events: Mapping[int, Sequence[Call]]) -> list[str]:
    """Return a line for each pair of ranks whose common collectives differ, or are ordered differently.

    Transfers of a pair are compared by direction: pipeline schedules order a send and a receive freely, because each
    direction has its own queue.

    Args:
        events: Events in order, by rank.
    """
    problems = []
    for pair in combinations(sorted(events), 2):
        one, other = pair
        for title, group in (
            ("collectives", None),
            (f"transfers from {one} to {other}", (one, other)),
            (f"transfers from {other} to {one}", (other, one)),
        ):
            first, second = (_common(events[rank], pair, group) for rank in pair)
            if first != second:
                problems.append(f"ranks {one} and {other}, {title}: {_first_difference(first, second)}")
    return problems


def _common(events: Sequence[Call], pair: tuple[int, int], transfer: tuple[int, int] | None) -> list[Call]:
    """Return the collectives that concern both ranks of ``pair``, or the transfers of one direction."""
    if transfer is not None:
        return [event for event in events if event.name == TRANSFER and event.group == transfer]
    return [event for event in events if event.name != TRANSFER and set(pair) <= set(event.group)]


def _first_difference(first: Sequence[Call], second: Sequence[Call]) -> str:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return f"number {index} is {a} on one and {b} on the other"
    return f"{len(first)} on one and {len(second)} on the other"


def _short(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}, {ranks[1]}, …, {ranks[-1]}"
