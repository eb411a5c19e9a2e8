"""What is said of a reduced gradient, by the gradients of the micro-batches and the copies of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from internlm.verify.gradient_parts import explain_gradient
from internlm.verify.record import Details, RankCoordinates, RankRecord, TensorShards
from tests.unit.verify.test_compare import _record

#: Gradients of two micro-batches of each of two data ranks.
PARTS = list(torch.randn(4, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
WHOLE = torch.stack(PARTS).sum(0)
TOP, BOTTOM = WHOLE[:3], WHOLE[3:]


def _held(values: Tensor, row: int = 0) -> dict[str, TensorShards]:
    return {"w": TensorShards((6, 2), {(row, 0): values})}


def _reference() -> RankRecord:
    accumulated = [{"w": torch.stack([torch.zeros(6, 2), *PARTS[:count]]).sum(0)} for count in range(4)]
    details = Details(accumulated=accumulated, order=["w"])
    return replace(_record(), gradients=_held(WHOLE), details=details)


def _said(*ranks: tuple[RankCoordinates, dict[str, TensorShards]]) -> str:
    records = [replace(_record(), coordinates=at, gradients=gradients) for at, gradients in ranks]
    return explain_gradient("w", _reference(), records)


def _sharded(top: Tensor, bottom: Tensor) -> str:
    """Each of two data ranks has half of the elements, as with ZeRO."""
    return _said((RankCoordinates(0, 0, 0), _held(top)), (RankCoordinates(1, 0, 0, 1), _held(bottom, 3)))


def _sum(factors: Sequence[float]) -> Tensor:
    return torch.stack([factor * part for factor, part in zip(factors, PARTS, strict=True)]).sum(0)


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ([2] * 4, "it is multiplied by 2, the size of the data group"),
        ([0.5] * 4, "as if it were averaged over data"),
        ([0.3] * 4, "it is multiplied by 0.3"),
        ([1, 0, 1, 1], "on rank 0 it lacks micro-batch 1 of data rank 0"),
        ([0.8, 0.8, 1.2, 1.2], "the micro-batches of the data ranks are multiplied by 0.8, 1.2"),
        ([1, 2, 3, 4], "the micro-batches are multiplied by 1, 2, 3, 4"),
    ],
)
def test_factors_of_micro_batches(factors: list[float], words: str) -> None:
    wrong = _sum(factors)
    assert words in _sharded(wrong[:3], wrong[3:])


def test_a_sum_over_data_that_is_missing() -> None:
    assert "own micro-batches alone: a sum over data is missing" in _sharded(
        _sum([1, 1, 0, 0])[:3], _sum([0, 0, 1, 1])[3:]
    )


def test_what_is_no_combination() -> None:
    assert "on rank 1 it is no combination of the gradients" in _sharded(TOP, BOTTOM.flip(0))


def test_zeros() -> None:
    assert _sharded(TOP, BOTTOM * 0) == "it is zero on rank 1"


def test_what_is_not_finite_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.WHOLE", WHOLE / 0)
    assert _sharded(TOP / 0, BOTTOM / 0) == "it is not finite on one process either"


def test_copies_that_were_never_summed() -> None:
    part = torch.rand(6, 2, dtype=torch.float64)
    ranks = [(RankCoordinates(0, tensor, 0), _held(values)) for tensor, values in enumerate((part, WHOLE - part))]
    assert _said(*ranks) == "the copies of the tensor ranks add up to it: it is not summed over tensor"
    ranks = [(RankCoordinates(data, 0, 0), _held(WHOLE / 2)) for data in range(2)]
    assert _said(*ranks) == "the copies of the data ranks add up to it: it is averaged over data"


def test_a_gradient_that_no_rank_has() -> None:
    assert _said((RankCoordinates(0, 0, 0), {})) == "no rank has it"
