"""Compiled blocks on one process: what they compute, how often they are compiled, and what can go wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from internlm.config import load_config
from internlm.core.parallel import ParallelLinear, place_replicated
from internlm.core.parallel.blocks import declared_blocks
from internlm.core.parallel.compiled_linear import LinearHandle
from internlm.core.parallel.param_state import attach_main_grad, main_grad_of
from internlm.core.parallel.placement import normal
from internlm.core.parallel.products import deferring
from internlm.train.build_model import build_model
from internlm.train.compile import Compiled, compile_blocks, compiled_so_far
from internlm.utils.errors import ConfigError, UserError

TINY = {
    "model_type": "INTERNLM2",
    "data": {"seq_len": 32, "micro_bsz": 1, "total_steps": 1},
    "adam": {"lr": 1e-3},
    "model": {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "vocab_size": 64,
        "multiple_of": 16,
        "dtype": "torch.float64",
    },
}
ONE_BREAK = Compiled(2, {"attention depends on the sequence boundaries": 1})


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _empty_cache() -> Iterator[None]:
    """Start with an empty cache of compiled graphs."""
    with fresh_cache():
        yield


def build(*overrides: str, main_grads: bool = True) -> nn.Module:
    model = build_model(load_config(TINY, overrides, 1, "cpu"), seed=0)
    for parameter in model.parameters():
        if main_grads:
            attach_main_grad(parameter, torch.zeros_like(parameter))
    return model


def batch(pieces: Sequence[int]) -> dict[str, Tensor]:
    ids = torch.randint(64, (sum(pieces),), generator=torch.Generator().manual_seed(len(pieces)))
    bounds = torch.tensor([0, *pieces], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"input_ids": ids, "cu_seqlens": bounds, "labels": ids.roll(-1)}


def step(model: nn.Module, pieces: Sequence[int]) -> dict[str, Tensor]:
    """The loss, and the sum of the gradients so far."""
    loss = model(**batch(pieces)).loss_sum
    loss.backward()
    return {"loss": loss.detach(), **{name: each.grad.clone() for name, each in model.named_parameters()}}


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=1e-12, atol=1e-12), name


@pytest.mark.wide
def test_other_pieces_are_nothing_to_compile_for() -> None:
    model, compiled = build(), build()
    compile_blocks(compiled)
    for pieces in ([32], [16, 16], [8, 24], [3, 5, 7, 9, 8], [31, 1], [1] * 32):
        assert_close(step(compiled, pieces), step(model, pieces))
        assert compiled_so_far() == ONE_BREAK


@pytest.mark.wide
def test_all_numbers_of_tokens_need_one_more_compilation() -> None:
    model, compiled = build(), build()
    compile_blocks(compiled)
    for pieces, graphs in (([32], 2), ([20, 20], 4), ([7, 40], 4), ([64], 4)):
        assert_close(step(compiled, pieces), step(model, pieces))
        assert compiled_so_far().graphs == graphs


@pytest.mark.wide
@pytest.mark.usefixtures("_empty_cache")
def test_without_main_grad_and_with_frozen_parameters() -> None:
    """Only the first weight requires a gradient, so that of its input is not computed."""
    models = [build("model.num_layers=1", main_grads=False) for _ in range(2)]
    compile_blocks(models[1])
    for model in models:
        model.requires_grad_(False)
        first = model.layers["0"].attention.wqkv.weight.requires_grad_()
        for _ in range(2):
            model(**batch([16, 16])).loss_sum.backward()
    expected = models[0].layers["0"].attention.wqkv.weight.grad
    assert torch.allclose(first.grad, expected, rtol=1e-12, atol=1e-12)


def test_names_stay_and_hooks_of_a_block_run() -> None:
    model, called = build("model.num_layers=1"), []
    names = list(model.state_dict())
    compile_blocks(model)
    for block in declared_blocks(model).values():
        block.register_forward_pre_hook(lambda *_: called.append(1) or None)
    step(model, [8, 8])
    assert list(model.state_dict()) == names
    assert called == [1]
    assert compiled_so_far() == ONE_BREAK


def test_a_copy_of_a_linear_is_compiled_for_itself() -> None:
    linear = ParallelLinear(4, 4, normal(1.0))
    copied = copy.deepcopy(linear)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        copied.weight.fill_(2.0)
        assert torch.compile(copied)(torch.ones(1, 4)).tolist() == [[8.0] * 4]


def test_what_is_put_off_has_factors_of_its_own() -> None:
    """The compiler gives the memory of an operator's arguments to others, once the operator is done."""
    linear = ParallelLinear(4, 3, normal(1.0))
    attach_main_grad(linear.weight, torch.zeros_like(linear.weight))
    dy, x = torch.randn(5, 3), torch.randn(5, 4)
    expected = dy.t() @ x
    with deferring() as tasks:
        torch.ops.internlm.linear_backward(dy, x, LinearHandle((linear,)), 5, False)
    for given in (dy, x):
        given.fill_(torch.nan)
    for task in tasks:
        task()
    assert torch.allclose(main_grad_of(linear.weight), expected)


def test_a_model_without_blocks() -> None:
    with pytest.raises(ConfigError, match=r"model\.compile: Linear declares no blocks"):
        compile_blocks(place_replicated(nn.Linear(2, 2)))


@pytest.mark.usefixtures("_empty_cache")
def test_no_compiler_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("model.num_layers=1")
    compile_blocks(model)
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError) as caught:
        step(model, [8, 8])
    assert len(str(caught.value).splitlines()) == 1
    assert "model.compile: a block cannot be compiled" in str(caught.value)
    assert "compiler" in str(caught.value)


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ("model.checkpoint=selective", r"model\.checkpoint: 'selective' has no effect"),
        ("parallel.zero1.fsdp=True", r"parallel\.zero1\.fsdp: True cannot be combined with model\.compile = True"),
    ],
)
def test_what_it_does_not_go_with(other: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        build("model.compile=True", other)
