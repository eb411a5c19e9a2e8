"""The config that tests on several ranks train, and a model as users bring it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.core.parallel import place_replicated
from internlm.utils.registry import MODEL_INITIALIZER

#: Micro-batches of a global batch, whatever number of ranks shares it.
MICRO_BATCHES = 4
TOTAL_STEPS = 5

TINY: dict[str, Any] = {
    "model_type": "INTERNLM2",
    "data": {"seq_len": 16, "micro_bsz": 2, "total_steps": TOTAL_STEPS, "num_worker": 0},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "vocab_size": 64,
        "multiple_of": 16,
        "dtype": "torch.float64",
    },
    "adam": {"lr": 1e-2, "weight_decay": 0.1},
    "hybrid_zero_optimizer": {"clip_grad_norm": 0.5},
    "enable_tb": False,
}


#: Overrides by which documents of one row have different rotary bases.
DYNAMIC_NTK = ("model.use_dynamic_ntk_rope=True", "model.rope_scaling_factor=2.0", "model.max_position_embeddings=5")


class Plain(nn.Module):
    """A model of torch's own modules; each token predicts the next one."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU())
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None, indexes: Tensor | None = None) -> Tensor:
        """Return logits [*input_ids.shape, vocab_size]."""
        x = self.embedding(input_ids)
        return self.head(x + self.layers(x))


@MODEL_INITIALIZER.register_module(module_name="PLAIN")
def build_plain(model: ModelConfig) -> nn.Module:
    """Build the model that a user registers."""
    return place_replicated(Plain(model.vocab_size, model.hidden_size))


def share_of_batch(world_size: int, overrides: Sequence[str], largest: int = MICRO_BATCHES) -> str:
    """Return the override that gives each rank its share of the global batch.

    Ranks of a tensor group share theirs, and so do the stages of a pipeline. Without a pipeline, a rank takes at most
    ``largest`` micro-batches, so the global batch is smaller if there are few data-parallel ranks.
    """
    given = dict(text.split("=", 1) for text in overrides)
    if "data.global_batch" in given:
        return f"data.global_batch={given['data.global_batch']}"
    sharing = math.prod(int(given.get(f"parallel.{axis}.size", 1)) for axis in ("tensor", "pipeline"))
    micro_batches = max(MICRO_BATCHES * sharing // world_size, 1)
    if "parallel.pipeline.size" not in given:
        micro_batches = min(micro_batches, largest)
    return f"data.micro_num={micro_batches}"
