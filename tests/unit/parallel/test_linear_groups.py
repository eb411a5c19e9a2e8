"""Groups of parallel linears with one input: the bits of one linear with all weights, and one gather of the input."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internlm.core.parallel import ParallelLinear
from internlm.core.parallel.linear import LinearGroup
from tests.unit.parallel.test_linear import Scaling, close, inputs, linear, reference, with_main_grads


def group(axis: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[LinearGroup, ParallelLinear]:
    """Three linears, and one linear that has their weights as ranges of an axis; values are small integers."""
    sizes = [3, 1, 2]
    shapes = [(*(5, 7)[:axis], size, *(5, 7)[axis:]) for size in sizes]
    linears = [linear(shape, bias, dtype) for shape in shapes]
    whole = linear((*shapes[0][:axis], sum(sizes), *shapes[0][axis + 1 :]), bias, dtype)
    with torch.no_grad():
        for number, parameter in enumerate(p for one in linears for p in one.parameters()):
            parameter.copy_((torch.arange(parameter.numel()) * 7 + number).remainder(5).view_as(parameter) - 2)
        whole.weight.copy_(torch.cat([one.weight for one in linears], axis))
        if whole.bias is not None:
            whole.bias.copy_(torch.cat([one.bias for one in linears if one.bias is not None], axis))
    return LinearGroup(linears, axis), whole


def joined(linears: LinearGroup, name: str, of: Callable[[Tensor], Tensor | None]) -> Tensor:
    found = [of(getattr(one, name)) for one in linears.linears]
    return torch.cat([tensor for tensor in found if tensor is not None], linears.axis)


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_group_is_the_linear_with_all_weights(axis: int, with_main_grad: bool) -> None:
    """Bit by bit, since no sum is rounded."""
    linears, whole = group(axis)
    if with_main_grad:
        for one in (*linears.linears, whole):
            with_main_grads(one)
    x, dy = (tensor.detach().mul(4).round() for tensor in inputs(whole))
    results = []
    for module in (linears, whole):
        own = x.clone().requires_grad_()
        y = module(own, before=torch.neg)
        y.backward(dy)
        with torch.no_grad():
            assert torch.equal(module(x, before=torch.neg), y)
        results.append((y, own.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for name in ("weight", "bias"):
        assert torch.equal(joined(linears, name, lambda p: p.grad), getattr(whole, name).grad)


@pytest.mark.parametrize("splits_weight", [False, True])
def test_a_group_gathers_its_input_once_and_reduces_its_gradient_once(splits_weight: bool) -> None:
    linears, whole = group(1)
    log: list[str] = []
    for one in linears.linears:
        one.communicator = Scaling(splits_weight)
        one.communicator.calls = log
    x, dy = inputs(whole)
    linears(x).backward(dy)
    once = ["gather_input", "gather_grad_output", "gather_input", "reduce_grad_input"]
    assert [call for call in log if call in once] == once
    assert [log.count(hook) for hook in ("gather_weight", "gather_weight backward", "release_weight")] == [3, 3, 6]
    assert log.count("reduce_grad_weight") == 3 * splits_weight
    assert log.index("reduce_grad_input") > log.index("gather_weight backward")


def test_linears_of_a_group_may_be_frozen() -> None:
    linears, whole = group(0)
    for one in linears.linears[:2]:
        one.weight.requires_grad_(False)
    x, dy = inputs(whole)
    linears(x).backward(dy)
    assert [one.weight.grad is None for one in linears.linears] == [True, True, False]
    expected = reference(whole, x, dy)
    assert close(x.grad, expected["x"])
    assert close(linears.linears[2].weight.grad, expected["weight"][4:])


def test_a_copied_group_has_the_linears_of_the_copy() -> None:
    model = torch.nn.ModuleDict()
    linears, whole = group(0)
    model.update({"a": linears.linears[0], "b": linears.linears[1], "c": linears.linears[2], "group": linears})
    copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == [f"{name}.{parameter}" for name in "abc" for parameter in ("weight", "bias")]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    x, _ = inputs(whole)
    assert not copied["group"](x).any()
    assert torch.equal(copied["group"].linears[1].weight, copied["b"].weight)
    assert close(linears(x), whole(x))
