"""The decoder: packing, recompute, tied embeddings, loss, families, parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.dropout import Dropout, DropoutKey, dropout_key_scope
from internlm.core.parallel.param_state import placement_of
from internlm.core.parallel.sharding import Sharding, StageLayers, building
from internlm.model.blocks import Block
from internlm.model.decoder import Decoder
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


def test_dynamic_ntk_scales_a_short_document_beside_a_long_one_as_if_it_were_alone() -> None:
    model, ids = decoder(use_dynamic_ntk_rope=True, rope_scaling_factor=2.0, max_position_embeddings=64), tokens(220)
    packed = model(ids, cu_seqlens=torch.tensor([0, 20, 220]))
    assert close(packed[:20], model(ids[None, :20])[0])
    assert close(packed[20:], model(ids[None, 20:])[0])


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


# -- dropout


def test_dropout_is_a_mask_and_a_factor_after_the_embedding_and_both_branches() -> None:
    """Against plain products, in the same places of a model that has no dropout."""
    rate, ids, labels, key = 0.25, tokens(1, 18), tokens(1, 18, seed=4), DropoutKey(seed=5, step=3)
    with dropout_key_scope(key):
        dropped = trained(decoder(drop_rate=rate), labels, ids)
    model, dropout = decoder(), Dropout(rate, False, key, 18)

    def plain(layer: int | None, position: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        mask = dropout.mask(layer, position, torch.Size([18, 32]), ids.device)
        return lambda module, inputs, x: x * mask / (1 - rate)

    model.embedding.register_forward_hook(plain(None, "embedding"))
    for index, block in enumerate(model.layers.values()):
        block.attention.register_forward_hook(plain(index, "attention"))
        block.feed_forward.register_forward_hook(plain(index, "feed_forward"))
    for name, grad in trained(model, labels, ids).items():
        assert close(dropped[name], grad), name


# -- recompute


@pytest.mark.parametrize(
    ("checkpoint", "twice"),
    [(True, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3]), (0.75, [0, 2, 3]), (0.5, [0, 2]), (0.3, [0]), (0.2, []), (False, [])],
)
def test_recompute_leaves_gradients_bitwise_equal(checkpoint: bool | float, twice: list[int]) -> None:
    """The share of the layers that is recomputed runs a second time."""
    ids, labels = tokens(18), tokens(18, seed=4)
    expected = trained(decoder(num_layers=4), labels, ids, cu_seqlens=BOUNDS)
    model = decoder(num_layers=4, checkpoint=checkpoint)
    runs: Counter[nn.Module] = Counter()
    for block in model.layers.values():
        block.attention.register_forward_pre_hook(lambda module, _: runs.update([module]))
    found = trained(model, labels, ids, cu_seqlens=BOUNDS)
    assert [runs[block.attention] for block in model.layers.values()] == [1 + (number in twice) for number in range(4)]
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_a_share_of_the_layers_is_rounded_as_a_decimal_number() -> None:
    """100 · 0.29 is 28.999… in floating point."""
    config = decoder().spec.config.model_copy(update={"num_layers": 100, "checkpoint": 0.29})
    assert config.recomputed_layers == 29


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
    block: Block = decoder(family, **keys).layers["0"]
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
    for block in model.layers.values():
        for layer in (block.attention.wo, block.feed_forward.w2):
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.03)
        for layer in (block.attention.wqkv, block.feed_forward.w13):
            assert layer.weight.std().item() == pytest.approx(0.3, rel=0.03)


# -- parts


LAYERS = 6


@st.composite
def partitions(draw: st.DrawFn) -> list[list[range]]:
    """Stages, each with its chunks, however they lie."""
    chunks = draw(st.integers(1, 3))
    stages = draw(st.integers(1, LAYERS // chunks))
    inner = draw(st.permutations(range(1, LAYERS)))[: stages * chunks - 1]
    bounds = [0, *sorted(inner), LAYERS]
    ranges = draw(st.permutations([range(*pair) for pair in pairwise(bounds)]))
    return [sorted(ranges[stage::stages], key=lambda numbers: numbers.start) for stage in range(stages)]


def parts_of(partition: list[list[range]], **keys: Any) -> list[Decoder]:
    parts = []
    for chunks in partition:
        with building(Sharding(), StageLayers(LAYERS, tuple(chunks))):
            parts.append(decoder(num_layers=LAYERS, **keys))
    return parts


def with_values_of(whole: Decoder, parts: list[Decoder]) -> list[Decoder]:
    """Norms and biases too, which the samples make random in the order in which they come."""
    values = {**whole.state_dict(), "output.weight": whole.output.weight}
    for part in parts:
        part.load_state_dict({name: values[name] for name in part.state_dict()})
    return parts


def in_order(parts: list[Decoder]) -> list[tuple[Decoder, int]]:
    """Part and chunk of every virtual stage."""
    chunks = [(part, chunk) for part in parts for chunk in range(len(part.stage_layers.chunks))]
    return sorted(chunks, key=lambda each: each[0].stage_layers.chunks[each[1]].start)


@settings(max_examples=15)
@given(partitions(), st.booleans(), st.sampled_from([False, 0.5, True]))
def test_parts_one_after_another_are_the_model(partition: list[list[range]], tied: bool, checkpoint: float) -> None:
    """Bit by bit, and the shape of what goes between them is foretold."""
    keys = {"tie_word_embeddings": tied, "checkpoint": checkpoint, **GQA}
    whole, inputs = decoder(num_layers=LAYERS, **keys), {"input_ids": tokens(18), "cu_seqlens": BOUNDS}
    *before, last = in_order(with_values_of(whole, parts_of(partition, **keys)))
    hidden = None
    for part, chunk in before:
        hidden = part(**inputs, chunk=chunk, hidden=hidden)
        assert part.hidden_like(inputs) == (tuple(hidden.shape), hidden.dtype)
    part, chunk = last
    assert torch.equal(part(**inputs, chunk=chunk, hidden=hidden), whole(**inputs))
    labels = tokens(18, seed=4)
    loss, wanted = part(**inputs, labels=labels, chunk=chunk, hidden=hidden), whole(**inputs, labels=labels)
    assert torch.equal(loss.token_loss, wanted.token_loss)


@settings(max_examples=15)
@given(partitions(), st.booleans())
def test_parts_have_the_parameters_of_the_model_between_them(partition: list[list[range]], tied: bool) -> None:
    """Under their names, once each, with their first values; a tied table is at both ends, if these are two."""
    parts, whole = parts_of(partition, tie_word_embeddings=tied), decoder(num_layers=LAYERS, tie_word_embeddings=tied)
    names = Counter(name for part in parts for name, _ in part.named_parameters())
    wanted = Counter(name for name, _ in whole.named_parameters())
    ends = sum(part.stage_layers.has_embedding or part.stage_layers.has_head for part in parts)
    assert names == wanted + Counter(["embedding.weight"] * (tied and ends == 2))
    values = whole.state_dict()
    for part in parts:
        for name, value in part.named_parameters():
            assert not placement_of(value).is_matrix or torch.equal(value, values[name]), name


def test_layers_keep_their_numbers() -> None:
    (part,) = parts_of([[range(1, 3), range(5, 6)]])
    assert [name for name, _ in part.layers.named_children()] == ["1", "2", "5"]
    assert list(part.layers.values()) == [part.layers["1"], part.layers["2"], part.layers["5"]]
    assert [block.chunk for block in part.layers.values()] == [0, 0, 1]
    assert part.output.chunk == 1
    assert not hasattr(part, "embedding")
    with pytest.raises(KeyError):
        part.layers["0"]


@pytest.mark.parametrize(
    ("partition", "partial"),
    [
        ([[range(2)], [range(2, 4)], [range(4, 6)]], [ParallelMode.PIPELINE, None, ParallelMode.PIPELINE]),
        ([[range(2), range(4, 6)], [range(2, 4)]], [None, None]),  # both ends on one rank
    ],
)
def test_the_gradient_of_a_table_at_both_ends_is_a_sum(
    partition: list[list[range]], partial: list[ParallelMode | None]
) -> None:
    parts = parts_of(partition, tie_word_embeddings=True)
    placements = [getattr(part, "embedding", None) and placement_of(part.embedding.weight) for part in parts]
    assert [placement and placement.partial_over for placement in placements] == partial
    assert parts[-1].stage_layers.has_head == hasattr(parts[-1], "output")


@pytest.mark.parametrize(("checkpoint", "recomputed"), [(True, [4, 5]), (0.5, [4]), (False, [])])
def test_a_chunk_recomputes_its_own_share(checkpoint: float, recomputed: list[int]) -> None:
    (part,) = parts_of([[range(2), range(4, 6)]], checkpoint=checkpoint)
    runs: Counter[str] = Counter()
    for name, block in part.layers.named_children():
        block.attention.register_forward_pre_hook(lambda module, _, name=name: runs.update([name]))
    hidden = torch.randn(18, 32, dtype=torch.float64).requires_grad_()
    part(tokens(18), BOUNDS, labels=tokens(18), chunk=1, hidden=hidden).loss_sum.backward()
    assert runs == Counter([*map(str, recomputed), "4", "5"])
    assert hidden.grad is not None


@pytest.mark.parametrize("shape", [(18,), (3, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_units_are_foretold(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (part,) = parts_of([[range(2)]], dtype=dtype)
    inputs = {"input_ids": tokens(*shape)} | ({"cu_seqlens": BOUNDS} if len(shape) == 1 else {})
    hidden = part(**inputs)
    assert part.hidden_like(inputs) == (tuple(hidden.shape), hidden.dtype) == ((18, 32), dtype)
