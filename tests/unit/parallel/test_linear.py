"""The parallel linear: its maths against torch's, and when it talks to the other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.core.parallel import Communicator, ParallelLinear, ParallelNorm
from internlm.core.parallel.main_grad import attach_main_grad
from internlm.core.parallel.placement import initialize_parameters, normal
from internlm.ops import swiglu
from internlm.utils.dtype import default_dtype

TOKENS, WIDTH = 5, 4
OUT_SHAPES = [6, (2, 3), (2, 3, 2)]


def linear(
    out_shape: int | tuple[int, ...] = (2, 3), bias: bool = True, dtype: torch.dtype = torch.float64
) -> ParallelLinear:
    with default_dtype(dtype):
        layer = ParallelLinear(WIDTH, out_shape, normal(1.0), bias)
    initialize_parameters(layer, seed=1)
    if bias:
        with torch.no_grad():
            layer.bias.copy_(torch.linspace(-1, 1, layer.bias.numel()).view_as(layer.bias))
    return layer


def inputs(layer: ParallelLinear) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    return x, torch.randn(TOKENS, *layer.out_shape, generator=generator, dtype=torch.float64)


def reference(layer: ParallelLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor | None]:
    """The same by torch."""
    x, weight = x.detach().requires_grad_(), layer.weight.detach().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().requires_grad_()
    y = F.linear(x, weight.view(-1, WIDTH), None if bias is None else bias.view(-1)).view(TOKENS, *layer.out_shape)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "bias": None if bias is None else bias.grad}


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_shape", OUT_SHAPES, ids=str)
def test_without_main_grad_it_is_torchs_linear(out_shape: int | tuple[int, ...], bias: bool) -> None:
    layer = linear(out_shape, bias)
    x, dy = inputs(layer)
    expected = reference(layer, x, dy)
    y = layer(x)
    y.backward(dy)
    assert close(y, expected["y"])
    assert close(x.grad, expected["x"])
    assert close(layer.weight.grad, expected["weight"])
    assert (layer.bias is None) or close(layer.bias.grad, expected["bias"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_shape", OUT_SHAPES, ids=str)
def test_with_main_grad_gradients_are_added_to_it(out_shape: int | tuple[int, ...], bias: bool) -> None:
    layer = linear(out_shape, bias)
    for parameter in layer.parameters():
        attach_main_grad(parameter, torch.ones_like(parameter))
    x, dy = inputs(layer)
    expected = reference(layer, x, dy)
    for _ in range(2):
        layer(x).backward(dy)
    for name, parameter in layer.named_parameters():
        assert close(parameter.main_grad, 1 + 2 * expected[name]), name
        assert parameter.grad is parameter.main_grad


def test_main_grad_of_a_wider_type_sums_beyond_the_precision_of_the_parameters() -> None:
    """In bfloat16 256 + 1 is 256; in the float32 of the buffer it is 257."""
    layer = linear(dtype=torch.bfloat16)
    for parameter in layer.parameters():
        attach_main_grad(parameter, torch.full_like(parameter, 256.0, dtype=torch.float32))
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    for _ in range(2):
        layer(x).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is None
        assert parameter.main_grad.dtype == torch.float32
        assert (parameter.main_grad == 258.0).all()


def test_frozen_parameters_get_no_gradient() -> None:
    layer = linear().requires_grad_(False)
    x, dy = inputs(layer)
    layer(x).backward(dy)
    assert close(x.grad, reference(layer, x, dy)["x"])
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_an_input_that_needs_no_gradient() -> None:
    layer = linear()
    x, dy = inputs(layer)
    layer(x.detach()).backward(dy)
    assert close(layer.weight.grad, reference(layer, x, dy)["weight"])


def test_gradients_by_finite_differences() -> None:
    layer = linear()
    x, _ = inputs(layer)

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(("weight", "bias"), parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.bias))


def test_the_splits_of_a_fused_projection_keep_their_axes() -> None:
    layer = linear((2, 3, 2), bias=False)
    x, _ = inputs(layer)
    assert close(layer(x)[:, 1, 2], F.linear(x, layer.weight[1, 2]))


# -- hooks

FORWARD = ["gather_input", "gather_weight", "reduce_output"]
BACKWARD = ["gather_grad_output", "gather_weight", "reduce_grad_input", "gather_input"]

#: By what each hook of :class:`Scaling` multiplies. Powers of two, so that products are exact.
FACTORS = {
    "gather_input": 2.0,
    "gather_weight": 4.0,
    "reduce_output": 8.0,
    "gather_grad_output": 16.0,
    "reduce_grad_input": 32.0,
    "reduce_grad_weight": 64.0,
}


class Scaling(Communicator):
    """Multiplies what it is given, as a collective over ranks with equal tensors would, and remembers its calls."""

    def __init__(self, splits_weight: bool = False) -> None:
        self.splits_weight = splits_weight
        self.calls: list[str] = []

    def _scale(self, hook: str, tensor: Tensor) -> Tensor:
        self.calls.append(hook)
        return tensor * FACTORS[hook]

    def gather_input(self, x: Tensor) -> Tensor:
        return self._scale("gather_input", x)

    def gather_weight(self, weight: Tensor) -> Tensor:
        return self._scale("gather_weight", weight)

    def reduce_output(self, y: Tensor) -> Tensor:
        return self._scale("reduce_output", y)

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        return self._scale("gather_grad_output", dy)

    def reduce_grad_input(self, dx: Tensor) -> Tensor:
        return self._scale("reduce_grad_input", dx)

    def reduce_grad_weight(self, dw: Tensor) -> Tensor:
        return self._scale("reduce_grad_weight", dw)


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("splits_weight", [False, True])
def test_each_hook_is_called_in_its_place(splits_weight: bool, with_main_grad: bool) -> None:
    layer = linear()
    if with_main_grad:
        for parameter in layer.parameters():
            attach_main_grad(parameter, torch.zeros_like(parameter))
    layer.communicator = comm = Scaling(splits_weight)
    x, dy = inputs(layer)
    expected, f = reference(layer, x, dy), FACTORS
    y = layer(x)
    assert sorted(comm.calls[:2]) == FORWARD[:2]  # in either order, but before the product
    assert comm.calls[2:] == FORWARD[2:]
    comm.calls.clear()
    y.backward(dy)
    assert sorted(comm.calls) == sorted(BACKWARD + ["reduce_grad_weight"] * splits_weight)
    assert comm.calls[0] == "gather_grad_output"

    product = math.prod(f[hook] for hook in FORWARD) * (expected["y"] - layer.bias)
    assert close(y, product + layer.bias), "the bias is added once, after the ranks' parts are summed"
    assert close(x.grad, f["gather_grad_output"] * f["gather_weight"] * f["reduce_grad_input"] * expected["x"])
    reduced = f["reduce_grad_weight"] if splits_weight else 1.0
    wanted = f["gather_grad_output"] * f["gather_input"] * reduced * expected["weight"]
    assert close(layer.weight.grad, wanted)
    assert close(layer.bias.grad, f["gather_grad_output"] * expected["bias"])


class Halves(Communicator):
    """As two ranks with a half of the weight each, seen from the first; the other half is known."""

    splits_weight = True

    def __init__(self, other: Tensor, dim: int) -> None:
        self.other, self.dim = other, dim

    def gather_weight(self, weight: Tensor) -> Tensor:
        return torch.cat([weight, self.other], self.dim)

    def reduce_grad_weight(self, dw: Tensor) -> Tensor:
        whole = list(self.other.shape)
        whole[self.dim] *= 2
        return dw.view(whole).narrow(self.dim, 0, whole[self.dim] // 2)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_gathered_weight_gives_the_whole_output(dim: int) -> None:
    whole = linear((2, 6), bias=False)
    layer = linear((2, 6), bias=False)
    mine, other = (half.detach().clone() for half in whole.weight.chunk(2, dim))
    layer.weight = torch.nn.Parameter(mine)
    layer.communicator = Halves(other, dim)
    x, dy = inputs(whole)
    y = layer(x)
    assert torch.equal(y, whole(x))
    y.backward(dy)
    assert close(layer.weight.grad, reference(whole, x, dy)["weight"].chunk(2, dim)[0])


def test_two_layers_may_have_different_communicators() -> None:
    scaled, plain = linear(), linear()
    scaled.communicator = Scaling()
    x, _ = inputs(plain)
    assert torch.equal(plain(x), linear()(x))
    assert not torch.equal(scaled(x), plain(x))


# -- something before the layer

BEFORE: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "norm": lambda: ParallelNorm(WIDTH, "rmsnorm", 1e-5),
    "layer norm": lambda: ParallelNorm(WIDTH, "layernorm", 1e-5),
    "swiglu": lambda: swiglu,
}


def _before(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What comes before, and an input for it."""
    with default_dtype(torch.float64):
        before = BEFORE[name]()
    if isinstance(before, torch.nn.Module):
        initialize_parameters(before, seed=3)
    shape = (TOKENS, 2, WIDTH) if name == "swiglu" else (TOKENS, WIDTH)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return before, x


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("with_main_grad", [True, False])
@pytest.mark.parametrize("name", BEFORE)
def test_what_comes_before_is_the_same_bitwise_inside_the_layer_and_outside(
    name: str, with_main_grad: bool, needs_x: bool
) -> None:
    found: list[dict[str, Tensor | None]] = []
    for inside in (True, False):
        layer, (before, x) = linear(), _before(name)
        own = list(before.parameters()) if isinstance(before, torch.nn.Module) else []
        for parameter in [*layer.parameters(), *own]:
            if with_main_grad:
                attach_main_grad(parameter, torch.zeros_like(parameter))
        x.requires_grad_(needs_x)
        y = layer(x, before=before) if inside else layer(before(x))
        y.backward(inputs(layer)[1])
        grads = {str(n): p.grad for n, p in enumerate([*layer.parameters(), *own])}
        found.append({"y": y.detach(), "x": x.grad, **grads})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        other = found[1][key]
        assert (value is None and other is None) or torch.equal(value, other), key


def test_what_comes_before_is_not_kept_for_backward() -> None:
    layer, (norm, x) = linear(), _before("norm")
    kept: list[int] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(x, before=norm)
    assert kept == [x.data_ptr()]
