"""Recompute, dropout and offloading of a decoder: what is kept where changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import internlm.core.parallel.block_forward
import internlm.model.blocks
import internlm.model.decoder
from internlm.core.parallel.dropout import DropoutKey, dropout_key_scope
from internlm.utils.errors import UserError
from tests.unit.model.samples import decoder, gradients, tokens

IDS, LABELS = tokens(2, 12), tokens(2, 12, seed=4)
DROPOUT = {"drop_rate": 0.3}
SETTINGS: list[dict[str, Any]] = [
    {"checkpoint": True},
    {"checkpoint": 0.5},
    {"checkpoint": "selective"},
    {"dropout_selective_checkpoint": False},
    {"dropout_selective_checkpoint": False, "checkpoint": 0.5, "cpu_offloading": 2},
    {"cpu_offloading": 3},
    {"cpu_offloading": 1, "checkpoint": True},
    {"cpu_offloading": 2, "checkpoint": "selective"},
]


def trained(draws: DropoutKey | None = None, **keys: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a model of three layers."""
    model = decoder(num_layers=3, num_kv_attention_heads=2, **keys)
    with dropout_key_scope(draws or DropoutKey(seed=3, step=5)):
        loss = model(IDS, labels=LABELS).loss_sum
    with dropout_key_scope(DropoutKey(seed=99)):  # another micro-batch may be current by then
        loss.backward()
    return loss.detach(), gradients(model)


def assert_same_bits(setting: dict[str, Any], **keys: Any) -> None:
    loss, plain = trained(**keys)
    other_loss, other = trained(**keys, **setting)
    assert torch.equal(loss, other_loss)
    for name, gradient in plain.items():
        assert torch.equal(gradient, other[name]), name


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings_change_no_bit(setting: dict[str, Any]) -> None:
    assert_same_bits(setting, **DROPOUT)


def test_nor_without_dropout() -> None:
    assert_same_bits(
        {"checkpoint": "selective", "cpu_offloading": 2}, norm_type="layernorm", qkv_bias=True, o_bias=True
    )


def test_dropout_is_for_training_alone() -> None:
    plain, dropping = decoder(), decoder(**DROPOUT)
    dropping.eval()
    assert torch.equal(plain(IDS), dropping(IDS))
    dropping.train()
    with dropout_key_scope(DropoutKey()):
        assert not torch.isclose(plain(IDS), dropping(IDS)).any()


def test_every_step_drops_something_else() -> None:
    assert trained(DropoutKey(step=1), **DROPOUT)[0] != trained(DropoutKey(step=2), **DROPOUT)[0]


def test_dropout_is_told_which_micro_batch_it_has() -> None:
    with pytest.raises(UserError, match="Call the model within dropout_key_scope"):
        decoder(**DROPOUT)(IDS)


def test_places_of_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's output, and two in each layer."""
    places: list[tuple[int | None, str]] = []

    class Noted(internlm.model.decoder.Dropout):
        def __call__(self, layer: Any, place: str, x: Tensor) -> Tensor:
            places.append((layer, place))
            return x

    monkeypatch.setattr(internlm.model.decoder, "Dropout", Noted)
    with dropout_key_scope(DropoutKey()):
        assert torch.equal(decoder(**DROPOUT)(IDS), decoder()(IDS))
    layers = [(layer, place) for layer in (0, 1) for place in ("attention", "feed_forward")]
    assert places == [(None, "embedding"), *layers]


def test_attention_runs_again_in_backward_and_the_linears_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"attention": 0, "checkpoint": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(internlm.model.blocks, "attention", counted("attention", internlm.model.blocks.attention))
    monkeypatch.setattr(internlm.core.parallel.block_forward, "checkpoint", counted("checkpoint", checkpoint))
    loss = decoder(num_layers=3, checkpoint="selective")(IDS, labels=LABELS).loss_sum
    assert calls == {"attention": 3, "checkpoint": 0}
    loss.backward()
    assert calls == {"attention": 6, "checkpoint": 0}
