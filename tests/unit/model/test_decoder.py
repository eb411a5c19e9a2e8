"""The decoder: packing, recompute, tied embeddings, loss."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.model.decoder import Block, Decoder
from tests.unit.model.samples import VOCAB, decoder, gradients, tokens

GQA = {"num_kv_attention_heads": 2}
LENGTHS = [5, 1, 9, 3]
BOUNDS = torch.tensor([0, 5, 6, 15, 18])


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def trained(model: Decoder, labels: Tensor, ids: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of the summed loss."""
    model.zero_grad()
    model(ids, labels=labels, **inputs).loss_sum.backward()
    return gradients(model)


# -- packing


@pytest.mark.parametrize("family", ["INTERNLM", "INTERNLM2"])
def test_pieces_of_a_row_do_not_see_each_other(family: str) -> None:
    model, ids = decoder(family), tokens(18)
    packed = model(ids, cu_seqlens=BOUNDS)
    alone = torch.cat([model(piece[None])[0] for piece in ids.split(LENGTHS)])
    assert packed.shape == (18, VOCAB)
    assert close(packed, alone)


def test_gradients_of_a_packed_row_are_the_sum_over_its_pieces() -> None:
    model, ids, labels = decoder(**GQA), tokens(18), tokens(18, seed=4)
    packed = trained(model, labels, ids, cu_seqlens=BOUNDS)
    pieces = zip(ids.split(LENGTHS), labels.split(LENGTHS), strict=True)
    alone = [trained(model, label[None], piece[None]) for piece, label in pieces]
    for name, grad in packed.items():
        assert close(grad, torch.stack([one[name] for one in alone]).sum(0)), name


def test_a_row_of_equal_pieces_is_a_batch() -> None:
    model, ids = decoder(), tokens(3, 6)
    packed = model(ids.flatten(), cu_seqlens=torch.arange(0, 19, 6))
    assert close(model(ids), packed.view(3, 6, VOCAB))


@pytest.mark.parametrize("cu_seqlens", [BOUNDS, torch.tensor([0, 0, 5, 6, 6, 15, 18, 18]), BOUNDS.int()], ids=str)
def test_positions_count_from_the_start_of_each_piece_by_default(cu_seqlens: Tensor) -> None:
    """Empty pieces make no difference."""
    model, ids = decoder(), tokens(18)
    indexes = torch.cat([torch.arange(length) for length in LENGTHS])
    assert torch.equal(model(ids, cu_seqlens=cu_seqlens), model(ids, cu_seqlens=BOUNDS, indexes=indexes))


def test_given_positions_are_used() -> None:
    """Rotary positions are relative within a piece, so a shift of all of them changes nothing but rounding."""
    model, ids = decoder(), tokens(18)
    indexes = torch.cat([torch.arange(length) for length in LENGTHS])
    plain = model(ids, cu_seqlens=BOUNDS)
    assert close(model(ids, cu_seqlens=BOUNDS, indexes=indexes + 7), plain)
    assert not close(model(ids, cu_seqlens=BOUNDS, indexes=indexes * 2), plain)


def test_a_token_sees_none_that_follow() -> None:
    model, ids = decoder(), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % VOCAB
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:7], after[:7])
    assert not torch.isclose(before[7:], after[7:]).all(1).any()


@pytest.mark.parametrize("backend", ["sdpa", "blocked", "reference"])
def test_attention_kernels_agree(backend: str) -> None:
    ids = tokens(18)
    one, other = decoder(attention_backend=backend, **GQA), decoder(**GQA)
    assert close(one(ids, cu_seqlens=BOUNDS), other(ids, cu_seqlens=BOUNDS))


# -- recompute


@pytest.mark.parametrize(("checkpoint", "recomputed"), [(True, 4), (1.0, 4), (0.5, 2), (0.3, 1), (0.0, 0), (False, 0)])
def test_recompute_leaves_gradients_bitwise_equal(checkpoint: bool | float, recomputed: int) -> None:
    """And runs the first so many layers a second time."""
    ids, labels = tokens(18), tokens(18, seed=4)
    expected = trained(decoder(num_layers=4), labels, ids, cu_seqlens=BOUNDS)
    model = decoder(num_layers=4, checkpoint=checkpoint)
    runs: Counter[nn.Module] = Counter()
    for block in model.layers:
        block.register_forward_pre_hook(lambda module, _: runs.update([module]))
    found = trained(model, labels, ids, cu_seqlens=BOUNDS)
    assert [runs[block] for block in model.layers] == [2] * recomputed + [1] * (4 - recomputed)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_without_gradients_nothing_is_kept_for_recompute() -> None:
    model = decoder(checkpoint=True)
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 8)), decoder()(tokens(1, 8)).detach())


