"""Decoder: embedding, blocks of attention and feed-forward, final norm, head.

The decoder is plain maths on parallel layers: it names no process group, and ``train/parallelize.py`` applies
recompute, offloading, compilation and sharding from outside.

A pipeline rank holds the blocks of its :class:`~internlm.core.parallel.sharding.StageLayers`, named by their index in
the whole model, and the embedding or head if its chunks begin or end the model.

Shapes: B sequences of S tokens each (or one packed row), T = B · S tokens, H hidden size, V vocabulary size, G kv
heads, Q query heads per kv head, D head size, F intermediate size. Sequence-parallel modes split T over ranks between
the linears.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.config.schema.model import AttentionBackend
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import ParallelEmbedding, ParallelHead, ParallelLinear, ParallelNorm
from internlm.core.parallel.communicator import (
    IDENTITY_ATTENTION,
    IDENTITY_MODEL,
    AttentionCommunicator,
    ModelCommunicator,
)
from internlm.core.parallel.dropout import Drop, Dropout, current_dropout_key, no_drop
from internlm.core.parallel.param_state import placement_of, set_placement
from internlm.core.parallel.placement import normal
from internlm.core.parallel.sharding import current_stage_layers
from internlm.ops import PackedSequences, RotaryScaling, TokenLoss, attention, rotary_table, split_qkv_rotary, swiglu
from internlm.utils.compat import ReplacedNames


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Specification of a decoder: the config's ``model`` section, with the defaults of its family applied."""

    config: ModelConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_interleaved: bool

    @property
    def output_scale(self) -> float:
        """Factor on the initial std of projections that write into the residual stream (GPT-2, section 2.3)."""
        return 1 / math.sqrt(2 * self.config.num_layers) if self.config.use_scaled_init else 1.0

    @property
    def attention_backend(self) -> AttentionBackend:
        """Attention kernel to use; ``use_flash_attn=False`` excludes the flash kernels."""
        backend = self.config.attention_backend
        return "sdpa" if backend == "auto" and not self.config.use_flash_attn else backend

    @property
    def recomputes_attention(self) -> bool:
        """Whether the backward pass recomputes the attention between wqkv and wo (arXiv 2205.05198, section 5)."""
        return self.config.checkpoint == "selective"


#: Cosines and sines of the rotary angles, each [T, D/2].
Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary position embeddings (arXiv 2104.09864)."""

    role = "attention"
    communicator: AttentionCommunicator = IDENTITY_ATTENTION

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        c = spec.config
        groups, per_group = c.kv_heads, c.num_attention_heads // c.kv_heads
        # One fused projection whose first axis is the kv head: splitting it over ranks keeps each kv head together
        # with its query heads.
        self.wqkv = ParallelLinear(
            c.hidden_size, (groups, per_group + 2, c.head_size), normal(c.attn_wqkv_init_std), spec.qkv_bias
        )
        out_init = normal(c.attn_other_init_std * spec.output_scale)
        self.wo = ParallelLinear(c.num_attention_heads * c.head_size, c.hidden_size, out_init, spec.o_bias, role="row")
        self.interleaved, self.backend = spec.qk_interleaved, spec.attention_backend
        self.recomputes = spec.recomputes_attention

    def forward(self, x: Tensor, norm: nn.Module, rotary: Rotary, sequences: PackedSequences) -> Tensor:
        """Compute attention of ``norm(x)`` within each sequence: [T, H] → [T, H]."""
        # A linear applies the function ``before`` to its input. Its backward pass needs the result, and recomputes it
        # instead of saving it.
        qkv = self.communicator.to_heads(self.wqkv(x, before=norm))  # [T, H] → [T, G, Q + 2, D]
        attend = partial(self._attend, rotary=rotary, sequences=sequences)
        out: Tensor = self.wo(qkv, before=attend) if self.recomputes else self.wo(attend(qkv))  # [T, H]
        return out

    def _attend(self, qkv: Tensor, rotary: Rotary, sequences: PackedSequences) -> Tensor:
        """Apply rotary position embeddings, then compute attention: [T, G, Q + 2, D] → [T, G·Q·D]."""
        q, k, v = split_qkv_rotary(qkv, *rotary, self.interleaved)  # [T, G·Q, D], [T, G, D], [T, G, D]
        heads = attention(q, k, v, sequences, backend=self.backend)  # [T, G·Q, D]
        return self.communicator.to_tokens(heads.flatten(1))  # [T, G·Q·D]


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202): w2 · (silu(w1 · x) * (w3 · x))."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        c = spec.config
        up_init = normal(c.ffn_uplayer_init_std)
        # Gate and up are fused, and split along axis 1, so that each rank has the same rows of both.
        self.w13 = ParallelLinear(c.hidden_size, (2, c.intermediate_size), up_init, spec.mlp_bias, split_axis=1)
        out_init = normal(c.ffn_other_init_std * spec.output_scale)
        self.w2 = ParallelLinear(c.intermediate_size, c.hidden_size, out_init, spec.mlp_bias, role="row")

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Apply the feed-forward layer to ``norm(x)``: [T, H] → [T, H]."""
        out: Tensor = self.w2(self.w13(x, before=norm), before=swiglu)  # [T, H] → [T, 2, F] → [T, F] → [T, H]
        return out


