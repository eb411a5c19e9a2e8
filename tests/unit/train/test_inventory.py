"""The inventory of a model on the meta device is that of the model that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from internlm.config import Config, load_config
from internlm.config.schema import ModelConfig
from internlm.core.parallel import place_replicated
from internlm.core.parallel.sharding import GroupPosition, Sharding
from internlm.costs import NoCostFormulaError, expected_traffic, memory_plan
from internlm.costs.memory_plan import ACTIVATIONS, GATHER
from internlm.costs.stages import stage_layers_of
from internlm.train.build_model import build_model
from internlm.train.inventory import build_inventory, inventory_of
from internlm.utils.registry import MODEL_INITIALIZER

KEYS: dict[str, Any] = dict(
    model_type="INTERNLM",
    model=dict(num_layers=5, hidden_size=32, num_attention_heads=4, vocab_size=67, dtype="torch.bfloat16"),
    data=dict(seq_len=16, micro_bsz=1, total_steps=1),
    adam=dict(lr=1e-4),
)


def resolved(world: int, *overrides: str) -> Config:
    return load_config(KEYS, overrides, world, "cpu")


def split(mode: str) -> tuple[str, ...]:
    sizes = "parallel.tensor.size=2", "model.embed_split_hidden=False"
    return (f"parallel.tensor.mode={mode}", *sizes, *(["parallel.weight.size=4"] if mode == "isp" else []))


@pytest.mark.parametrize("mode", ["mtp", "msp", "fsp", "isp"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("use_fp32_norm=True", "model.norm_type=layernorm"),
        ("parallel.pipeline.size=2", "data.micro_num=2", "model.tie_word_embeddings=True"),
    ],
    ids=["fp32 norms", "tied ends"],
)
def test_every_rank_holds_what_the_inventory_lists(mode: str, overrides: tuple[str, ...]) -> None:
    config = resolved(8, *split(mode), *overrides)
    weight_ranks = config.parallel.weight.size
    for stage in range(config.parallel.pipeline.size):
        listed = build_inventory(config, 8, stage)
        for rank in range(max(2, weight_ranks)):
            sharding = Sharding(mode, GroupPosition(rank % 2, 2), GroupPosition(rank % weight_ranks, weight_ranks))
            model = build_model(config, 0, sharding=sharding, stage_layers=stage_layers_of(config, stage))
            built = inventory_of(model, config, 8, stage)
            assert [shard.numel for shard in listed.shards] == [p.numel() for p in model.parameters()]
            assert listed.param_groups.keys() == built.param_groups.keys()
            for a, b in zip(listed.shards, built.shards, strict=True):
                assert (a.name, a.dtype, a.rows, a.width, a.block) == (b.name, b.dtype, b.rows, b.width, b.block)
                assert a.placement.partial_over is b.placement.partial_over


def test_blocks_are_the_units_that_the_model_declares() -> None:
    shards = build_inventory(resolved(1), 1).shards
    assert {shard.block for shard in shards} == {"", *(f"layers.{index}" for index in range(5))}
    assert [shard.name for shard in shards if not shard.block] == ["embedding.weight", "norm.weight", "output.weight"]


def test_a_stage_of_a_large_model_on_thousands_of_ranks_takes_no_memory_and_no_processes() -> None:
    sizes = "model.num_layers=80", "model.hidden_size=8192", "model.num_attention_heads=64", "model.vocab_size=32000"
    layout = "parallel.tensor.size=8", "parallel.pipeline.size=8", "data.micro_num=16"
    config = resolved(4096, *sizes, *layout)
    inventory = build_inventory(config, 4096, 3)
    assert sum(shard.numel for shard in inventory.shards) == pytest.approx(10 * 12 * 8192**2 / 8, rel=0.1)
    plan = memory_plan(inventory)
    assert plan["parameters"] == pytest.approx(2 * sum(shard.numel for shard in inventory.shards), rel=1e-3)
    assert expected_traffic(inventory)


def test_the_same_config_is_built_once() -> None:
    assert build_inventory(resolved(1), 1) is build_inventory(resolved(1), 1)
    assert build_inventory(resolved(1), 1) is not build_inventory(resolved(1, "model.num_layers=4"), 1)


# -- users' own models


class Own(nn.Module):
    """Two linears, the second of which is frozen; a value is drawn while it is built."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden_size, 8), nn.Linear(8, hidden_size)
        self.second.requires_grad_(False)
        self.scale = float(torch.rand(1, device="cpu"))


@MODEL_INITIALIZER.register_module(module_name="OWN")
def build_own(model: ModelConfig) -> nn.Module:
    return place_replicated(Own(model.hidden_size))


@MODEL_INITIALIZER.register_module(module_name="READS VALUES")
def build_reading(model: ModelConfig) -> nn.Module:
    own = Own(model.hidden_size)
    own.scale = own.first.weight.norm().item()  # meta tensors have no values
    return place_replicated(own)


def test_an_own_model_has_a_plan_of_all_that_the_optimizer_holds() -> None:
    inventory = build_inventory(resolved(1, "model_type=OWN"), 1)
    plan = memory_plan(inventory)
    trained, frozen = 32 * 8 + 8, 8 * 32 + 32
    padded = -(-trained // 64) * 64
    assert plan["parameters"] == 2 * (padded + frozen)
    assert plan["gradients"] == plan["optimizer: exp_avg"] == 4 * padded
    assert {ACTIVATIONS, GATHER}.isdisjoint(plan)


def test_an_own_model_has_no_formula_for_its_traffic() -> None:
    with pytest.raises(NoCostFormulaError, match="no cost formula for 'OWN', which does not build the decoder"):
        expected_traffic(build_inventory(resolved(1, "model_type=OWN"), 1))


def test_random_values_do_not_depend_on_whether_a_plan_was_made() -> None:
    state = torch.get_rng_state()
    build_inventory(resolved(1, "model_type=OWN", "model.hidden_size=64"), 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("READS VALUES", "cannot be built on the meta device: "), ("OWM", "is not registered. Known: ")],
)
def test_a_model_that_cannot_be_built_has_no_formula(model_type: str, message: str) -> None:
    config = resolved(1).model_copy(update={"model_type": model_type})
    with pytest.raises(NoCostFormulaError) as caught:
        build_inventory(config, 1)
    assert message in str(caught.value)
