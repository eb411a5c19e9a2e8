"""The parallel linear: its maths against torch's, and the order of its communicator's hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.core.parallel import Communicator, ParallelLinear, ParallelNorm
from internlm.core.parallel.collectives import Pending
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.param_state import attach_main_grad, main_grad_of
from internlm.core.parallel.placement import normal
from internlm.core.parallel.sharding import GroupPosition, Sharding, building
from internlm.ops import gated
from internlm.utils.dtype import default_dtype

Deliver = Callable[[Tensor], "Tensor | None"]
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
    """Draw an input, and a gradient of the output."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    return x, torch.randn(TOKENS, *layer.out_shape, generator=generator, dtype=torch.float64)


def reference(layer: ParallelLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor | None]:
    """Compute output and gradients by torch."""
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
        assert close(main_grad_of(parameter), 1 + 2 * expected[name]), name
        assert parameter.grad is main_grad_of(parameter)


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
        assert main_grad_of(parameter).dtype == torch.float32
        assert (main_grad_of(parameter) == 258.0).all()


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

FORWARD = ["gather_input", "gather_weight", "reduce_output", "release_weight"]
BACKWARD = ["gather_grad_output", "gather_input", "gather_weight backward", "release_weight", "reduce_grad_input"]

#: Factor of each hook of :class:`Scaling`. Powers of two, so that products are exact.
FACTORS = {
    "gather_input": 2.0,
    "gather_weight": 4.0,
    "gather_weight backward": 128.0,
    "reduce_output": 8.0,
    "gather_grad_output": 16.0,
    "reduce_grad_input": 32.0,
    "reduce_grad_weight": 64.0,
}


class LateFactor:
    """Work that multiplies ``tensor`` by ``factor`` when it is waited for."""

    def __init__(self, tensor: Tensor, factor: float) -> None:
        self.tensor, self.factor = tensor, factor

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        self.tensor.mul_(self.factor)


class Scaling(Communicator):
    """Multiplies tensors, as a collective over ranks with equal tensors would, and records its calls.

    A hook that returns a :class:`Pending` multiplies when it is waited for.
    """

    def __init__(self, splits_weight: bool = False, keeps_gathered_input: bool = False) -> None:
        self.splits_weight, self.keeps_gathered_input = splits_weight, keeps_gathered_input
        self.calls: list[str] = []
        self.gathered: list[Tensor] = []
        self.late: Callable[[], object] | None = None

    def _scale(self, hook: str, tensor: Tensor) -> Tensor:
        self.calls.append(hook)
        return tensor * FACTORS[hook]

    def _later(self, hook: str, tensor: Tensor) -> Pending:
        self.calls.append(hook)
        tensor = tensor.clone()
        return Pending(tensor, LateFactor(tensor, FACTORS[hook]))

    def gather_input(self, x: Tensor) -> Pending:
        return self._later("gather_input", x)

    def gather_weight(self, weight: Tensor, backward: bool = False) -> Tensor:
        hook = "gather_weight backward" if backward else "gather_weight"
        self.gathered.append(self._scale(hook, weight.flatten(0, -2)))
        return self.gathered[-1]

    def release_weight(self, whole: Tensor) -> None:
        self.calls.append("release_weight")
        assert whole is self.gathered.pop()

    def reduce_output(self, y: Tensor) -> Tensor:
        return self._scale("reduce_output", y)

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        return self._scale("gather_grad_output", dy)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        return self._later("reduce_grad_input", dx)

    def reduce_grad_weight(self, dw: Tensor, deliver: Deliver) -> Tensor | None:
        return deliver(self._scale("reduce_grad_weight", dw))


class Late(Scaling):
    """Delivers the gradient when the test calls ``late``."""

    def reduce_grad_weight(self, dw: Tensor, deliver: Deliver) -> None:
        scaled = self._scale("reduce_grad_weight", dw)
        self.late = lambda: deliver(scaled)


def with_main_grads(layer: ParallelLinear) -> ParallelLinear:
    for parameter in layer.parameters():
        attach_main_grad(parameter, torch.zeros_like(parameter))
    return layer


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("keeps_gathered_input", [False, True])
@pytest.mark.parametrize("splits_weight", [False, True])
def test_each_hook_is_called_in_its_place(
    splits_weight: bool, keeps_gathered_input: bool, with_main_grad: bool
) -> None:
    layer = with_main_grads(linear()) if with_main_grad else linear()
    layer.communicator = comm = Scaling(splits_weight, keeps_gathered_input)
    x, dy = inputs(layer)
    expected, f = reference(layer, x, dy), FACTORS
    y = layer(x)
    assert sorted(comm.calls[:2]) == FORWARD[:2]  # in either order, but before the product
    assert sorted(comm.calls[2:]) == sorted(FORWARD[2:])
    comm.calls.clear()
    y.backward(dy)
    wanted_calls = [call for call in BACKWARD if call != "gather_input" or not keeps_gathered_input]
    assert comm.calls == wanted_calls + ["reduce_grad_weight"] * splits_weight
    assert comm.gathered == []

    product = f["gather_input"] * f["gather_weight"] * f["reduce_output"] * (expected["y"] - layer.bias)
    assert close(y, product + layer.bias), "the bias is added once, after the sum over ranks"
    assert close(x.grad, f["gather_grad_output"] * f["gather_weight backward"] * f["reduce_grad_input"] * expected["x"])
    reduced = f["reduce_grad_weight"] if splits_weight else 1.0
    wanted = f["gather_grad_output"] * f["gather_input"] * reduced * expected["weight"]
    assert close(layer.weight.grad, wanted)
    assert close(layer.bias.grad, expected["bias"]), "so it sees the gradient of this rank's tokens alone"


