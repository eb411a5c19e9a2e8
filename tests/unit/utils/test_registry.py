"""Registries, and the nearest known name."""

from __future__ import annotations

import pytest

from internlm.model.registry import model_initializer, register_model_initializer
from internlm.utils.errors import ConfigError
from internlm.utils.registry import MODEL_INITIALIZER, Registry


class Model:
    """Something to register."""


def test_registering_by_a_call() -> None:
    registry = Registry("model_type")
    assert registry.register_module("MINE", Model) is Model
    assert registry.get_module("MINE") is Model


def test_registering_by_a_decorator() -> None:
    registry = Registry("model_type")

    @registry.register_module(module_name="MINE")
    def build() -> str:
        return "built"

    assert build() == "built"
    assert registry.get_module("MINE") is build


def test_membership_and_iteration_follow_the_order_of_registering() -> None:
    registry = Registry("model_type")
    for name in ("B", "A"):
        registry.register_module(name, Model)
    assert list(registry) == ["B", "A"]
    assert "A" in registry
    assert "C" not in registry


def test_a_taken_name_is_refused_and_keeps_its_meaning() -> None:
    registry = Registry("model_type")
    registry.register_module("MINE", Model)
    with pytest.raises(KeyError, match=r"model_type: 'MINE' is taken by .*Model.*Choose another name"):
        registry.register_module("MINE", Registry)
    assert registry.get_module("MINE") is Model


def test_registering_the_same_again_does_nothing() -> None:
    registry = Registry("model_type")
    registry.register_module("MINE", Model)
    registry.register_module("MINE", Model)
    assert list(registry) == ["MINE"]


@pytest.mark.parametrize(
    "asked",
    ["LAMA2", "llama2", "GPT"],
)
def test_an_unknown_name_is_told_with_the_known_ones(asked: str) -> None:
    registry = Registry("model_type")
    for name in ("LLAMA2", "INTERNLM"):
        registry.register_module(name, Model)
    with pytest.raises(ConfigError) as caught:
        registry.get_module(asked)
    assert str(caught.value) == f"model_type: nothing is registered as {asked!r}. Known: INTERNLM, LLAMA2."


def test_there_is_one_registry_of_models() -> None:
    assert MODEL_INITIALIZER is model_initializer


def test_built_in_models_can_be_registered_again_and_again() -> None:
    register_model_initializer()
    known = list(model_initializer)
    register_model_initializer()
    assert list(model_initializer) == known
    assert {"INTERNLM", "INTERNLM2", "INTERNLM2_PUBLIC", "LLAMA2"} <= set(known)