# -- tied embeddings


def test_a_tied_head_is_the_embedding() -> None:
    tied = decoder(tie_word_embeddings=True)
    assert tied.output.weight is tied.embedding.weight
    assert "output.weight" not in dict(tied.named_parameters())


def test_gradients_of_a_tied_weight_are_the_sum_of_both_uses() -> None:
    ids, labels = tokens(18), tokens(18, seed=4)
    tied, untied = decoder(tie_word_embeddings=True), decoder()
    untied.load_state_dict(tied.state_dict())
    assert torch.equal(tied(ids, cu_seqlens=BOUNDS), untied(ids, cu_seqlens=BOUNDS))
    one = trained(tied, labels, ids, cu_seqlens=BOUNDS)
    both = trained(untied, labels, ids, cu_seqlens=BOUNDS)
    assert close(one["embedding.weight"], both["embedding.weight"] + both["output.weight"])
    assert all(close(one[name], both[name]) for name in one if name != "embedding.weight")


# -- loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(18,), (3, 6)], ids=str)
def test_the_loss_is_the_cross_entropy_of_the_logits(shape: tuple[int, ...], smoothing: float) -> None:
    model, ids, labels = decoder(), tokens(*shape), tokens(*shape, seed=4)
    labels.view(-1)[::4] = -100
    inputs: dict[str, Any] = {"cu_seqlens": BOUNDS} if len(shape) == 1 else {}
    logits = model(ids, **inputs).flatten(0, -2)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=smoothing)
    found = model(ids, labels=labels, label_smoothing=smoothing, grad_scale=0.25, **inputs)
    assert close(found.token_loss, expected)
    assert found.loss_sum.item() == pytest.approx(0.25 * expected.sum().item(), rel=1e-12)
    assert torch.equal(found.correct, logits.argmax(1) == labels.flatten())


def test_a_row_without_any_label_has_no_loss_and_no_gradient() -> None:
    model = decoder()
    found = trained(model, torch.full((18,), -100), tokens(18), cu_seqlens=BOUNDS)
    assert all((grad == 0).all() for grad in found.values())


# -- families


def biases_of(family: str, **keys: Any) -> set[str]:
    block: Block = decoder(family, **keys).layers[0]
    layers = {"wqkv": block.attention.wqkv, "wo": block.attention.wo}
    layers |= {"w13": block.feed_forward.w13, "w2": block.feed_forward.w2}
    return {name for name, layer in layers.items() if layer.bias is not None}


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("INTERNLM", {}, {"wqkv", "wo"}),
        ("INTERNLM2", {}, set()),
        ("INTERNLM2_PUBLIC", {}, set()),
        ("LLAMA2", {}, set()),
        ("INTERNLM", {"no_bias": True}, set()),
        ("INTERNLM", {"o_bias": False}, {"wqkv"}),
        ("LLAMA2", {"qkv_bias": True}, {"wqkv"}),
        ("LLAMA2", {"mlp_bias": True}, {"w13", "w2"}),
        ("LLAMA2", {"mlp_bias": True, "no_bias": True}, set()),
    ],
)
def test_biases(family: str, keys: dict[str, Any], expected: set[str]) -> None:
    assert biases_of(family, **keys) == expected


def test_layer_norm_has_biases() -> None:
    model = decoder(norm_type="layernorm")
    assert model.norm.bias is not None
    assert close(
        model.norm(x := torch.randn(3, 32).double()), F.layer_norm(x, (32,), model.norm.weight, model.norm.bias)
    )


@pytest.mark.parametrize(("scaled", "expected"), [(True, 0.3 / 8**0.5), (False, 0.3)])
def test_projections_into_the_residual_stream_may_start_smaller(scaled: bool, expected: float) -> None:
    """By 1 / sqrt(2 · layers)."""
    model = decoder(num_layers=4, hidden_size=128, use_scaled_init=scaled)
    for block in model.layers:
        for layer in (block.attention.wo, block.feed_forward.w2):
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.03)
        for layer in (block.attention.wqkv, block.feed_forward.w13):
            assert layer.weight.std().item() == pytest.approx(0.3, rel=0.03)
