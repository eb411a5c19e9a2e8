"""Parameters of a model, by formula; biases and norms, which are few, are left out.

Floating-point operations of a model, by formula. A product of [m, k] and [k, n] counts 2·m·k·n.
"""

from __future__ import annotations

from internlm.config.schema import ModelConfig


def layer_parameters(model: ModelConfig) -> int:
    """Of one block: query, key, value and output projections, gate, up and down projections."""
    queries, keys = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    return model.hidden_size * (2 * queries + 2 * keys + 3 * model.intermediate_size)


def table_parameters(model: ModelConfig) -> int:
    """Of the embedding, and of the head."""
    return model.vocab_size * model.hidden_size


def layer_forward_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward operations of the matrix products of one block for one token of a sequence of ``seq_len``, causal masking
    not deducted."""
    heads = model.num_attention_heads * model.head_size
    kv = model.kv_heads * model.head_size
    attention = 2 * model.hidden_size * (heads + 2 * kv) + 2 * heads * model.hidden_size  # qkv and output projections
    feed_forward = 3 * 2 * model.hidden_size * model.intermediate_size
    return attention + scores_forward_flops(model, seq_len) + feed_forward


def scores_forward_flops(model: ModelConfig, seq_len: int) -> float:
    """Those of them without a weight: q·kᵀ and p·v."""
    return 2 * 2 * seq_len * model.num_attention_heads * model.head_size


def head_forward_flops(model: ModelConfig) -> float:
    """The same of the head."""
    return 2 * model.hidden_size * model.vocab_size


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """The same of the whole model."""
    return model.num_layers * layer_forward_flops(model, seq_len) + head_forward_flops(model)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward and backward operations for one token; backward takes two products for each of forward's. No
    recompute."""
    return 3 * forward_flops_per_token(model, seq_len)


def hardware_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """As :func:`model_flops_per_token`, with the forward products that recompute repeats."""
    again = model.recomputed_layers * layer_forward_flops(model, seq_len)
    if model.checkpoint == "selective":
        again = model.num_layers * scores_forward_flops(model, seq_len)
    return model_flops_per_token(model, seq_len) + again
