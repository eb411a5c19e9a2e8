"""Blocks of a decoder: attention and feed-forward layer, with their norms and residual sums.

Shapes: T tokens, H hidden size, G kv heads, Q query heads per kv head, D head size, F intermediate size.
Sequence-parallel modes split T over ranks between the linears.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from internlm.core.parallel import ParallelNorm
from internlm.core.parallel.communicator import IDENTITY_ATTENTION, AttentionCommunicator
from internlm.core.parallel.dropout import Drop, no_drop
from internlm.core.parallel.linear import Before
from internlm.core.parallel.placement import normal
from internlm.core.parallel.qk_norm import QKNorm
from internlm.model.kv_cache import LayerCache
from internlm.model.projections import GATE_UP, QKV
from internlm.model.spec import DecoderSpec
from internlm.ops import PackedSequences, attention, gated, split_qkv_rotary

#: Cosines and sines of the rotary angles, each [T, D/2].
Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary position embeddings (arXiv 2104.09864)."""

    role = "attention"
    communicator: AttentionCommunicator = IDENTITY_ATTENTION
    wqkv: nn.Module

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        c = spec.config
        groups, per_group = c.kv_heads, c.num_attention_heads // c.kv_heads
        # The first axis of the projection is the kv head: splitting it over ranks keeps each kv head together with its
        # query heads.
        shape = (groups, per_group + 2, c.head_size)
        spec.add_projection(self, QKV, shape, normal(c.attn_wqkv_init_std), spec.qkv_bias)
        self.qk_norm: nn.Module | None = None
        if c.qk_norm != "none":
            self.qk_norm = QKNorm(c.qk_norm, shape, c.layer_norm_epsilon, spec.family.norm_offset)
        # What is added to the residual stream starts small, or its variance would grow with the depth.
        out_init = normal(spec.output_std(c.attn_other_init_std, layer))
        self.wo = spec.linear(
            "wo", c.num_attention_heads * c.head_size, c.hidden_size, out_init, spec.o_bias, role="row"
        )
        self.interleaved, self.backend = spec.qk_interleaved, spec.attention_backend
        self.scale, self.window = c.attention_scale, c.window(layer)
        self.recomputes = spec.recomputes_attention

    def forward(
        self,
        x: Tensor,
        norm: Before | None,
        rotary: Rotary,
        sequences: PackedSequences,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Compute attention of ``norm(x)`` within each sequence, and over its tokens in ``cache``: [T, H] → [T, H]."""
        # A linear applies the function ``before`` to its input. Its backward pass needs the result, and recomputes it
        # instead of saving it.
        qkv = self.wqkv(x, before=norm)  # [T, H] → [T, G, Q + 2, D]
        if self.qk_norm is not None:
            qkv = self.qk_norm(qkv)  # here, where under isp a rank has all heads of its tokens
        qkv = self.communicator.to_heads(qkv)
        attend = partial(self._attend, rotary=rotary, sequences=sequences, cache=cache)
        out: Tensor = self.wo(qkv, before=attend) if self.recomputes else self.wo(attend(qkv))  # [T, H]
        return out

    def _attend(self, qkv: Tensor, rotary: Rotary, sequences: PackedSequences, cache: LayerCache | None) -> Tensor:
        """Apply rotary position embeddings, then compute attention: [T, G, Q + 2, D] → [T, G·Q·D]."""
        q, k, v = split_qkv_rotary(qkv, *rotary, self.interleaved)  # [T, G·Q, D], [T, G, D], [T, G, D]
        attend = partial(attention, sequences=sequences) if cache is None else cache.attend
        heads = attend(q, k, v, scale=self.scale, window=self.window, backend=self.backend)  # [T, G·Q, D]
        return self.communicator.to_tokens(heads.flatten(1))  # [T, G·Q·D]


class FeedForward(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202): w2 · (activation(w1 · x) * (w3 · x))."""

    w13: nn.Module

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        c = spec.config
        up_init = normal(c.ffn_uplayer_init_std)
        # Gate and up are split along axis 1, so that each rank has the same rows of both.
        spec.add_projection(self, GATE_UP, (2, c.intermediate_size), up_init, spec.mlp_bias, split_axis=1)
        out_init = normal(spec.output_std(c.ffn_other_init_std, layer))
        self.w2 = spec.linear("w2", c.intermediate_size, c.hidden_size, out_init, spec.mlp_bias, role="row")
        self.activate = partial(gated, activation=c.activation)

    def forward(self, x: Tensor, norm: Before | None) -> Tensor:
        """Apply the feed-forward layer to ``norm(x)``: [T, H] → [T, H]."""
        out: Tensor = self.w2(self.w13(x, before=norm), before=self.activate)  # [T, H] → [T, 2, F] → [T, F] → [T, H]
        return out


class Block(nn.Module):
    """Transformer block: attention, then the feed-forward layer, each added to the residual stream.

    A family normalises the input of each of the two layers (``attention_norm``, ``ffn_norm``), its output, or both;
    with ``apply_post_layer_norm``, the sums are normalised instead. Norms that a block does not have are None.
    """

    #: For activation checkpointing: a block uses no random generator whose state recompute must restore.
    draws_nothing = True

    def __init__(self, spec: DecoderSpec, layer: int, chunk: int = 0) -> None:
        super().__init__()
        self.chunk = chunk  # index in the pipeline stage
        self.is_local = spec.config.window(layer) is not None
        # Residuals in float32 are rounded by the norm before a linear, or by a cast where there is none.
        enter = input_norm if spec.normalises_input else residual_cast
        self.attention_norm, self.attention = enter(spec), Attention(spec, layer)
        self.ffn_norm, self.feed_forward = enter(spec), FeedForward(spec, layer)
        self.attention_out_norm, self.ffn_out_norm = (_norm(spec) if spec.normalises_output else None for _ in "af")
        self.attention_sum_norm, self.ffn_sum_norm = (_norm(spec) if spec.normalises_sums else None for _ in "af")

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        sequences: PackedSequences,
        drop: Drop = no_drop,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Apply both residual branches, with dropout ``drop`` on the output of each: [T, H] → [T, H]."""
        branch = self.attention(x, self.attention_norm, rotary, sequences, cache)  # [T, H]
        branch = _apply(self.attention_out_norm, branch)
        x = _apply(self.attention_sum_norm, x + drop("attention", branch))
        branch = _apply(self.ffn_out_norm, self.feed_forward(x, self.ffn_norm))  # [T, H]
        return _apply(self.ffn_sum_norm, x + drop("feed_forward", branch))


def input_norm(spec: DecoderSpec) -> ParallelNorm:
    """Create the norm between the residual stream and a linear."""
    return _norm(spec, torch.get_default_dtype() if spec.config.residual_in_fp32 else None)


def residual_cast(spec: DecoderSpec) -> Before | None:
    """Return what takes the place of a norm between the residual stream and a linear: a cast, or nothing."""
    return partial(Tensor.to, dtype=torch.get_default_dtype()) if spec.config.residual_in_fp32 else None


def _norm(spec: DecoderSpec, dtype: torch.dtype | None = None) -> ParallelNorm:
    c = spec.config
    return ParallelNorm(c.hidden_size, c.norm_type, c.layer_norm_epsilon, spec.family.norm_offset, dtype)


def _apply(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
