"""The communication ledger: what it counts, and its table."""

from __future__ import annotations

import pytest
import torch

from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import collectives
from internlm.core.parallel.ledger import LEDGER, Entry, Ledger, format_traffic

TENSOR, WEIGHT = ParallelMode.TENSOR, ParallelMode.WEIGHT


def test_calls_and_bytes_add_up_by_mode_and_collective() -> None:
    ledger = Ledger()
    ledger.record(TENSOR, "all-gather", 100)
    ledger.record(TENSOR, "all-gather", 20)
    ledger.record(TENSOR, "all-reduce", 3)
    ledger.record(WEIGHT, "all-gather", 4)
    assert ledger.snapshot() == {
        (TENSOR, "all-gather"): Entry(2, 120),
        (TENSOR, "all-reduce"): Entry(1, 3),
        (WEIGHT, "all-gather"): Entry(1, 4),
    }


def test_a_snapshot_stays_as_it_is() -> None:
    ledger = Ledger()
    ledger.record(TENSOR, "all-gather", 1)
    before = ledger.snapshot()
    ledger.record(TENSOR, "all-gather", 1)
    assert before == {(TENSOR, "all-gather"): Entry(1, 1)}


def test_what_came_since() -> None:
    ledger = Ledger()
    ledger.record(TENSOR, "all-gather", 5)
    ledger.record(TENSOR, "all-reduce", 7)
    before = ledger.snapshot()
    assert ledger.since(before) == {}
    ledger.record(TENSOR, "all-gather", 2)
    ledger.record(WEIGHT, "broadcast", 0)  # all ranks but the first call it and send nothing
    assert ledger.since(before) == {(TENSOR, "all-gather"): Entry(1, 2), (WEIGHT, "broadcast"): Entry(1, 0)}
    assert ledger.since({}) == ledger.snapshot()


def test_the_table_has_numbers_per_step_and_in_all() -> None:
    mb = 2**20
    traffic = {(WEIGHT, "all-gather"): Entry(6, 12 * mb), (TENSOR, "reduce-scatter"): Entry(3, mb // 2)}
    head, *rows = format_traffic(traffic, steps=4).splitlines()
    assert head.split() == ["mode", "collective", "calls/step", "MiB/step", "calls", "MiB"]
    assert [row.split() for row in rows] == [
        ["tensor", "reduce-scatter", "0.8", "0.125", "3", "0.500"],
        ["weight", "all-gather", "1.5", "3.000", "6", "12.000"],
    ]
    assert len({len(line) for line in (head, *rows)}) == 1, "columns stand below their heads"


def test_the_table_of_a_single_step_and_of_nothing() -> None:
    (_, row) = format_traffic({(TENSOR, "all-to-all"): Entry(2, 2**20)}).splitlines()
    assert row.split() == ["tensor", "all-to-all", "2.0", "1.000", "2", "1.000"]
    assert len(format_traffic({}).splitlines()) == 1


@pytest.mark.parametrize(
    "collective",
    ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"],
)
def test_a_group_of_one_communicates_nothing(collective: str) -> None:
    before, x = LEDGER.snapshot(), torch.arange(6.0).view(1, 6)
    assert getattr(collectives, collective)(x, Group(TENSOR)) is x
    assert LEDGER.since(before) == {}


@pytest.mark.parametrize("collective", ["reduce_scatter", "all_gather"])
def test_a_group_of_one_fills_the_tensor_that_was_given(collective: str) -> None:
    x, target = torch.arange(6.0), torch.zeros(6)
    assert getattr(collectives, collective)(x, Group(TENSOR), target) is target
    assert torch.equal(target, x)
    assert getattr(collectives, collective)(x, Group(TENSOR), x.view(6)).data_ptr() == x.data_ptr()


class _Increment:
    """Work that adds one when it is waited for."""

    def __init__(self, tensor: torch.Tensor, done: bool) -> None:
        self.tensor, self.done = tensor, done

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.tensor += 1


def test_pending_is_finished_once() -> None:
    """Either by the first wait, or by a release once the work has completed."""
    for done in (False, True):
        tensor = torch.zeros(1)
        pending = collectives.Pending(tensor, _Increment(tensor, done))
        pending.release_if_completed()
        assert tensor.item() == done
        assert pending.wait().item() == pending.wait().item() == 1
