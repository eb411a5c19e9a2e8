"""Formulas of the decoder's weight matrices and floating-point operations per token.

A matmul of [m, k] and [k, n] counts as 2·m·k·n operations (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B).
:func:`block_linears` is the only list of the decoder's weights in this package: traffic, gather buffers, FLOPs and the
balance of pipeline stages derive from it. Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from typing import NamedTuple

from internlm.config.schema import ModelConfig
from internlm.core.parallel.sharding import Role


class LinearShape(NamedTuple):
    """Shape [outputs, inputs] of a linear's weight, and role of the linear (:mod:`internlm.core.parallel.sharding`)."""

    role: Role
    inputs: int
    outputs: int


def block_linears(model: ModelConfig) -> list[LinearShape]:
    """Return the shapes of a block's four weights, in forward order.

    They are wqkv (H → G·(Q + 2)·D), wo (G·Q·D → H), w13 (H → 2·F) and w2 (F → H).
    """
    heads = model.num_attention_heads * model.head_size  # G·Q·D
    return [
        LinearShape("column", model.hidden_size, heads + 2 * model.kv_heads * model.head_size),
        LinearShape("row", heads, model.hidden_size),
        LinearShape("column", model.hidden_size, 2 * model.intermediate_size),
        LinearShape("row", model.intermediate_size, model.hidden_size),
    ]


def block_weights(model: ModelConfig) -> int:
    """Return the number of elements of a block's four weights, without biases and norms, which are small."""
    return sum(linear.inputs * linear.outputs for linear in block_linears(model))


def vocab_weights(model: ModelConfig) -> int:
    """Return V·H, the number of elements of the embedding, which equals that of the head."""
    return model.vocab_size * model.hidden_size


def block_forward_flops(model: ModelConfig, seq_len: int, layer: int) -> float:
    """Return the forward FLOPs per token of the block of index ``layer``, for sequences of ``seq_len`` tokens."""
    return 2 * block_weights(model) + attention_forward_flops(model, seq_len, layer)


def attention_forward_flops(model: ModelConfig, seq_len: int, layer: int) -> float:
    """Return the forward FLOPs per token of the two matmuls of attention, q·kᵀ and p·v, in one block.

    Attention is counted over all ``seq_len`` keys per query, as is usual in publications, although the causal mask
    removes half of them; in a layer with a sliding window, over the keys of the window.
    """
    keys = min(model.window(layer) or seq_len, seq_len)
    return 2 * 2 * keys * model.num_attention_heads * model.head_size


def head_forward_flops(model: ModelConfig) -> float:
    """Return the forward FLOPs per token of the head."""
    return 2 * vocab_weights(model)


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the forward FLOPs per token of the whole model."""
    blocks = sum(block_forward_flops(model, seq_len, layer) for layer in range(model.num_layers))
    return blocks + head_forward_flops(model)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the forward and backward FLOPs per token of the whole model, without recomputation.

    Each matmul of the forward pass takes two in the backward pass, one for the gradient of each operand.
    """
    return 3 * forward_flops_per_token(model, seq_len)


def hardware_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs per token that the hardware executes, including recomputation.

    They are :func:`model_flops_per_token` plus the forward FLOPs that activation checkpointing repeats.
    """
    # The head is never recomputed: its loss and gradients are computed together.
    layers = range(model.num_layers)
    recomputed = sum(block_forward_flops(model, seq_len, layer) for layer in layers if model.recomputes(layer))
    if model.checkpoint == "selective":
        recomputed = sum(attention_forward_flops(model, seq_len, layer) for layer in layers)
    return model_flops_per_token(model, seq_len) + recomputed
