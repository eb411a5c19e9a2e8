"""Models of users' own, built by registered functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from internlm.config import load_config
from internlm.config.schema import ModelConfig
from internlm.core.parallel import ParallelLinear, place_replicated
from internlm.core.parallel.placement import normal
from internlm.model.families import FAMILIES, FamilyBuilder
from internlm.train.build_model import build_model
from internlm.utils.errors import UserError
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


class Unplaced(nn.Module):
    """A class that a newcomer registers, with parameters that have no placement."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.hidden_size, config.vocab_size)


def _by_keywords(vocab_size: int, hidden_size: int) -> nn.Module:
    return nn.Linear(hidden_size, vocab_size)


def _nothing(config: ModelConfig) -> None:
    place_replicated(Unplaced(config))


MISTAKES: dict[str, tuple[Callable[..., Any], str]] = {
    "parameters without placement": (
        Unplaced,
        r"^model parameter 'head\.weight': .*, or call place_replicated",
    ),
    "no argument": (
        lambda: nn.Linear(1, 1),
        r"^model_type: expected a function of one argument for 'OWN', the config's section model, got \(\)\. Take the ",
    ),
    "values as arguments": (_by_keywords, r"the config's section model, got \(vocab_size: .*, hidden_size: .*\) -> "),
    "no model": (_nothing, r"^model_type: the function of 'OWN' returned NoneType, which is no module\. Return an "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_registered_function_that_does_not_suit(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, message = MISTAKES[mistake]
    config = load_config(TINY, (), 1, "cpu")
    monkeypatch.setitem(MODEL_INITIALIZER._modules, "OWN", function)
    with pytest.raises(UserError, match=message):
        build_model(config, seed=1, model_type="OWN")


def test_a_class_may_be_registered_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY, (), 1, "cpu")
    monkeypatch.delitem(MODEL_INITIALIZER._modules, "OWN", raising=False)
    MODEL_INITIALIZER.register_module("OWN", lambda config: place_replicated(Unplaced(config)))
    assert isinstance(build_model(config, seed=1, model_type="OWN"), Unplaced)


def test_deferred_parameters_have_no_memory() -> None:
    config = load_config(TINY, (), 1, "cpu")
    assert all(parameter.is_meta for parameter in build_model(config, seed=1, deferred=True).parameters())
