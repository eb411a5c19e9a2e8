"""Floating-point operations of a model, by formula. A product of [m, k] and [k, n] counts 2·m·k·n."""

from __future__ import annotations

from internlm.config.schema import ModelConfig


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward operations of the matrix products for one token of a sequence of ``seq_len``, causal masking not
    deducted."""
    heads = model.num_attention_heads * model.head_size
    kv = model.kv_heads * model.head_size
    attention = 2 * model.hidden_size * (heads + 2 * kv) + 2 * heads * model.hidden_size  # qkv and output projections
    scores = 2 * 2 * seq_len * heads  # q·kᵀ and p·v
    feed_forward = 3 * 2 * model.hidden_size * model.intermediate_size
    head = 2 * model.hidden_size * model.vocab_size
    return model.num_layers * (attention + scores + feed_forward) + head


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward and backward operations for one token; backward takes two products for each of forward's. No
    recompute."""
    return 3 * forward_flops_per_token(model, seq_len)


def hardware_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """As :func:`model_flops_per_token`, with the forward products that recompute repeats."""
    layers = forward_flops_per_token(model, seq_len) - 2 * model.hidden_size * model.vocab_size
    recomputed = int(model.checkpoint * model.num_layers) / model.num_layers  # whole layers
    return model_flops_per_token(model, seq_len) + recomputed * layers
