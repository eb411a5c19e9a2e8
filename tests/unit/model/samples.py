"""Small decoders for tests."""

from __future__ import annotations

from typing import Any

import torch

from internlm.config.schema import ModelConfig
from internlm.core.parallel.block_forward import checkpoint_and_offload_blocks
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.param_state import placement_of
from internlm.model.decoder import Decoder
from internlm.model.families import FAMILIES, FamilyBuilder
from internlm.utils.dtype import default_dtype

VOCAB = 61
#: Deviations are large, so that logits are of order 1 and mistakes show.
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "multiple_of": 16,
    "max_position_embeddings": 64,
    "use_scaled_init": False,
    "attn_wqkv_init_std": 0.3,
    "attn_other_init_std": 0.3,
    "ffn_uplayer_init_std": 0.3,
    "ffn_other_init_std": 0.3,
    "embedding_init_std": 1.0,
    "out_head_init_std": 0.3,
}


def decoder(family: str = "INTERNLM2", dtype: torch.dtype = torch.float64, **keys: Any) -> Decoder:
    """Build a small decoder of ``family`` with ``keys`` of its config changed, recomputed and offloaded as these say.

    Its biases and norms are random too.
    """
    config = ModelConfig(**{**SMALL, **keys})
    with default_dtype(dtype):
        model = FamilyBuilder(FAMILIES[family])(config)
    initialize_parameters(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not placement_of(parameter).is_matrix:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    checkpoint_and_offload_blocks(model, config.recomputes, config.cpu_offloading)
    return model


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    """Token ids of ``shape``."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each parameter."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
