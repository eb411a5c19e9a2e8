"""Projections that are not fused: the values are those of fused ones, and the tensors are others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internlm.config.schema import AdamConfig, HybridZeroConfig
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.param_state import placement_of
from internlm.core.parallel.placement import TensorSlice
from internlm.core.parallel.sharding import GroupPosition, Sharding, building
from internlm.eval import generate
from internlm.model.decoder import Decoder
from internlm.model.hf_tensors import hf_tensors, llama_tensors, tensor_shapes
from internlm.model.projections import GATE_UP, QKV
from internlm.solver.optimizer import HybridZeroOptimizer
from tests.unit.model.samples import decoder, gradients, tokens

UNFUSED: dict[str, Any] = {"enable_qkv_fusion": False, "mlp_layer_fusion": False}
BIASES: dict[str, Any] = {"qkv_bias": True, "mlp_bias": True, "num_kv_attention_heads": 2}
#: Families and keys that meet the projections.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("INTERNLM2", {}),
    ("INTERNLM", {**BIASES, "checkpoint": 0.5}),
    ("OLMO2", {**BIASES, "checkpoint": "selective", "cpu_offloading": 1}),
    ("QWEN3", {"num_kv_attention_heads": 1, "head_dim": 12}),
    ("GEMMA", {"residual_in_fp32": True, "mlp_layer_fusion": True}),
]


def fuse(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the tensors of an unfused decoder, under the names of a fused one."""
    fused: dict[str, Tensor] = {}
    for name, value in values.items():
        *outer, linear, parameter = ("", *name.split("."))
        for projection in (QKV, GATE_UP):
            if linear in projection.ranges:
                whole = ".".join((*outer[1:], projection.name, parameter))
                before = [fused[whole]] if whole in fused else []
                fused[whole] = torch.cat([*before, value], projection.axis)
                break
        else:
            fused[name] = value
    return fused


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def pair(family: str, keys: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Decoder, Decoder]:
    """A fused and an unfused decoder, whose biases and norms are random and equal."""
    one, other = decoder(family, dtype, **keys), decoder(family, dtype, **{**UNFUSED, **keys})
    source = values_of(one)
    with torch.no_grad():
        for row, mine in zip(hf_tensors(other.spec), hf_tensors(one.spec), strict=True):
            row.place(mine.of(source[mine.ours]), other.get_parameter(row.ours))
    return one, other


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize(("family", "keys"), CASES, ids=str)
def test_initial_values_are_the_same_bits(family: str, keys: dict[str, Any]) -> None:
    models = [decoder(family, **keys), decoder(family, **{**UNFUSED, **keys})]
    for model in models:
        initialize_parameters(model, seed=7)
    assert_same(values_of(models[0]), fuse(values_of(models[1])))


@pytest.mark.parametrize("mode", ["mtp", "isp"])
def test_a_rank_draws_its_shard_of_them(mode: Any) -> None:
    """Also where isp cuts rows that do not divide into equal shards."""
    whole = values_of(initialized(decoder(**UNFUSED, num_kv_attention_heads=2, head_dim=6)))
    ranks = 2 if mode == "mtp" else 5
    for rank in range(ranks):
        at = GroupPosition(rank, ranks)
        with building(Sharding(mode, at, at)):
            model = initialized(decoder(**UNFUSED, num_kv_attention_heads=2, head_dim=6))
        for name, parameter in model.named_parameters():
            own = placement_of(parameter).shard_of(whole[name]).flatten()
            flat = parameter.detach().flatten()
            assert torch.equal(flat[: own.numel()], own), name
            assert not flat[own.numel() :].any()


def initialized(model: Decoder) -> Decoder:
    initialize_parameters(model, seed=7)
    return model


@pytest.mark.parametrize(("family", "keys"), CASES, ids=str)
def test_losses_and_gradients_are_the_same(family: str, keys: dict[str, Any]) -> None:
    ids, labels = tokens(2, 24), tokens(2, 24, seed=4)
    one, other = pair(family, keys)
    losses = [model(ids, labels=labels).loss_sum for model in (one, other)]
    assert (losses[0] - losses[1]).abs() <= 1e-13 * losses[0]
    for loss in losses:
        loss.backward()
    assert_same(gradients(one), fuse(gradients(other)), 1e-11)


def test_training_is_the_same() -> None:
    losses: list[list[float]] = []
    for model in pair("QWEN2", BIASES):
        optimizer = HybridZeroOptimizer(model, AdamConfig(lr=0.1), HybridZeroConfig(clip_grad_norm=1.0))
        losses.append([])
        for _ in range(4):
            optimizer.begin_step(1)
            loss = model(tokens(2, 24), labels=tokens(2, 24, seed=4)).loss_sum
            loss.backward()
            optimizer.step(lr=0.01, beta2=0.95)
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][3] < 0.99 * losses[0][0]


def test_generated_tokens_are_the_same() -> None:
    prompts, found = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3]], []
    for model in pair("QWEN3", BIASES):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)  # so that each position has another token
        found.append(generate(model, prompts, 24, temperature=0))
    assert found[0] == found[1]
    assert min(len(set(ids)) for ids in found[0]) > 8


@pytest.mark.parametrize("table", [hf_tensors, llama_tensors])
def test_tables_of_tensors_have_the_same_contents(table: Any) -> None:
    for keys in (UNFUSED, {"enable_qkv_fusion": False}):
        one, other = pair("LLAMA2", {**keys, "num_kv_attention_heads": 2, "qk_interleaved": False})
        shapes, values = tensor_shapes(other.spec), values_of(other)
        assert shapes == {name: tuple(value.shape) for name, value in values.items()}
        rows = list(table(other.spec))
        assert {row.ours for row in rows} == values.keys()
        for mine, theirs in zip(table(one.spec), rows, strict=True):
            found = theirs.of(values[theirs.ours])
            assert mine.name == theirs.name
            assert found.shape == theirs.shape(shapes[theirs.ours])
            assert torch.equal(mine.of(values_of(one)[mine.ours]), found)


def test_names_are_those_that_were_published() -> None:
    names = {name.removeprefix("layers.0.") for name in decoder(**UNFUSED).state_dict() if name.startswith("layers.0.")}
    linears = {*(f"attention.w{x}" for x in "qkvo"), *(f"feed_forward.w{x}" for x in "123")}
    assert names == {f"{linear}.weight" for linear in linears} | {"attention_norm.weight", "ffn_norm.weight"}


def test_a_slice_of_a_part_is_a_slice_of_the_fused_tensor() -> None:
    fused = placement_of(decoder(**UNFUSED).layers["1"].attention.wk.weight).init.fused
    assert fused is not None
    assert fused.name_of("layers.1.attention.wk.weight") == "layers.1.attention.wqkv.weight"
    assert fused.shape_of((4, 1, 8, 32)) == (4, 3, 8, 32)
    assert fused.slice_of(TensorSlice((2, 0, 3, 0), (1, 1, 2, 32), 5, 69)) == TensorSlice(
        (2, 1, 3, 0), (1, 1, 2, 32), 5, 69
    )
