"""Which rank writes which piece: each is written once, ranks write as many bytes each, and plans stay small."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from internlm.checkpoint import logical_tensors
from internlm.checkpoint.logical_tensors import PIECE_BYTES, LogicalTensor, LogicalTensors
from internlm.checkpoint.planners import LogicalSavePlanner, bytes_of
from internlm.checkpoint.save_plan import PieceSet, own_pieces, piece_sets, ranks_of_sets, target_bytes
from internlm.core.parallel.placement import slices_of_range


def local_plan(tensors: LogicalTensors, rank: int) -> tuple[LogicalSavePlanner, SavePlan]:
    planner = LogicalSavePlanner()
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    return planner, planner.create_local_plan()


def agreed(ranks: Sequence[LogicalTensors]) -> tuple[list[SavePlan], list[SavePlan], Metadata]:
    """Return the plans that rank 0 gathers, the plans that it sends, and the metadata, as ``agree_on_plan`` does."""
    planners, plans = zip(*(local_plan(tensors, rank) for rank, tensors in enumerate(ranks)), strict=True)
    sets = [piece_sets(plan) for plan in plans]
    gathered = [own_pieces(plan, sets[rank], [[*of_rank] for of_rank in sets], rank) for rank, plan in enumerate(plans)]
    assigned, metadata = planners[0].create_global_plan(gathered)
    return gathered, assigned, metadata


def indices(plans: Sequence[SavePlan]) -> list[MetadataIndex]:
    return [item.index for plan in plans for item in plan.items]


def zero_shard(tensor: Tensor, rank: int, count: int) -> LogicalTensor:
    """Return the slices of one of ``count`` equal flat ranges of ``tensor``."""
    logical = LogicalTensor(tuple(tensor.shape), tensor.dtype)
    size = -(-tensor.numel() // count)
    for box in slices_of_range(tensor.shape, rank * size, min((rank + 1) * size, tensor.numel())):
        logical.add(box.offsets, tensor.flatten()[box.start : box.stop].view(box.sizes))
    return logical


WEIGHTS = {f"layers.{i}.weight": torch.zeros(1024, 1024 + 32 * i) for i in range(6)}
NORMS = {f"layers.{i}.norm": torch.zeros(1024) for i in range(6)}


def replicated(rank: int, count: int) -> LogicalTensors:
    """Everything on every rank, as without ZeRO."""
    names = [f"{section}/{name}" for section in ("model", "optimizer/exp_avg") for name in WEIGHTS | NORMS]
    return {name: LogicalTensor.whole((WEIGHTS | NORMS)[name.rpartition("/")[2]]) for name in names}


def zero(rank: int, count: int) -> LogicalTensors:
    """The model on every rank, moments in ZeRO's shards over pairs of ranks."""
    model = {f"model/{name}": LogicalTensor.whole(tensor) for name, tensor in (WEIGHTS | NORMS).items()}
    moments = {
        f"optimizer/{moment}/{name}": zero_shard(tensor, rank % 2, 2)
        for moment in ("exp_avg", "exp_avg_sq")
        for name, tensor in WEIGHTS.items()
    }
    return model | moments | {f"rng/{rank}/numpy": LogicalTensor.whole(torch.zeros(5000, dtype=torch.uint8))}


def tensor_parallel(rank: int, count: int) -> LogicalTensors:
    """Matrices split over pairs of ranks, norms on all ranks."""
    model = {f"model/{name}": LogicalTensor.whole(tensor) for name, tensor in NORMS.items()}
    for name, weight in WEIGHTS.items():
        model[f"model/{name}"] = half = LogicalTensor(tuple(weight.shape), weight.dtype)
        half.add((512 * (rank % 2), 0), weight[:512])
    return model


LAYOUTS = [replicated, zero, tensor_parallel]
Layout = Callable[[int, int], LogicalTensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_each_piece_is_written_by_one_rank_and_all_write_as_many_bytes(layout: Layout, count: int) -> None:
    ranks = [layout(rank, count) for rank in range(count)]
    gathered, assigned, _ = agreed(ranks)
    held = {index for rank, tensors in enumerate(ranks) for index in indices([local_plan(tensors, rank)[1]])}
    assert Counter(indices(gathered)) == Counter(held)
    assert [plan.items and bytes_of(plan) for plan in assigned] == [bytes_of(plan) for plan in gathered]
    sizes = [bytes_of(plan) for plan in gathered]
    assert max(sizes) - min(sizes) <= PIECE_BYTES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_0_receives_as_many_bytes_from_eight_replicas_as_from_two(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logical_tensors, "PIECE_BYTES", 1 << 15)
    two, eight = (
        sum(len(pickle.dumps(plan)) for plan in agreed([layout(rank, count) for rank in range(count)])[0])
        for count in (2, 8)
    )
    # Names are sent once by each rank.
    assert two > 50_000
    assert eight < 1.1 * two


@pytest.mark.parametrize("layout", LAYOUTS)
def test_before_that_every_rank_receives_a_few_digests_of_each_rank(layout: Layout) -> None:
    sets = [*piece_sets(local_plan(layout(0, 8), 0)[1])]
    assert len(pickle.dumps(sets)) < 400


def test_pieces_in_different_sets_of_ranks_are_written_once() -> None:
    """Two pipeline stages with tied weights hold the embedding, and other tensors besides."""
    embedding = {"model/embedding.weight": LogicalTensor.whole(torch.zeros(3000, 1024))}
    first, last = ({f"model/{name}": LogicalTensor.whole(torch.zeros(99, 99))} for name in ("first", "last"))
    gathered, assigned, metadata = agreed([embedding | first, embedding | last])
    twice = {index for index, count in Counter(indices(gathered)).items() if count == 2}
    assert {index.fqn for index in twice} == {"model/embedding.weight"}
    assert max(Counter(indices(assigned)).values()) == 1
    assert {*indices(assigned)} == {*indices(gathered)}
    assert len(metadata.state_dict_metadata) == 3


def test_a_set_with_replicas_levels_out_what_ranks_write_otherwise() -> None:
    shared, own, other = PieceSet(b"s", 100), PieceSet(b"o", 70), PieceSet(b"x", 10)
    targets = target_bytes(ranks_of_sets([[shared, own], [shared, other], [shared]]), 3)
    assert targets == {(0,): {0: 70}, (1,): {1: 10}, (0, 1, 2): {0: 0, 1: 45, 2: 55}}


def test_ranks_that_differ_in_a_dtype_or_a_shape_are_no_replicas() -> None:
    def digests(tensor: Tensor) -> set[bytes]:
        return {found.digest for found in piece_sets(local_plan({"model/a": LogicalTensor.whole(tensor)}, 0)[1])}

    assert digests(torch.zeros(4, 4)) == digests(torch.ones(4, 4))
    assert len(set.union(*map(digests, (torch.zeros(4, 4), torch.zeros(2, 8), torch.zeros(4, 4).half())))) == 3
