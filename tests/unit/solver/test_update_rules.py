"""Update rules against torch's optimizers, or the formula; and who is trained by which."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.config.schema import AdamConfig, HybridZeroConfig, OptimizerConfig, ParamGroupConfig
from internlm.config.schema.optim import OptimizerName
from internlm.core.parallel import place_replicated
from internlm.core.parallel.param_state import add_grad, main_grad_of, named_parameters
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.solver.optimizer.muon import orthogonal
from internlm.solver.optimizer.param_groups import build_param_groups
from internlm.solver.optimizer.zero_optimizer import UPDATE_RULES
from internlm.utils.errors import ConfigError
from tests.unit.model.samples import decoder

ADAM = AdamConfig(lr=1e-2, weight_decay=0.1, adam_beta1=0.8)
STEPS = 4


class Matrices(nn.Module):
    """Wide, tall and square."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = (8, 24), (40, 16), (16, 16)
        self.weights = nn.ParameterList([torch.randn(shape, generator=generator) for shape in shapes])
        place_replicated(self)


def gradients(model: Matrices, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(weight.shape, generator=generator) for weight in model.weights]


def trained(**options: Any) -> Matrices:
    model = Matrices()
    config = OptimizerConfig(param_groups=(ParamGroupConfig(pattern="", **options.pop("group")),), **options)
    optimizer = HybridZeroOptimizer(model, ADAM, HybridZeroConfig(), optimizer=config)
    for step in range(STEPS):
        optimizer.zero_grad()
        for weight, gradient in zip(model.weights, gradients(model, step), strict=True):
            add_grad(weight, gradient)
        optimizer.step(1e-2, 0.9)
    return model


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(nesterov: bool, adjust_lr: str) -> None:
    """Which computes the products in bfloat16."""
    ours = trained(group={"type": "Muon"}, nesterov=nesterov, adjust_lr=adjust_lr, momentum=0.9)
    theirs = Matrices()
    start = [weight.detach().clone() for weight in theirs.weights]
    muon = torch.optim.Muon(
        theirs.weights, lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust_lr
    )
    for step in range(STEPS):
        for weight, gradient in zip(theirs.weights, gradients(theirs, step), strict=True):
            weight.grad = gradient
        muon.step()
    for one, other, before in zip(ours.weights, theirs.weights, start, strict=True):
        assert (one - other).norm() < 0.03 * (other - before).norm()


