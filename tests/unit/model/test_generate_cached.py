"""Generation with a cache equals ``transformers``, and passes over whole sequences; prompts of a batch are alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.eval import generate, stream
from internlm.model import kv_cache
from internlm.model.decoder import Decoder
from internlm.ops.cpu import cpu_gemm, packed_weights
from tests.unit.model.hf_models import hf_model_of
from tests.unit.model.samples import VOCAB, decoder

#: Shorter and longer than the windows below.
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 3]]
LLAMA3_ROPE = {
    "type": "llama3",
    "factor": 4.0,
    "original_max_position": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
#: Families that ``transformers`` lacks are its Llama, as they are exported. Embeddings are small where they are tied or
#: not normalised: otherwise each token would be the most probable one after itself.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("INTERNLM", {}),
    ("INTERNLM2", {"num_kv_attention_heads": 2}),
    ("INTERNLM2_PUBLIC", {"num_kv_attention_heads": 1, "head_dim": 12}),
    ("INTERNLM3", {"num_kv_attention_heads": 2}),
    ("LLAMA", {}),
    ("LLAMA2", {"head_dim": 12}),
    ("LLAMA3", {"num_kv_attention_heads": 2}),
    ("LLAMA3", {"rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 64}),
    ("LLAMA2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position": 16}}),
    ("LLAMA2", {"use_dynamic_ntk_rope": True, "rope_scaling_factor": 2.0, "max_position_embeddings": 8}),
    ("MISTRAL", {"sliding_window": 5, "num_kv_attention_heads": 1}),
    ("QWEN2", {"num_kv_attention_heads": 2, "tie_word_embeddings": True}),
    ("QWEN3", {"head_dim": 10}),
    ("BAICHUAN2", {}),
    ("OLMO2", {"embedding_init_std": 0.1}),
    ("GEMMA", {"num_kv_attention_heads": 1, "embedding_init_std": 0.05}),
    ("GEMMA3", {"num_layers": 7, "sliding_window": 5, "embedding_init_std": 0.05}),
]


def theirs(model: Any, prompt: list[int], new_tokens: int, **options: Any) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, **options)
    return ids[0, len(prompt) :].tolist()


def by_whole_sequences(model: Decoder, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy generation without a cache."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("family", "keys"), FAMILIES, ids=str)
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(family: str, keys: dict[str, Any]) -> None:
    model = decoder(family, torch.float32, **keys)
    # A new model for each prompt: under dynamic NTK scaling, one keeps the base of the longest text so far.
    expected = [theirs(hf_model_of(model, family), prompt, 24) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 24, temperature=0) == expected
    assert all(len(set(ids)) > 3 for ids in expected)  # not one token over and over


@torch.no_grad()
def test_a_repetition_penalty_is_that_of_transformers() -> None:
    model = decoder("LLAMA3", torch.float32)
    peer = hf_model_of(model, "LLAMA3")
    penalised = generate(model, PROMPTS, 24, temperature=0, repetition_penalty=1.7)
    assert penalised == [theirs(peer, prompt, 24, repetition_penalty=1.7) for prompt in PROMPTS]
    assert penalised != generate(model, PROMPTS, 24, temperature=0)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    window=st.integers(1, 16),
    kv_heads=st.sampled_from([1, 2, 4]),
    new_tokens=st.integers(1, 14),
    spare=st.integers(0, 4),
)
@torch.no_grad()
def test_a_cache_changes_no_token(lengths: list[int], window: int, kv_heads: int, new_tokens: int, spare: int) -> None:
    model = decoder("MISTRAL", sliding_window=window, global_layers=(1,), num_kv_attention_heads=kv_heads)
    prompts = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    expected = [by_whole_sequences(model, prompt, new_tokens) for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_SPARE", spare)
        assert generate(model, prompts, new_tokens, temperature=0, batch_size=3) == expected


def test_a_prompt_is_continued_as_if_it_were_alone() -> None:
    model = decoder()
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
    together = generate(model, PROMPTS, 12, seed=[4, 5, 6], batch_size=2, **options)
    assert together == [generate(model, p, 12, seed=s, **options) for p, s in zip(PROMPTS, (4, 5, 6), strict=True)]
    twice = generate(model, [PROMPTS[0], PROMPTS[0]], 12, seed=3)
    assert twice[0] == twice[1]


def test_top_k_is_the_number_of_candidates() -> None:
    model = decoder()
    assert generate(model, PROMPTS[0], 12, top_k=1) == generate(model, PROMPTS[0], 12, temperature=0)
    with torch.no_grad():
        likeliest = model(torch.tensor([PROMPTS[0]]))[0, -1].topk(3).indices.tolist()
    drawn = generate(model, [PROMPTS[0]] * 64, 1, top_k=3, temperature=50.0, seed=list(range(64)), batch_size=64)
    assert {token for (token,) in drawn} == set(likeliest)


def test_each_sequence_ends_with_its_own_stop_token() -> None:
    model = decoder()
    free = generate(model, PROMPTS, 16, temperature=0)
    stops = {free[0][3], free[1][6]}

    def cut(ids: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(ids) if token in stops]
        return ids[: ends[0] + 1] if ends else ids

    assert generate(model, PROMPTS, 16, temperature=0, stop=stops) == [cut(ids) for ids in free]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "repetition_penalty": 1.3, "seed": [*range(8)]}], ids=str
)
@torch.no_grad()
def test_sequences_that_have_stopped_are_left_out(options: dict[str, Any]) -> None:
    """The others go on: of unequal lengths, in windows that are full or not, each with its own random numbers."""
    model = decoder("MISTRAL", sliding_window=5, global_layers=(1,), num_kv_attention_heads=2)
    prompts = [[*range(1, 2 + index)] for index in range(8)]
    free = generate(model, prompts, 20, **options)
    stops = {ids[2 + 2 * index] for index, ids in enumerate(free[:7])}
    expected = [ids[: next((i for i, token in enumerate(ids) if token in stops), 20) + 1] for ids in free]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    assert generate(model, prompts, 20, stop=stops, **options) == expected
    running = [sum(len(ids) > step for ids in expected) for step in range(1, len(rows))]
    assert all(many <= 2 * needed for many, needed in zip(rows[1:], running, strict=True))
    assert len(set(rows[1:])) > 2  # more than once


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@torch.no_grad()
def test_packed_weights_and_a_head_that_is_normalised_once_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("BAICHUAN2", torch.float32, num_layers=1, hidden_size=512, vocab_size=1024, embedding_init_std=0.1)
    products, normalised = [], []
    monkeypatch.setattr(
        packed_weights, "product_of_few", lambda x, w: products.append(w) or cpu_gemm.product_of_few(x, w)
    )
    once = model.output.normalised_weight
    monkeypatch.setattr(model.output, "normalised_weight", lambda: normalised.append(1) or once())
    found = generate(model, [*PROMPTS, [7]], 16, temperature=0)
    assert len(products) == 5 * 16
    assert len({id(weight) for weight in products}) == 5  # wqkv, wo, w13, w2 and the head
    assert len(normalised) == 1
    assert found == [by_whole_sequences(model, prompt, 16) for prompt in (*PROMPTS, [7])]


def test_tokens_are_yielded_when_they_are_chosen() -> None:
    model = decoder().train()
    tokens = stream(model, PROMPTS, 3, temperature=0)
    first = [next(tokens) for _ in PROMPTS]
    assert [index for index, _ in first] == [0, 1, 2]
    assert not model.training
    tokens.close()
    assert model.training
    assert [[token] for _, token in first] == generate(model, PROMPTS, 1, temperature=0)


def test_a_text_beyond_the_positions_of_the_model_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    generate(decoder(max_position_embeddings=4), [1, 2, 3], 2)
    assert "a prompt of 3 tokens and 2 new ones may exceed model.max_position_embeddings=4" in caplog.text
