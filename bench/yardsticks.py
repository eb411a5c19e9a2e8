"""Models that are timed, and their batches; doc/performance.md describes what they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

VOCAB_PACK = 32000
LLAMA_30M: dict[str, Any] = dict(
    num_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    num_kv_attention_heads=8,
    mlp_ratio=1408 / 512,
    multiple_of=128,
    max_position_embeddings=2048,
    dtype="torch.float32",
)


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """A model and its micro-batches."""

    name: str
    vocab_size: int
    seq_len: int
    micro_bsz: int
    documents: tuple[int, int] | None = None  # shortest and longest document of a packed row
    model: dict[str, Any] = field(default_factory=lambda: LLAMA_30M)  # keys of its config

    @property
    def tokens(self) -> int:
        """Number of tokens of one step."""
        return self.seq_len * self.micro_bsz

    def config(self) -> dict[str, Any]:
        """Return the config as a dict of the framework's keys."""
        return dict(
            JOB_NAME=self.name,
            model_type="LLAMA2",
            model=self.model | dict(vocab_size=self.vocab_size),
            data=dict(
                seq_len=self.seq_len,
                micro_bsz=self.micro_bsz,
                total_steps=10**6,
                use_packed_dataset=self.documents is not None,
            ),
            adam=dict(lr=1e-4),
            hybrid_zero_optimizer=dict(clip_grad_norm=1.0),
        )

    def batches(self, seed: int = 0) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Yield token ids [tokens] and the lengths of their sequences, without end."""
        rng = np.random.default_rng(seed)
        while True:
            ids = torch.from_numpy(rng.integers(0, self.vocab_size, self.tokens))
            yield ids, self._lengths(rng)

    def _lengths(self, rng: np.random.Generator) -> list[int]:
        """Draw equal sequences, or documents of mean length 200 (gamma), the last one truncated to fill the row."""
        if self.documents is None:
            return [self.seq_len] * self.micro_bsz
        lengths: list[int] = []
        while sum(lengths) < self.tokens:
            lengths.append(int(np.clip(rng.gamma(2.2, 90), *self.documents)))
        lengths[-1] -= sum(lengths) - self.tokens
        return lengths


YARDSTICKS = {
    "bench-30M": Yardstick(name="bench-30M", vocab_size=8192, seq_len=512, micro_bsz=4),
    "bench-pack": Yardstick(name="bench-pack", vocab_size=VOCAB_PACK, seq_len=2048, micro_bsz=1, documents=(32, 512)),
}
