"""Plan of a save: which rank writes which piece. Ranks agree on it once, and again if their tensors change.

A piece that several ranks hold is written by one of them. Rank 0 needs to know all that is written, but must not
receive the pieces of every replica: each would send megabytes. So ranks first leave out what their replicas write:

1. Ranks exchange a digest and the size of each of their *sets* of pieces: the whole and the split tensors of each
   section. Ranks with the same digest hold the same pieces.
2. Every rank computes how many bytes the ranks that share the same sets should write of them, so that all ranks write
   as many in total, and takes its own pieces.
3. Rank 0 gathers these pieces, leaves each piece that is in several different sets to one rank, and sends every rank
   its plan.
"""

from __future__ import annotations

import dataclasses
import heapq
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.planners import LogicalSavePlanner, bytes_of_item

Ranks: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Pieces that this rank writes, and on rank 0 the metadata of all tensors."""

    signature: list[Any]
    own: SavePlan
    metadata: Metadata | None
    token: str
    """Beginning of the names of attempts, the same on all ranks and in no other run."""


def agree_on_plan(planner: LogicalSavePlanner, signature: list[Any], exchange: Exchange) -> Plan:
    """Return the plan of this rank; collective."""
    local = planner.create_local_plan()
    sets = piece_sets(local)
    sets_of_ranks = exchange.all_gather([*sets])
    plans = exchange.gather(own_pieces(local, sets, sets_of_ranks, dist.get_rank()))
    assigned: list[SavePlan] = []
    metadata = None
    if plans:
        assigned, metadata = planner.create_global_plan(plans)
    return Plan(signature, exchange.scatter(assigned), metadata, exchange.broadcast(secrets.token_hex(4)))


class PieceSet(NamedTuple):
    """Pieces that ranks hold all or none of."""

    digest: bytes
    size: int
    """Bytes of the pieces."""


def piece_sets(plan: SavePlan) -> dict[PieceSet, list[WriteItem]]:
    """Return the pieces of a rank by set.

    The tensors of a section that are split, over whatever group, are in one set, and those that the rank holds as a
    whole in another one, which more ranks hold.
    """
    held = Counter[str]()
    for item in plan.items:
        assert item.tensor_data is not None
        held[item.index.fqn] += item.tensor_data.chunk.sizes.numel()
    sets: dict[tuple[str, bool], list[WriteItem]] = {}
    for item in plan.items:
        assert item.tensor_data is not None
        name = item.index.fqn
        sets.setdefault((name.partition("/")[0], held[name] == item.tensor_data.size.numel()), []).append(item)
    return {PieceSet(_digest(items), sum(map(bytes_of_item, items))): items for items in sets.values()}


def _digest(items: Sequence[WriteItem]) -> bytes:
    hasher = xxhash.xxh3_128()
    for item in items:
        assert item.tensor_data is not None
        data = item.tensor_data
        hasher.update(repr((item.index, data.properties.dtype, data.size, data.chunk)).encode())
    return hasher.digest()


def own_pieces(
    plan: SavePlan,
    sets: Mapping[PieceSet, Sequence[WriteItem]],
    sets_of_ranks: Sequence[Sequence[PieceSet]],
    rank: int,
) -> SavePlan:
    """Return ``plan`` without the pieces that replicas of this rank write.

    Args:
        plan: All pieces that this rank holds.
        sets: Those pieces by set.
        sets_of_ranks: Sets of every rank.
        rank: Rank of this process.
    """
    replicas = ranks_of_sets(sets_of_ranks)
    own = set[MetadataIndex]()
    for ranks, target in target_bytes(replicas, len(sets_of_ranks)).items():
        if rank in ranks:
            items = [item for piece_set in sorted(sets) if replicas[piece_set] == ranks for item in sets[piece_set]]
            owners = _owners([*map(bytes_of_item, items)], target)
            own |= {item.index for item, owner in zip(items, owners, strict=True) if owner == rank}
    return dataclasses.replace(plan, items=[item for item in plan.items if item.index in own])


def ranks_of_sets(sets_of_ranks: Sequence[Sequence[PieceSet]]) -> dict[PieceSet, Ranks]:
    """Return the ranks that hold each set."""
    ranks: dict[PieceSet, list[int]] = {}
    for rank, sets in enumerate(sets_of_ranks):
        for piece_set in sets:
            ranks.setdefault(piece_set, []).append(rank)
    return {piece_set: tuple(of_set) for piece_set, of_set in ranks.items()}


def target_bytes(replicas: Mapping[PieceSet, Ranks], world_size: int) -> dict[Ranks, dict[int, int]]:
    """Return how many bytes each rank should write of what it shares with the same ranks, so that all write as many.

    Args:
        replicas: The ranks that hold each set of pieces.
        world_size: Number of ranks.

    Returns:
        For the ranks that share sets: the bytes of these sets that each of them writes.
    """
    sizes = Counter[Ranks]()
    for piece_set, ranks in replicas.items():
        sizes[ranks] += piece_set.size
    loads = [0] * world_size
    targets: dict[Ranks, dict[int, int]] = {}
    # The more ranks share a set, the better it levels out what was uneven before.
    for ranks in sorted(sizes, key=lambda ranks: (len(ranks), ranks)):
        by_load = sorted(loads[rank] for rank in ranks)
        # The level that is reached if the first ranks by load are filled up; the lowest is the right one.
        totals = accumulate(by_load, initial=sizes[ranks])
        level = min(total // count for count, total in enumerate(totals) if count)
        targets[ranks] = {rank: max(level - loads[rank], 0) for rank in ranks}
        for rank, size in targets[ranks].items():
            loads[rank] += size
    return targets


def _owners(sizes: Sequence[int], targets: Mapping[int, int]) -> list[int]:
    """Return the rank that writes each piece, the largest pieces first, so that ranks come close to their targets."""
    missing = [(-size, rank) for rank, size in sorted(targets.items())]
    heapq.heapify(missing)
    owners = [-1] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        negative, owners[index] = missing[0]
        heapq.heapreplace(missing, (negative + sizes[index], owners[index]))
    return owners
