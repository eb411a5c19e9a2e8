"""The first tensor that differs, along passes that are written down here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from internlm.core.context import ParallelMode
from internlm.verify.culprit import find_culprit
from internlm.verify.record import Call, Pass, RankCoordinates, RankRecord, Site
from internlm.verify.walk import Found, Walk
from tests.unit.verify.test_compare import _compare, _record

LIMIT = 1e-11
X, Y, Z, MASK = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
#: A model that gives its input and a mask to a module, and what that returns, with the mask, to another.
SITES = {
    Site("", "[0]", is_input=True): X,
    Site("", ".grad_scale", is_input=True): torch.ones((), dtype=torch.float64),
    Site("a", "[0]", is_input=True): MASK,
    Site("a", "[1]", is_input=True): X,
    Site("a", ""): Y,
    Site("b", "[0]", is_input=True): MASK,
    Site("b", "[1]", is_input=True): Y,
    Site("b", ""): Z,
}
A, B_MASK, B_IN, B = list(SITES)[4:]
CALLERS = {"": None, "a": "", "b": ""}


def _rank(data: int, tensor: int, changes: dict[Site, Tensor], calls: list[Call] | None = None) -> RankRecord:
    passes = [Pass({**SITES, **changes}, calls or [], CALLERS)]
    return replace(_record(data), coordinates=RankCoordinates(data, tensor, 0), passes=passes)


def _alone(data_ranks: int = 1) -> RankRecord:
    return replace(_record(), passes=[Pass(dict(SITES), callers=CALLERS)] * data_ranks)


def _first(*changes: dict[Site, Tensor]) -> Found | None:
    """First difference of a tensor group whose ranks have other tensors at some sites."""
    return Walk(_alone(), [_rank(0, i, c) for i, c in enumerate(changes)], LIMIT).first(lambda site: True)


PARTS = Z, Y - Z


def test_parts_that_nothing_adds() -> None:
    # The mask that the next module gets agrees, but it is none of what follows from the parts.
    found = _first(*({A: part, B_IN: part, B: part**2} for part in PARTS))
    assert found is not None
    assert (found.site, found.module) == (A, "a")


@pytest.mark.parametrize("sites", [[A], [A, B_IN]])
def test_parts_that_are_added_later(sites: list[Site]) -> None:
    assert _first(*(dict.fromkeys(sites, part) for part in PARTS)) is None


def test_another_batch_comes_before_the_weight_of_its_tokens() -> None:
    weight = {Site("", ".grad_scale", is_input=True): torch.full((), 0.9, dtype=torch.float64)}
    ranks = [_rank(0, 0, weight), _rank(1, 0, {**weight, Site("", "[0]", is_input=True): Z})]
    report = _compare(_record(0), _record(1))
    found = find_culprit(report, _alone(2), ranks)
    assert found is not None
    assert (str(found), found.tensor) == ("the batch, batch", "input[0] of the model (data rank 1)")
    found = find_culprit(report, _alone(2), [_rank(i, 0, weight) for i in range(2)])
    assert found is not None
    assert (str(found), found.explanation) == ("the loss, loss", "it is multiplied by 0.9")


def test_collectives_are_those_of_the_module_that_is_named() -> None:
    calls = [Call(module, False, ParallelMode.TENSOR.value, "all-reduce") for module in ("", "b", "b")]
    wrong = {B_IN: Z, B: X}
    found = Walk(_alone(), [_rank(0, 0, wrong, calls)], LIMIT).first(lambda site: True)
    assert found is not None
    assert (found.site, found.module, found.calls) == (B_IN, "", calls[:1])  # the model computes what b gets