def test_a_gradient_may_be_delivered_late() -> None:
    layer = with_main_grads(linear())
    layer.communicator = comm = Late(splits_weight=True)
    x, dy = inputs(layer)
    layer(x).backward(dy)
    assert main_grad_of(layer.weight).eq(0).all()
    assert comm.late is not None
    assert comm.late() is None
    factor = FACTORS["gather_grad_output"] * FACTORS["gather_input"] * FACTORS["reduce_grad_weight"]
    assert close(main_grad_of(layer.weight), factor * reference(layer, x, dy)["weight"])


def test_gradients_that_are_not_needed_are_not_communicated() -> None:
    layer = linear().requires_grad_(False)
    layer.communicator = comm = Scaling(splits_weight=True)
    x, dy = inputs(layer)
    layer(x).backward(dy)
    assert not {"reduce_grad_weight"} & set(comm.calls)
    assert comm.calls.count("gather_input") == 1
    layer = linear()
    layer.communicator = comm = Scaling(splits_weight=True)
    layer(x.detach()).backward(dy)
    assert not {"reduce_grad_input", "gather_weight backward"} & set(comm.calls)


class Halves(Communicator):
    """Simulates the first of two ranks that hold half of the weight each; ``other`` is the second half."""

    splits_weight = True

    def __init__(self, other: Tensor, dim: int) -> None:
        self.other, self.dim = other, dim

    def gather_weight(self, weight: Tensor, backward: bool = False) -> Tensor:
        return torch.cat([weight, self.other], self.dim).flatten(0, -2)

    def reduce_grad_weight(self, dw: Tensor, deliver: Deliver) -> Tensor | None:
        whole = list(self.other.shape)
        whole[self.dim] *= 2
        return deliver(dw.view(whole).narrow(self.dim, 0, whole[self.dim] // 2).contiguous())


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_gathered_weight_gives_the_whole_output(dim: int, with_main_grad: bool) -> None:
    whole = linear((2, 6), bias=False)
    layer = linear((2, 6), bias=False)
    mine, other = (half.detach().clone() for half in whole.weight.chunk(2, dim))
    layer.weight = torch.nn.Parameter(mine)
    layer.communicator = Halves(other, dim)
    if with_main_grad:
        with_main_grads(layer)
    x, dy = inputs(whole)
    y = layer(x)
    assert torch.equal(y, whole(x))
    y.backward(dy)
    assert close(layer.weight.grad, reference(whole, x, dy)["weight"].chunk(2, dim)[0])


def test_a_split_output_has_the_shape_of_the_local_shard() -> None:
    with default_dtype(torch.float64), building(Sharding("mtp", tensor=GroupPosition(1, 3))):
        layer = ParallelLinear(WIDTH, (2, 6), normal(1.0), bias=True, split_axis=1)
    initialize_parameters(layer, seed=1)
    whole = linear((2, 6), bias=False)
    x, _ = inputs(whole)
    assert layer(x).shape == (TOKENS, 2, 2)
    assert close(layer(x), whole(x)[:, :, 2:4])


# -- communicators of layers


def test_two_layers_may_have_different_communicators() -> None:
    scaled, plain = linear(), linear()
    scaled.communicator = Scaling()
    x, _ = inputs(plain)
    assert torch.equal(plain(x), linear()(x))
    assert not torch.equal(scaled(x), plain(x))


# -- a function before the layer

BEFORE: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "norm": lambda: ParallelNorm(WIDTH, "rmsnorm", 1e-5),
    "layer norm": lambda: ParallelNorm(WIDTH, "layernorm", 1e-5),
    "gated": lambda: gated,
}


def _before(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Build a function to apply before the layer, and an input for it."""
    with default_dtype(torch.float64):
        before = BEFORE[name]()
    if isinstance(before, torch.nn.Module):
        initialize_parameters(before, seed=3)
    shape = (TOKENS, 2, WIDTH) if name == "gated" else (TOKENS, WIDTH)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return before, x


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("with_main_grad", [True, False])
@pytest.mark.parametrize("name", BEFORE)
def test_a_function_before_the_layer_gives_the_same_bits_inside_and_outside_of_it(
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


def test_the_output_of_a_function_before_the_layer_is_not_saved_for_backward() -> None:
    layer, (norm, x) = linear(), _before("norm")
    kept: list[int] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(x, before=norm)
    assert kept == [x.data_ptr()]
