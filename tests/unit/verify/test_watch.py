from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    with watching(model, [0, 2]) as passes:
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
    with watching(model, [0, 1]) as passes:
        model(torch.ones(1, 3))
    model(torch.ones(1, 3))
    assert len(passes) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Output(NamedTuple):
    loss: Tensor
    tokens: Tensor
    hits: Tensor


def test_what_can_be_compared() -> None:
    x = torch.ones(2)
    assert [name for name, _ in tensors_in((x, {"a": [x]}, None), "m")] == ["m[0]", "m[1].a[0]"]
    assert [name for name, _ in tensors_in(Output(x.sum(), x, x > 0), "m")] == ["m.tokens"]
