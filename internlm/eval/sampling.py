"""Choice of the next token from logits: greedy, or sampling from an adjusted distribution.

Shapes: B sequences, V vocabulary entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from internlm.accelerator import to_device, to_host
from internlm.utils.errors import Problem, UserError

#: What stands for a token where the logits are NaN.
NAN_TOKEN = -1


class SamplingOptions(TypedDict, total=False):
    """Keywords of :class:`Sampling`."""

    temperature: float
    top_k: int | None
    top_p: float
    repetition_penalty: float
    seed: int | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of the next token, applied to the logits in this order, as in ``transformers``.

    Attributes:
        repetition_penalty: Divisor of the positive logits, and factor of the negative ones, of tokens that occur in
            the prompt or were generated (Keskar et al. 2019, arXiv 1909.05858, section 4.1); 1: none.
        temperature: Divisor of the logits; 0 selects the most probable token.
        top_k: Sample from this number of most probable tokens (Fan et al. 2018, arXiv 1805.04833); None: from all.
        top_p: Sample from the smallest set of most probable tokens with at least this total probability (nucleus
            sampling, Holtzman et al. 2019, arXiv 1904.09751).
        seed: Seed of the random generator of each prompt: one for all, or one for each.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | Sequence[int] = 0

    def check(self, prompts: int) -> None:
        """Check the values for a number of ``prompts``.

        Raises:
            UserError: A value is out of its range, or there are fewer or more seeds than prompts.
        """
        problems = [
            *out_of_range("temperature", self.temperature, 0, math.inf),
            *out_of_range("top_p", self.top_p, 0, 1),
            # Beyond these, products with logits could overflow.
            *out_of_range("repetition_penalty", self.repetition_penalty, 1e-6, 1e6),
            *out_of_range("top_k", 1 if self.top_k is None else self.top_k, 1, math.inf),
        ]
        if not isinstance(self.seed, int) and len(self.seed) != prompts:
            message = f"expected one seed for each of {prompts} prompts, got {len(self.seed)}"
            problems.append(Problem("generate(seed=…)", message, "Pass one number, or one for each prompt"))
        seeds = [self.seed] if isinstance(self.seed, int) else self.seed
        problems += [
            Problem(
                "generate(seed=…)", f"must be less than 2**64 and at least -2**63, got {seed}", "Choose another seed"
            )
            for seed in seeds
            if not -(2**63) <= seed < 2**64
        ]
        if problems:
            raise UserError(*problems)

    def seed_of(self, index: int) -> int:
        """Return the seed of the prompt with ``index``."""
        return self.seed if isinstance(self.seed, int) else self.seed[index]


def out_of_range(name: str, value: float, least: float, largest: float) -> list[Problem]:
    """Return a problem if the argument ``name`` is less than ``least`` or greater than ``largest``."""
    if least <= value <= largest:  # false for NaN
        return []
    limits = f"at least {least:g}" if largest == math.inf else f"from {least:g} to {largest:g}"
    return [Problem(f"generate({name}=…)", f"must be {limits}, got {value}", "Correct the argument")]


class Sampler:
    """Sampler of the next tokens of a batch; each sequence has a generator of its own, so others do not affect it.

    Args:
        sampling: How tokens are chosen.
        prompts: Token ids of each prompt.
        seeds: Seed of each sequence.
        device: Device of the logits.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], seeds: Sequence[int], device: torch.device
    ) -> None:
        self.sampling, self._prompts = sampling, prompts
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._seen: Tensor | None = None  # [B, V], whether the token occurs in the sequence

    def next_tokens(self, logits: Tensor) -> list[int]:
        """Choose the next token of each sequence from its logits [B, V]; ``NAN_TOKEN`` where they are NaN."""
        logits = logits.float() if logits.dtype != torch.float64 else logits
        has_penalty = self.sampling.repetition_penalty != 1
        if has_penalty:
            logits = self._penalise(logits)
        # A comparison with NaN is false, so no draw or maximum would show it.
        best, greedy = logits.max(-1)  # NaN if any logit is
        chosen = greedy.masked_fill(best.isnan(), NAN_TOKEN)
        tokens: list[int] = to_host(chosen, "generated tokens").tolist()
        if self.sampling.temperature != 0:
            tokens = [
                NAN_TOKEN if token == NAN_TOKEN else self._draw(row, generator)
                for token, row, generator in zip(tokens, logits, self._generators, strict=True)
            ]
        # Finished sequences are drawn from, too, but no other sequence sees their tokens.
        if has_penalty:
            self._note([[token] for token in tokens])
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the sequences with the indices ``rows``, in this order; not before the first tokens."""
        self._generators = [self._generators[row] for row in rows]
        self._seen = None if self._seen is None else self._seen[list(rows)]

    def _draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Sample one token from ``logits`` [V]."""
        top_k, top_p = self.sampling.top_k, self.sampling.top_p
        # Kept in descending order, so that a draw with one seed selects the same token with and without top_p.
        values, order = logits.topk(top_k) if top_k and top_k < len(logits) else logits.sort(descending=True)
        # A smaller temperature would be rounded to 0, and the difference of the first value is 0.
        temperature = max(self.sampling.temperature, torch.finfo(torch.float32).tiny)
        probabilities = torch.softmax((values - values[0]) / temperature, 0)
        outside = probabilities.cumsum(0) - probabilities >= top_p
        probabilities[1:][outside[1:]] = 0.0  # keep the most probable token for any top_p
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])

    def _penalise(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._note(self._prompts)
        penalty = self.sampling.repetition_penalty
        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _note(self, tokens: Sequence[Sequence[int]]) -> None:
        assert self._seen is not None
        for row, ids in zip(self._seen, tokens, strict=True):
            row[to_device(torch.tensor(ids), row.device)] = True
