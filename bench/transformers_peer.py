"""A training step by ``transformers``: LlamaForCausalLM (sdpa), clip_grad_norm_, fused AdamW.

Packed documents are one row whose position ids begin anew with each document, from which ``transformers`` makes a
block-diagonal mask. (Its path without a mask needs flash-attn, which needs CUDA.)
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.yardsticks import LLAMA_30M, Yardstick


class Transformers:
    """Model and optimizer of ``transformers`` for a yardstick."""

    def __init__(self, yardstick: Yardstick) -> None:
        self.yardstick, self._batches = yardstick, yardstick.batches()
        shape = LLAMA_30M
        config = LlamaConfig(
            hidden_size=shape["hidden_size"],
            intermediate_size=1408,
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_attention_heads"],
            num_key_value_heads=shape["num_kv_attention_heads"],
            vocab_size=yardstick.vocab_size,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config).float()
        self.model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(self) -> float:
        """Train on the next batch; return the loss."""
        ids, lengths = next(self._batches)
        if self.yardstick.documents:
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            labels = ids.clone()
            labels[positions[0] == 0] = -100  # shifted inside: no document predicts the next one's first token
            output = self.model(input_ids=ids[None], position_ids=positions, labels=labels[None])
        else:
            ids = ids.view(self.yardstick.micro_bsz, -1)
            output = self.model(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.loss.item()
