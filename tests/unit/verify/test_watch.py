from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internlm.core.context import ParallelMode
from internlm.core.parallel.ledger import LEDGER
from internlm.core.parallel.sharding import StageLayers
from internlm.utils.errors import UserError
from internlm.verify import watch
from internlm.verify.record import Details
from internlm.verify.watch import tensors_in, watching


class Model(nn.Module):
    """Two layers, the first recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        return self.second(torch.relu(x))


def test_outputs_and_their_gradients() -> None:
    model, xs = Model(), torch.randn(3, 5, 3)
    with watching(model, [0, 2], range(3)) as passes:
        for x in xs:
            model(x).square().sum().backward()
    assert len(passes) == 2
    for x, seen in zip(xs[::2], passes, strict=True):
        hidden = model.first(x).detach().requires_grad_()
        y = model.second(torch.relu(hidden))
        y.retain_grad()
        y.square().sum().backward()
        assert list(seen.outputs) == ["first", "second", "the model"]
        assert list(seen.gradients)[-1] == "first"
        assert torch.equal(seen.outputs["first"], hidden)
        assert torch.equal(seen.outputs["the model"], y)
        assert torch.equal(seen.gradients["first"], hidden.grad)
        assert torch.equal(seen.gradients["second"], y.grad)


def test_hooks_are_gone_afterwards() -> None:
    model = Model()
    with watching(model, [0, 1], [1, 2]) as passes:
        model(torch.ones(1, 3))
    model(torch.ones(1, 3))
    assert [list(each.outputs) for each in passes] == [[], ["first", "second", "the model"]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class InChunks(nn.Module):
    """The first layer is a chunk, recomputed in backward, the second is another."""

    stage_layers = StageLayers(2, (range(1), range(1, 2)))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, chunk: int) -> Tensor:
        return checkpoint(self.first, x, use_reentrant=False) if chunk == 0 else self.second(torch.relu(x))


def test_chunks_whose_backward_comes_later() -> None:
    model, xs = InChunks(), torch.randn(2, 5, 3)
    with watching(model, [0, 1], [1, 0, 1, 0]) as passes:
        hidden = [model(x, chunk=0) for x in xs.flip(0)]
        outputs = [model(each, chunk=1) for each in hidden]
        for output in outputs:
            output.square().sum().backward()
    for y, seen, x in zip(outputs[::-1], passes, xs, strict=True):
        assert list(seen.outputs) == ["first", "second", "the model"]  # which is not what a chunk gives
        assert torch.equal(seen.outputs["first"], model.first(x))
        assert torch.equal(seen.gradients["the model"], 2 * y)
        assert torch.equal(seen.gradients["first"], 2 * y @ model.second.weight * (seen.outputs["first"] > 0))


class NormTwice(nn.Module):
    """As a linear that calls the norm before it again in backward, where that call is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.norm(x).exp(), x, use_reentrant=True)


def test_gradients_of_what_is_called_again() -> None:
    inner = NormTwice()
    model, xs = nn.Sequential(inner), torch.randn(2, 5, 3, requires_grad=True)
    with watching(model, [0, 1], [0, 1]) as passes:
        for output in [model(x) for x in xs]:
            output.sum().backward()
    for x, seen in zip(xs, passes, strict=True):
        assert torch.equal(seen.outputs["0.norm"], inner.norm(x))
        torch.testing.assert_close(seen.gradients["0.norm"], inner.norm(x).exp())


class SumsBack(torch.autograd.Function):
    """A collective in the backward pass alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        LEDGER.record(ParallelMode.TENSOR, "all-reduce", 0, dy)
        return dy


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SumsBack.apply(x)


class Outer(nn.Module):
    """Module that returns what its inner module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_collective_in_backward_belongs_to_the_inner_module() -> None:
    model = nn.Sequential(Outer(), nn.Tanh())
    with watching(model, [0], [0], Details()) as passes:
        model(torch.ones(3, requires_grad=True)).sum().backward()
    assert [(call.module, call.in_backward) for call in passes[0].calls] == [("0.inner", True)]


class GivesItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.weight


class UsesAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.given = GivesItsWeight()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.given()


def test_a_parameter_that_is_an_output_keeps_no_hook() -> None:
    model = UsesAWeight()
    with watching(model, [0], [0], Details()) as passes:
        model(torch.ones(2, 3)).sum().backward()
    assert "given" in passes[0].outputs
    assert not model.given.weight._backward_hooks


def test_a_record_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_BYTES", 200)
    model, x = Model(), torch.ones(5, 3)
    with watching(model, [0], [0]):
        model(x)  # without details as before
    with pytest.raises(UserError, match="--debug-size"), watching(model, [0], [0], Details()):
        model(x)
    assert LEDGER.observer is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@dataclass
class Hidden:
    x: Tensor
    layers: int = 2


class Output(NamedTuple):
    loss: Tensor
    tokens: Tensor
    hits: Tensor


def test_what_can_be_compared() -> None:
    x = torch.ones(2)
    assert [name for name, _ in tensors_in((x, {"a": [x]}, None), "m")] == ["m[0]", "m[1].a[0]"]
    assert [name for name, _ in tensors_in(Hidden(x), "m")] == ["m.x"]
    assert [name for name, _ in tensors_in(Output(x.sum(), x, x > 0), "m")] == ["m.tokens"]
