"""Deferred weight gradients equal those that are computed at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.config.schema import ModelConfig
from internlm.core.parallel import ParallelLinear, ParallelNorm
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.param_state import attach_main_grad, main_grad_of
from internlm.core.parallel.placement import normal
from internlm.core.parallel.products import deferring
from internlm.model.families import FAMILIES, FamilyBuilder
from internlm.ops import gated
from internlm.utils.dtype import default_dtype
from tests.unit.model.samples import decoder, tokens

WIDTH = 4


class TwoLinears(nn.Module):
    """A linear after a norm, and one after an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ParallelNorm(WIDTH, "rmsnorm", 1e-5)
        self.up = ParallelLinear(WIDTH, (2, 6), normal(1.0), bias=True)
        self.down = ParallelLinear(6, WIDTH, normal(1.0), bias=True, role="row")

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, WIDTH]"""
        y: Tensor = self.down(self.up(x, before=self.norm), before=gated)
        return y


def two_linears(dtype: torch.dtype = torch.float32, wide: bool = False) -> TwoLinears:
    with default_dtype(dtype):
        model = TwoLinears()
    initialize_parameters(model, seed=1)
    for parameter in model.parameters():
        attach_main_grad(parameter, torch.ones_like(parameter, dtype=torch.float32 if wide else dtype))
    return model


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def main_grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: main_grad_of(parameter).clone() for name, parameter in model.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_gradients_are_bitwise_the_same_once_the_tasks_have_run(dtype: torch.dtype, wide: bool) -> None:
    at_once, later = two_linears(dtype, wide), two_linears(dtype, wide)
    x, other = inputs(dtype), inputs(dtype)
    at_once(x).sum().backward()
    with deferring() as tasks:
        later(other).sum().backward()
    wanted, found = main_grads(at_once), main_grads(later)
    assert torch.equal(other.grad, x.grad)  # dx, for which the previous stage waits, is complete
    weights = {"up.weight", "down.weight"}
    assert all((found[name] == 1).all() for name in weights)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted.keys() - weights)
    for task in tasks:
        task()
    assert_equal(main_grads(later), wanted)


QKV, GATE_UP = ("wq", "wk", "wv"), ("w1", "w3")


@pytest.mark.parametrize("is_fused", [True, False])
def test_deferred_gradients_of_a_whole_model(is_fused: bool) -> None:
    """All linears but the head, whose gradient is computed with the loss; those with one input by one task."""
    models = [decoder(enable_qkv_fusion=is_fused, mlp_layer_fusion=is_fused) for _ in range(2)]
    for model in models:
        for parameter in model.parameters():
            attach_main_grad(parameter, torch.zeros_like(parameter))
    losses = [model(tokens(2, 8), labels=tokens(2, 8, seed=4)).loss_sum for model in models]
    losses[0].backward()
    with deferring() as tasks:
        losses[1].backward()
    assert len(tasks) == 8
    untouched = {name for name, grad in main_grads(models[1]).items() if not grad.any()}
    attention, feed_forward = (("wqkv",), ("w13",)) if is_fused else (QKV, GATE_UP)
    linears = [*(f"attention.{name}" for name in (*attention, "wo"))]
    linears += [f"feed_forward.{name}" for name in (*feed_forward, "w2")]
    assert untouched == {f"layers.{index}.{name}.weight" for index in range(2) for name in linears}
    for task in tasks:
        task()
    assert_equal(main_grads(models[1]), main_grads(models[0]))


def test_without_a_main_gradient_nothing_is_deferred() -> None:
    layer = ParallelLinear(WIDTH, 3, normal(1.0))
    initialize_parameters(layer, seed=1)
    with deferring() as tasks:
        layer(inputs()).sum().backward()
    assert tasks == []
    assert layer.weight.grad.any()


def test_a_frozen_weight_leaves_no_task() -> None:
    model = two_linears()
    model.up.weight.requires_grad_(False)
    with deferring() as tasks:
        model(inputs()).sum().backward()
    assert len(tasks) == 1
    tasks[0]()
    assert (main_grad_of(model.up.weight) == 1).all()
    assert (main_grad_of(model.down.weight) != 1).any()


def test_tasks_belong_to_the_innermost_block() -> None:
    model = two_linears()
    with deferring() as outer:
        model(inputs()).sum().backward()
        with deferring() as inner:
            model(inputs()).sum().backward()
        model(inputs()).sum().backward()
    before = main_grads(model)
    model(inputs()).sum().backward()
    assert (len(outer), len(inner)) == (4, 2)
    assert not torch.equal(main_grads(model)["up.weight"], before["up.weight"])  # at once again


def test_an_error_ends_the_block() -> None:
    model = two_linears()
    with pytest.raises(ValueError, match="broken off"), deferring():
        raise ValueError("broken off")
    model(inputs()).sum().backward()
    assert (main_grad_of(model.up.weight) != 1).any()


class Calls(TorchDispatchMode):
    """Within it, ``count`` has the number of calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def test_a_device_computes_one_product_per_linear_and_role_at_the_sizes_of_a_7b_model() -> None:
    layers, linears, tokens, chunk = 2, 4, 4096, 2048
    config = ModelConfig(
        num_layers=layers, hidden_size=4096, num_attention_heads=32, num_kv_attention_heads=8, vocab_size=92544
    )
    # Tensors without memory, which are treated like those of an accelerator.
    with torch.device("meta"), default_dtype(torch.bfloat16):
        model = FamilyBuilder(FAMILIES["INTERNLM2"])(config)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
    for parameter in model.parameters():
        attach_main_grad(parameter, torch.empty_like(parameter, dtype=torch.float32))
    with Calls() as calls:
        model(ids, labels=ids).loss_sum.backward()
    assert calls.count["mm.default"] == 2 * layers * linears + 1  # outputs and input gradients
    assert calls.count["mm.dtype"] == tokens // chunk  # logits in float32
    assert calls.count["addmm.dtype_out"] == layers * linears + 1  # weight gradients, added to those in float32
