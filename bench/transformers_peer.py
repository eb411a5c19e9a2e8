"""A training step by ``transformers``: LlamaForCausalLM (sdpa), clip_grad_norm_, fused AdamW.

In bfloat16 all of it is in bfloat16, parameters and optimizer state included. Several processes are joined by torch's
``DistributedDataParallel``, each with an equal share of the sequences.

Packed documents are one row whose position ids begin anew with each document, from which ``transformers`` makes a
block-diagonal mask. (Its path without a mask needs flash-attn, which needs CUDA.)
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from bench.yardsticks import LLAMA_30M, Yardstick


def join(rank: int, world: int, port: int) -> None:
    """Join the process group of all ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)


class Transformers:
    """Model and optimizer of ``transformers`` for a yardstick."""

    def __init__(self, yardstick: Yardstick, dtype: str = "float32", compiled: bool = False) -> None:
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
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.model: Any = (
            DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model
        )
        if compiled:
            # A cache of its own: a run that was killed while it compiled leaves broken files in the shared one.
            self._cache = tempfile.TemporaryDirectory()
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._cache.name
            self.model = torch.compile(self.model)

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
            if dist.is_initialized():
                ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
            output = self.model(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.loss.item()