def test_muon_may_compute_its_products_in_bfloat16() -> None:
    """The update is then rounded to it, and near to that of float32."""
    matrix = Matrices().weights[0].detach()
    rounded, exact = orthogonal(matrix, 5, "torch.bfloat16"), orthogonal(matrix, 5)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 1e-3 < ((rounded - exact).norm() / exact.norm()).item() < 3e-2
    half, whole = (trained(group={"type": "Muon"}, ns_dtype=dtype) for dtype in ("torch.bfloat16", None))
    for one, other in zip(half.weights, whole.weights, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.03 * other.norm()


class _Precisions(TorchDispatchMode):
    """Record of the precision in which each product may be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def test_tf32_is_for_the_products_of_muon_alone() -> None:
    """On the CPU, it is float32."""
    matrix = Matrices().weights[1].detach()
    with _Precisions() as precisions:
        allowed = orthogonal(matrix, 5, "torch.tf32")
        exact = orthogonal(matrix, 5)
    assert torch.equal(allowed, exact)
    assert precisions.seen == 15 * ["high"] + 15 * ["highest"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shape", [(8, 24), (40, 16), (16, 16), (1, 5)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values come near to 1, singular vectors stay."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.t() @ orthogonal(matrix, steps=6) @ v.t()
    assert (values - values.diag().diag()).abs().max() < 1e-9
    assert 0.6 < values.diag().min() <= values.diag().max() < 1.3


def test_adamw_with_a_factor_on_its_learning_rate_is_torchs() -> None:
    ours, plain = trained(group={"type": "AdamW", "weight_decay": 0.2, "lr_scale": 0.5}), Matrices()
    adamw = torch.optim.AdamW(plain.weights, lr=5e-3, betas=(0.8, 0.9), eps=ADAM.adam_eps, weight_decay=0.2)
    for step in range(STEPS):
        for weight, gradient in zip(plain.weights, gradients(plain, step), strict=True):
            weight.grad = gradient
        adamw.step()
    for one, other in zip(ours.weights, plain.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_lion_is_its_formula() -> None:
    ours, plain = trained(group={"type": "Lion", "weight_decay": 0.2}), Matrices()
    momenta = [torch.zeros_like(weight) for weight in plain.weights]
    with torch.no_grad():
        for step in range(STEPS):
            for weight, momentum, gradient in zip(plain.weights, momenta, gradients(plain, step), strict=True):
                direction = torch.sign(0.8 * momentum + 0.2 * gradient)
                weight.sub_(1e-2 * (direction + 0.2 * weight))
                momentum.mul_(0.9).add_(gradient, alpha=0.1)
    for one, other in zip(ours.weights, plain.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_learning_rate_of_ones_own() -> None:
    """A factor, as a lower learning rate for all would be."""
    half, whole, none = (trained(group={"type": "Lion", "weight_decay": 0.0, "lr_scale": x}) for x in (0.5, 1.0, 0.0))
    for slow, fast, start in zip(half.weights, whole.weights, none.weights, strict=True):
        torch.testing.assert_close(slow - start, (fast - start) / 2)
        assert not torch.equal(fast, start)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_clipping_of_two_types(first: torch.dtype) -> None:
    """All are divided by the same, once."""
    other = torch.float64 if first == torch.float32 else torch.float32
    model = Matrices()
    for number, weight in enumerate(model.weights):
        weight.data = weight.data.to(other if number else first)
    optimizer = HybridZeroOptimizer(model, ADAM, HybridZeroConfig(clip_grad_norm=0.5))
    for weight in model.weights:
        main_grad_of(weight).fill_(2.0)
    norm = optimizer.step(1e-2, 0.9).grad_norm
    for flat in optimizer.groups:
        moment = optimizer.state_of(flat)["exp_avg"][0].item()
        assert moment == pytest.approx((1 - ADAM.adam_beta1) * 2.0 * 0.5 / norm, rel=1e-5)


# -- who is trained by which


def rules(**options: Any) -> dict[str, tuple[str, float, float]]:
    """Rule, weight decay and factor on the learning rate, by name of the parameter."""
    model = decoder("INTERNLM", num_layers=1)
    adam, optimizer = AdamConfig(lr=1.0, weight_decay=0.1), OptimizerConfig(**options)
    groups = build_param_groups(named_parameters(model), adam, optimizer)
    return {
        named.name: (k.rule, k.weight_decay, k.lr_scale) for k, parameters in groups.items() for named in parameters
    }


def test_without_a_word_all_is_adamw() -> None:
    assert set(rules().values()) == {("AdamW", 0.1, 1.0)}


def test_muon_has_the_matrices_of_hidden_layers() -> None:
    names = [name for name, (rule, *_) in rules(type="Muon").items() if rule == "Muon"]
    assert sorted(names) == sorted(
        f"layers.0.{each}.weight" for each in ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")
    )


def test_the_first_pattern_that_matches_counts() -> None:
    groups = (
        ParamGroupConfig(pattern=r"wo\.weight$", type="Lion", weight_decay=0.0),
        ParamGroupConfig(pattern="attention", lr_scale=0.5),
    )
    found = rules(param_groups=groups)
    assert found["layers.0.attention.wo.weight"] == ("Lion", 0.0, 1.0)
    assert found["layers.0.attention.wqkv.weight"] == ("AdamW", 0.1, 0.5)
    assert found["layers.0.attention_norm.weight"] == ("AdamW", 0.1, 0.5)
    assert found["output.weight"] == ("AdamW", 0.1, 1.0)


def test_a_vector_can_not_be_made_orthogonal() -> None:
    expected = (
        "optimizer.param_groups: pattern 'norm' assigns Muon to 'layers.0.attention_norm.weight': expected a matrix, "
        "got shape ["
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        rules(param_groups=(ParamGroupConfig(pattern="norm", type="Muon"),))


def test_every_name_of_an_optimizer_has_an_update_rule() -> None:
    assert set(UPDATE_RULES) == set(get_args(OptimizerName))
