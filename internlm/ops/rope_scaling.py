"""Scaling of rotary frequencies by their wavelength, for contexts longer than in the first stage of training.

High frequencies, which turn many times within the original context, tell neighbouring tokens apart and are kept. Low
frequencies, which have not completed a turn, would reach angles that were never seen in training: they are divided by
the ratio of the context lengths. Both methods interpolate between the two; they differ in how.

Shapes: D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class ContextScaling(Protocol):
    """Protocol for a scaling of the rotary frequencies."""

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and of rotated keys."""

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """Scale the frequencies base ** (-2i / D), float64 [D / 2]."""


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Scaling of Llama 3.1 (arXiv 2407.21783): a linear transition in the number of turns within the original context.

    Attributes:
        factor: Ratio of the new to the original context length.
        original_max_position: Original context length in tokens.
        low_freq_factor: Number of turns up to which a frequency is divided by ``factor``.
        high_freq_factor: Number of turns from which on a frequency is kept.
    """

    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @property
    def magnitude(self) -> float:
        """1: queries and keys keep their lengths."""
        return 1.0

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """Scale the frequencies base ** (-2i / D), float64 [D / 2]."""
        turns = self.original_max_position * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(frequencies / self.factor, frequencies, kept.clamp(0, 1))


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, sections 3.2 and 3.4): a linear transition in the index of the frequency.

    Attributes:
        factor: Ratio of the new to the original context length.
        original_max_position: Original context length in tokens.
        beta_fast: Number of turns from which on a frequency is kept.
        beta_slow: Number of turns up to which a frequency is divided by ``factor``.
        attention_factor: Factor of rotated queries and of rotated keys; None: 0.1 · ln(``factor``) + 1.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and of rotated keys, whose square is the factor of the scores."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """Scale the frequencies base ** (-2i / D), float64 [D / 2]."""
        dim = 2 * len(frequencies)
        first = max(math.floor(self._index(self.beta_fast, base, dim)), 0)
        last = min(math.ceil(self._index(self.beta_slow, base, dim)), dim - 1)
        index = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
        # Both ends may fall on the same index: then the transition is a step.
        divided = ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
        return torch.lerp(frequencies, frequencies / self.factor, divided)

    def _index(self, turns: float, base: float, dim: int) -> float:
        """Return the index, which may be a fraction, of the frequency with this number of turns."""
        return dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(base))
