"""Decoders of families that ``transformers`` does not have, written from their papers with plain torch operations.

InternLM: Llama with biases on all projections of attention. InternLM2 (arXiv 2403.17297, section 2.1): grouped queries,
no biases, query, key and value weights interleaved by kv head. Baichuan 2 (arXiv 2309.10305, section 2.3): Llama whose
head has rows of length 1.

Shapes: B sequences of S tokens, H hidden size, N query heads, G kv heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from internlm.config.schema import ModelConfig


def plain_logits(c: ModelConfig, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of a decoder, whose norms come after the sums if the config says so: [B, S] → [B, S, V]."""
    x = weights["embedding.weight"][ids]
    for layer in range(c.num_layers):
        block = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        if c.apply_post_layer_norm:
            x = norm(c, block["attention_sum_norm.weight"], x + attention(c, block, x))
            x = norm(c, block["ffn_sum_norm.weight"], x + feed_forward(block, x))
        else:
            x = x + attention(c, block, norm(c, block["attention_norm.weight"], x))
            x = x + feed_forward(block, norm(c, block["ffn_norm.weight"], x))
    x = norm(c, weights["norm.weight"], x)
    head = weights["output.weight"]
    if c.norm_head:
        head = head / head.norm(dim=1, keepdim=True)
    return x @ head.T


def norm(c: ModelConfig, weight: Tensor, x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + c.layer_norm_epsilon).rsqrt() * weight


def attention(c: ModelConfig, block: Mapping[str, Tensor], x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    groups, per_group, dim = c.kv_heads, c.num_attention_heads // c.kv_heads, c.head_size
    qkv = x @ block["attention.wqkv.weight"].flatten(0, 2).T
    if "attention.wqkv.bias" in block:
        qkv = qkv + block["attention.wqkv.bias"].flatten()
    qkv = qkv.view(batch, length, groups, per_group + 2, dim)
    out = []
    for head in range(c.num_attention_heads):
        group, index = divmod(head, per_group)
        q, k, v = qkv[:, :, group, index], qkv[:, :, group, per_group], qkv[:, :, group, per_group + 1]
        scores = rotate(c, q) @ rotate(c, k).transpose(1, 2) / dim**0.5  # [B, S, S]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        out.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
    y = torch.cat(out, -1) @ block["attention.wo.weight"].T
    return y + block["attention.wo.bias"] if "attention.wo.bias" in block else y


def rotate(c: ModelConfig, x: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of [B, S, D] by position · base^(−2i/D)."""
    half = x.shape[-1] // 2
    positions = torch.arange(x.shape[1], dtype=torch.float64)
    angles = positions[:, None] * c.rope_base ** -(torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def feed_forward(block: Mapping[str, Tensor], x: Tensor) -> Tensor:
    gate, up = (x @ w.T for w in block["feed_forward.w13.weight"])
    return (gate / (1 + (-gate).exp()) * up) @ block["feed_forward.w2.weight"].T
