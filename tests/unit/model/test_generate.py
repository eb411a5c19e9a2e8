"""Sampling continuations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from internlm.eval import generate
from internlm.utils.errors import UserError
from tests.unit.model.samples import VOCAB, decoder

PROMPT = [3, 1, 4]


class Fixed(nn.Module):
    """A model with one distribution after every token."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


def test_temperature_0_takes_the_likeliest_token() -> None:
    model = decoder()
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert generate(model, PROMPT, 6, temperature=0) == tokens[3:]


def test_the_same_seed_gives_the_same_tokens() -> None:
    model = decoder()
    first = generate(model, PROMPT, 20, seed=1)
    torch.manual_seed(99)
    assert generate(model, PROMPT, 20, seed=1) == first
    assert generate(model, PROMPT, 20, seed=2) != first
    assert all(0 <= token < VOCAB for token in first)


def test_the_prompt_is_left_alone() -> None:
    prompt = list(PROMPT)
    assert len(generate(decoder(), prompt, 4)) == 4
    assert prompt == PROMPT


def test_generation_ends_with_the_stop_token() -> None:
    model = decoder()
    free = generate(model, PROMPT, 20, seed=1)
    stop = free[7]
    assert generate(model, PROMPT, 20, seed=1, stop=stop) == free[: free.index(stop) + 1]


def test_nothing_is_generated_where_nothing_is_asked_for() -> None:
    assert generate(decoder(), PROMPT, 0) == []


@pytest.mark.parametrize(
    ("top_p", "drawn"), [(1.0, {0, 1, 2}), (0.95, {0, 1, 2}), (0.85, {0, 1}), (0.5, {1}), (0.0, {1})]
)
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p: float, drawn: set[int]) -> None:
    assert set(generate(Fixed(0.3, 0.6, 0.1), [0], 200, top_p=top_p)) == drawn


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.8), (0.5, 16 / 17), (2.0, 2 / 3)])
def test_temperature_sharpens_and_flattens(temperature: float, share: float) -> None:
    """Probabilities 4 : 1 become 4 ** (1 / temperature) : 1."""
    tokens = generate(Fixed(0.2, 0.8), [0], 1000, temperature=temperature)
    assert sum(tokens) / 1000 == pytest.approx(share, abs=0.04)


def test_the_smallest_temperatures_take_the_likeliest_token() -> None:
    for temperature in (1e-300, 5e-324):
        assert generate(Fixed(0.2, 0.8), [0], 3, temperature=temperature) == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, r"^generate\(prompt=…\): is empty\. Begin with at least one token"),
        (
            {"prompt": [3, VOCAB]},
            rf"^generate\(prompt=…\): expected an id from 0 to {VOCAB - 1} at index 1, got {VOCAB}\.",
        ),
        ({"prompt": [-1, 3]}, rf"^generate\(prompt=…\): expected an id from 0 to {VOCAB - 1} at index 0, got -1\."),
        ({"prompt": "text"}, "at index 0, got 't'. Use the tokenizer that the model was trained with$"),
        ({"prompt": [1.5]}, r"at index 0, got 1\.5\. Use"),
        ({"temperature": -0.1}, r"^generate\(temperature=…\): must be at least 0, got -0\.1\. Correct the argument$"),
        ({"temperature": float("nan")}, r"^generate\(temperature=…\): must be at least 0, got nan\."),
        ({"top_p": 1.5}, r"^generate\(top_p=…\): must be from 0 to 1, got 1\.5\."),
        ({"top_k": 0}, r"^generate\(top_k=…\): must be at least 1, got 0\."),
        ({"repetition_penalty": 0.0}, r"^generate\(repetition_penalty=…\): must be from 1e-06 to 1e\+06, got 0\.0\."),
        (
            {"repetition_penalty": 1e-300},
            r"^generate\(repetition_penalty=…\): must be from 1e-06 to 1e\+06, got 1e-300",
        ),
        ({"seed": [1, 2]}, r"^generate\(seed=…\): expected one seed for each of 1 prompts, got 2\."),
        (
            {"seed": 2**64},
            r"^generate\(seed=…\): must be less than 2\*\*64 and at least -2\*\*63, got 18446744073709551616\.",
        ),
        ({"batch_size": 0}, r"^generate\(batch_size=…\): must be at least 1, got 0\."),
        ({"new_tokens": -1}, r"^generate\(new_tokens=…\): must be from 0 to 1e\+09, got -1\."),
        ({"new_tokens": 10**20}, r"^generate\(new_tokens=…\): must be from 0 to 1e\+09, got 100000000000000000000\."),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(decoder(), **{"prompt": PROMPT, "new_tokens": 2, **arguments})


def test_ids_of_a_model_without_embedding_are_not_limited() -> None:
    assert generate(Fixed(0.0, 1.0), [10**9], 2) == [1, 1]


def test_ids_may_be_those_of_numpy() -> None:
    assert generate(decoder(), np.array(PROMPT), 3) == generate(decoder(), PROMPT, 3)


def test_the_prompt_may_be_a_tensor() -> None:
    alone = generate(decoder(), PROMPT, 3)
    assert generate(decoder(), torch.tensor(PROMPT), 3) == alone
    assert generate(decoder(), torch.tensor([PROMPT]), 3) == [alone]


def test_an_embedding_of_positions_does_not_limit_the_ids() -> None:
    model = Fixed(0.0, 1.0)
    model.positions, model.tokens = nn.Embedding(4, 2), nn.Embedding(100, 2)
    assert generate(model, [50], 2) == [1, 1]


def test_a_model_whose_logits_are_nan_is_refused() -> None:
    with pytest.raises(UserError, match=r"^generate\(model=…\): its logits are NaN\. "):
        generate(Fixed(float("nan"), 1.0), [0], 2)


def test_gradients_are_not_recorded() -> None:
    model = decoder()
    generate(model, PROMPT, 2)
    assert all(parameter.grad is None for parameter in model.parameters())