class Block(nn.Module):
    """Pre-norm transformer block: x + Attention(norm(x)), then x + FeedForward(norm(x))."""

    #: For activation checkpointing: a block uses no random generator whose state recompute must restore.
    draws_nothing = True

    def __init__(self, spec: DecoderSpec, chunk: int = 0) -> None:
        super().__init__()
        self.chunk = chunk  # index in the pipeline stage
        c = spec.config
        norm = partial(ParallelNorm, c.hidden_size, c.norm_type, c.layer_norm_epsilon)
        self.attention_norm, self.attention = norm(), Attention(spec)
        self.ffn_norm, self.feed_forward = norm(), FeedForward(spec)

    def forward(self, x: Tensor, rotary: Rotary, sequences: PackedSequences, drop: Drop = no_drop) -> Tensor:
        """Apply both residual branches, with dropout ``drop`` on the output of each: [T, H] → [T, H]."""
        x = x + drop("attention", self.attention(x, self.attention_norm, rotary, sequences))  # [T, H]
        out: Tensor = x + drop("feed_forward", self.feed_forward(x, self.ffn_norm))  # [T, H]
        return out


class Decoder(ReplacedNames, nn.Module):
    """Decoder that maps token ids to logits or, given labels, to the loss of each token.

    The loss is computed without storing the logits of all tokens.
    """

    replaced: ClassVar[Mapping[str, str]] = {"model": "Use the model itself, which nothing wraps"}
    role = "model"
    communicator: ModelCommunicator = IDENTITY_MODEL
    host_inputs = ("cu_seqlens",)

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        c = spec.config
        self.spec, self.stage_layers = spec, current_stage_layers(c.num_layers)
        self.dtype = torch.get_default_dtype()  # dtype of activations
        self.input_vocab_size = c.vocab_size  # a scheduler checks batches by it
        # A tied head uses the embedding's weight, so a stage with a head but no embedding needs a copy of it.
        has_table = self.stage_layers.has_head and c.tie_word_embeddings
        if self.stage_layers.has_embedding or has_table:
            self.embedding = self._embedding()
        # Named by index in the whole model, so that checkpoints do not depend on the pipeline layout.
        self.layers = nn.ModuleDict(
            {str(index): Block(spec, chunk) for chunk, run in enumerate(self.stage_layers.chunks) for index in run}
        )
        if self.stage_layers.has_head:
            self.norm = ParallelNorm(c.hidden_size, c.norm_type, c.layer_norm_epsilon)
            self.output = ParallelHead(c.hidden_size, c.vocab_size, normal(c.out_head_init_std), c.parallel_output)
            self.output.chunk = len(self.stage_layers.chunks) - 1
        if has_table:
            self.output.weight = self.embedding.weight

    def _embedding(self) -> ParallelEmbedding:
        c, stage_layers = self.spec.config, self.stage_layers
        # The head is split by vocabulary entries, and a tied embedding must be split in the same way.
        split_hidden = c.embed_split_hidden and not c.tie_word_embeddings
        embedding = ParallelEmbedding(
            c.vocab_size, c.hidden_size, c.embedding_init_std, c.embed_grad_scale, split_hidden
        )
        if c.tie_word_embeddings and stage_layers.has_embedding != stage_layers.has_head:
            # Both ends of the pipeline hold a copy, and the gradient is the sum over the two.
            weight = embedding.weight
            set_placement(weight, replace(placement_of(weight), partial_over=ParallelMode.PIPELINE))
        return embedding

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of this pipeline stage, in forward order."""
        return list(self.layers.values())

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        indexes: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        grad_scale: Tensor | float = 1.0,
        chunk: int = 0,
        hidden: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        """Compute the logits, or with ``labels`` the loss of each token.

        Args:
            input_ids: Token ids: packed [T] with ``cu_seqlens``, or [B, S] without.
            cu_seqlens: Cumulative lengths of the packed sequences, [sequences + 1], best on the host: Python needs
                their values.
            indexes: Position of each token in its sequence, [T]; default: counted from the start of each sequence.
            labels: Labels, of the same shape as ``input_ids``; tokens with label -100 are ignored.
            label_smoothing: Label smoothing of the cross-entropy (arXiv 1512.00567, section 7).
            grad_scale: Factor that scales ``loss_sum`` of the result, and the gradients; a scalar on the device, or a
                number.
            chunk: Index of the chunk of this pipeline stage to run.
            hidden: Output of the previous chunk, [T, H]; None for the first chunk of the model.

        Returns:
            Hidden states [T, H] if ``chunk`` is not the last of the model; otherwise logits [*input_ids.shape, V], or
            with ``labels`` a :class:`TokenLoss`.
        """
        x = self._run_blocks(chunk, hidden, input_ids, cu_seqlens, indexes)  # [T, H]
        if not self.stage_layers.is_last(chunk):
            return x
        x = self.norm(x)  # [T, H]
        if labels is not None:
            return self.output.loss(x, labels.flatten(), label_smoothing, grad_scale)
        logits = self.output.logits(x)  # [T, V]
        if logits.shape[0] == input_ids.numel():
            return logits.view(*input_ids.shape, logits.shape[-1])
        return logits  # with parallel_output=False, also the logits of tokens of other ranks

    def hidden_like(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of the hidden states that a chunk passes on, given inputs of :meth:`forward`."""
        tokens = self.communicator.tokens_between_layers(inputs["input_ids"].numel())
        return (tokens, self.spec.config.hidden_size), self.dtype

    def _run_blocks(
        self, chunk: int, hidden: Tensor | None, input_ids: Tensor, cu_seqlens: Tensor | None, indexes: Tensor | None
    ) -> Tensor:
        """Run the embedding if ``hidden`` is None, then the blocks of ``chunk``."""
        sequences = _packed_sequences(input_ids, cu_seqlens)
        own = None if indexes is None else indexes.flatten()
        # Under isp a rank holds some tokens of a row, but attention needs the positions of all of them.
        positions = _positions(sequences) if own is None else self.communicator.whole_positions(own)  # [T]
        rotary = self._rotary(positions, sequences)  # two of [T, D/2]
        drop_in = self._dropout(positions.numel())
        x = drop_in(None)("embedding", self.embedding(input_ids.flatten())) if hidden is None else hidden  # [T, H]
        for index in self.stage_layers.chunks[chunk]:
            x = self.layers[str(index)](x, rotary, sequences, drop_in(index))  # [T, H]
        return x

    def _dropout(self, tokens: int) -> Callable[[int | None], Drop]:
        """Return a function that maps a layer index (None: the embedding) to the dropout of that layer.

        Args:
            tokens: Number of tokens of the packed row, including those that other ranks hold.
        """
        c = self.spec.config
        if not (c.drop_rate and self.training):
            return lambda layer: no_drop
        dropout = Dropout(c.drop_rate, not c.dropout_selective_checkpoint, current_dropout_key(), tokens)
        return lambda layer: partial(dropout, layer)

    def _rotary(self, positions: Tensor, sequences: PackedSequences) -> Rotary:
        c = self.spec.config
        return rotary_table(
            positions,
            c.head_size,
            RotaryScaling(
                base=c.rope_base,
                factor=c.rope_scaling_factor,
                dynamic_ntk=c.use_dynamic_ntk_rope,
                max_position=c.max_position_embeddings,
            ),
            runs=sequences.runs,
            dtype=self.dtype,
        )


def _packed_sequences(input_ids: Tensor, cu_seqlens: Tensor | None) -> PackedSequences:
    """Return the boundaries of the sequences in ``input_ids``; attention does not cross them."""
    if cu_seqlens is not None:
        return PackedSequences.from_cu_seqlens(cu_seqlens, input_ids.device)
    batch, seq_len = input_ids.shape
    return PackedSequences.uniform(batch, seq_len, input_ids.device)


def _positions(sequences: PackedSequences) -> Tensor:
    """Return the position of each token in its sequence, [T]."""
    bounds, tokens = sequences.cu_seqlens, sequences.tokens
    # Without output_size, repeat_interleave needs a host sync to compute it.
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=tokens)
    return torch.arange(tokens, device=bounds.device) - starts
