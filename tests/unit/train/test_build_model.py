"""Models of users' own, built by registered functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from internlm.config import load_config
from internlm.config.schema import ModelConfig
from internlm.core.parallel import ParallelLinear
from internlm.core.parallel.placement import normal
from internlm.model.families import FAMILIES, FamilyBuilder
from internlm.train.build_model import build_model
from internlm.utils.registry import MODEL_INITIALIZER
from tests.dist.tiny import TINY


def _moved(config: ModelConfig) -> nn.Module:
    return FamilyBuilder(FAMILIES["INTERNLM2"])(config).to("cpu")


def _read(config: ModelConfig) -> nn.Module:
    model = FamilyBuilder(FAMILIES["INTERNLM2"])(config)
    float(next(model.parameters()).sum())
    return model


def _with_buffer(config: ModelConfig) -> nn.Module:
    model = ParallelLinear(config.hidden_size, config.hidden_size, normal(0.02))
    model.register_buffer("snapshot", model.weight.detach().clone())
    return model


@pytest.mark.parametrize("function", [_moved, _read, _with_buffer])
def test_a_function_may_use_the_parameters_that_it_makes(function: object, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY, (), 1, "cpu")
    monkeypatch.setitem(MODEL_INITIALIZER._modules, "OWN", function)
    model = build_model(config, seed=1, model_type="OWN")
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if function is not _with_buffer:
        built_in = build_model(config, seed=1)
        assert all(map(torch.equal, model.parameters(), built_in.parameters()))


def test_deferred_parameters_have_no_memory() -> None:
    config = load_config(TINY, (), 1, "cpu")
    assert all(parameter.is_meta for parameter in build_model(config, seed=1, deferred=True).parameters())
