"""What a decoder is made of, with nothing left open.

The decoder: embedding, blocks of attention and feed-forward, norm, head.

A rank of a pipeline holds the blocks of its :class:`~internlm.core.parallel.sharding.StageLayers`: the
blocks of its chunks under their numbers in the whole model, and embedding or head where they are its.

Shapes: B sequences, S tokens each (or one packed row), T = B · S tokens, H hidden, V vocabulary, G kv heads,
Q query heads per kv head, D head width, F intermediate width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.parallel.offload import Offloading
from internlm.core.parallel.param_state import placement_of, set_placement
from internlm.core.parallel.placement import normal
from internlm.core.parallel.sharding import current_stage_layers
from internlm.ops import PackedSequences, RotaryScaling, TokenLoss, attention, rotary_table, split_qkv_rotary, swiglu


@dataclass(frozen=True)
class DecoderSpec:
    """The config's ``model`` section, and the choices that its family made."""

    config: ModelConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_interleaved: bool

    @property
    def output_scale(self) -> float:
        """Factor on the deviation of projections that write into the residual stream (GPT-2, section 2.3)."""
        return 1 / math.sqrt(2 * self.config.num_layers) if self.config.use_scaled_init else 1.0

    @property
    def attention_backend(self) -> AttentionBackend:
        """The attention kernel asked for; ``use_flash_attn=False`` rules only the flash kernels out."""
        asked = self.config.attention_backend
        return "sdpa" if asked == "auto" and not self.config.use_flash_attn else asked

    def recomputes(self, number: int) -> bool:
        """Whether the layer of that number in the whole model is computed again in backward: a fraction of them, from
        the first on every so many, so that each stage of a pipeline has its share."""
        layers, recomputed = self.config.num_layers, self.config.recomputed_layers
        return number * recomputed % layers < recomputed

    @property
    def recomputes_attention(self) -> bool:
        """Whether of every layer the attention between its linears is computed again in backward."""
        return self.config.checkpoint == "selective"


#: cos and sin of the rotary angles, each [T, D/2].
Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions (arXiv 2104.09864)."""

    role = "attention"
    communicator: AttentionCommunicator = IDENTITY_ATTENTION

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        c = spec.config
        groups, per_group = c.kv_heads, c.num_attention_heads // c.kv_heads
        self.wqkv = ParallelLinear(
            c.hidden_size, (groups, per_group + 2, c.head_size), normal(c.attn_wqkv_init_std), spec.qkv_bias
        )
        out_init = normal(c.attn_other_init_std * spec.output_scale)
        self.wo = ParallelLinear(c.num_attention_heads * c.head_size, c.hidden_size, out_init, spec.o_bias, role="row")
        self.interleaved, self.backend = spec.qk_interleaved, spec.attention_backend
        self.recomputes = spec.recomputes_attention

    def forward(self, x: Tensor, norm: nn.Module, rotary: Rotary, sequences: PackedSequences) -> Tensor:
        """x: [T, H] → [T, H], normalised first."""
        qkv = self.communicator.to_heads(self.wqkv(x, before=norm))  # [T, G, Q + 2, D]
        attend = partial(self._attend, rotary=rotary, sequences=sequences)
        out: Tensor = self.wo(qkv, before=attend) if self.recomputes else self.wo(attend(qkv))
        return out

    def _attend(self, qkv: Tensor, rotary: Rotary, sequences: PackedSequences) -> Tensor:
        """All between the linears: [T, G, Q + 2, D] → [T, G·Q·D]."""
        q, k, v = split_qkv_rotary(qkv, *rotary, self.interleaved)  # [T, G·Q, D], [T, G, D], [T, G, D]
        heads = attention(q, k, v, sequences, backend=self.backend)  # [T, G·Q, D]
        return self.communicator.to_tokens(heads.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): W2 · (silu(W1 · x) * (W3 · x))."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        c = spec.config
        up_init = normal(c.ffn_uplayer_init_std)
        self.w13 = ParallelLinear(c.hidden_size, (2, c.intermediate_size), up_init, spec.mlp_bias, split_axis=1)
        out_init = normal(c.ffn_other_init_std * spec.output_scale)
        self.w2 = ParallelLinear(c.intermediate_size, c.hidden_size, out_init, spec.mlp_bias, role="row")

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x: [T, H] → [T, H], normalised first."""
        out: Tensor = self.w2(self.w13(x, before=norm), before=swiglu)  # [T, 2, F] → [T, F] → [T, H]
        return out


class Block(nn.Module):
    """x + Attention(norm(x)), then x + FeedForward(norm(x))."""

    def __init__(self, spec: DecoderSpec, chunk: int = 0) -> None:
        super().__init__()
        self.chunk = chunk  # of the pipeline stage
        c = spec.config
        norm = partial(ParallelNorm, c.hidden_size, c.norm_type, c.layer_norm_epsilon)
        self.attention_norm, self.attention = norm(), Attention(spec)
        self.ffn_norm, self.feed_forward = norm(), FeedForward(spec)

    def forward(self, x: Tensor, rotary: Rotary, sequences: PackedSequences, drop: Drop = no_drop) -> Tensor:
        """x: [T, H] → [T, H]."""
        x = x + drop("attention", self.attention(x, self.attention_norm, rotary, sequences))
        out: Tensor = x + drop("feed_forward", self.feed_forward(x, self.ffn_norm))
        return out


class Blocks(nn.Module):
    """The blocks that are held here, by their numbers in the whole model."""

    def __init__(self, blocks: Mapping[int, Block]) -> None:
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)

    def __getitem__(self, number: int) -> Block:
        block = self.get_submodule(str(number))
        assert isinstance(block, Block)
        return block

    def __iter__(self) -> Iterator[Block]:
        return (self[int(name)] for name in self._modules)


class Decoder(nn.Module):
    """Token ids to logits, or, given labels, to the loss of each token without ever holding all logits."""

    role = "model"
    communicator: ModelCommunicator = IDENTITY_MODEL

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        c = spec.config
        self.spec, self.stage_layers = spec, current_stage_layers(c.num_layers)
        self.dtype = torch.get_default_dtype()  # of activations
        holds_copy = self.stage_layers.has_head and c.tie_word_embeddings  # of the table, as the head's weight
        if self.stage_layers.has_embedding or holds_copy:
            self.embedding = self._embedding()
        self.layers = Blocks(
            {number: Block(spec, chunk) for chunk, numbers in enumerate(self.stage_layers.chunks) for number in numbers}
        )
        if self.stage_layers.has_head:
            self.norm = ParallelNorm(c.hidden_size, c.norm_type, c.layer_norm_epsilon)
            self.output = ParallelHead(c.hidden_size, c.vocab_size, normal(c.out_head_init_std), c.parallel_output)
            self.output.chunk = len(self.stage_layers.chunks) - 1
        if holds_copy:
            self.output.weight = self.embedding.weight

    def _embedding(self) -> ParallelEmbedding:
        c, stage_layers = self.spec.config, self.stage_layers
        # A table that is the head's weight too must be split like that.
        split_hidden = c.embed_split_hidden and not c.tie_word_embeddings
        embedding = ParallelEmbedding(
            c.vocab_size, c.hidden_size, c.embedding_init_std, c.embed_grad_scale, split_hidden
        )
        if c.tie_word_embeddings and stage_layers.has_embedding != stage_layers.has_head:  # the other end has a copy
            weight = embedding.weight
            set_placement(weight, replace(placement_of(weight), partial_over=ParallelMode.PIPELINE))
        return embedding

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        indexes: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        grad_scale: float = 1.0,
        chunk: int = 0,
        hidden: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        """Logits [*input_ids.shape, V], or a :class:`TokenLoss` where ``labels`` (of the shape of ``input_ids``) are
        given.

        input_ids: [T] packed, with ``cu_seqlens`` [sequences + 1], its boundaries, and ``indexes`` [T] the position
        within each; or [B, S] without them. ``loss_sum`` of the result is ``grad_scale`` times the sum of the token
        losses. Of a model in parts, ``chunk`` takes the output of the chunk before it as ``hidden``, [T, H], and gives
        its own, but the last.
        """
        x = self._blocks(chunk, hidden, input_ids, cu_seqlens, indexes)
        if not self.stage_layers.is_last(chunk):
            return x
        x = self.norm(x)
        if labels is None:
            logits = self.output.logits(x)
            own = logits.shape[0] == input_ids.numel()  # not those of other ranks' tokens besides
            return logits.view(*(input_ids.shape if own else logits.shape[:1]), logits.shape[-1])
        return self.output.loss(x, labels.flatten(), label_smoothing, grad_scale)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks held here, in forward order."""
        return list(self.layers)

    def hidden_like(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of what a chunk gives that is not the last, for these inputs of :meth:`forward`."""
        tokens = self.communicator.tokens_between_layers(inputs["input_ids"].numel())
        return (tokens, self.spec.config.hidden_size), self.dtype

    def _blocks(
        self, chunk: int, hidden: Tensor | None, input_ids: Tensor, cu_seqlens: Tensor | None, indexes: Tensor | None
    ) -> Tensor:
        """The output of the last block of ``chunk``: [T, H]."""
        sequences = _packed_sequences(input_ids, cu_seqlens)
        own = None if indexes is None else indexes.flatten()
        positions = _positions(sequences) if own is None else self.communicator.whole_positions(own)
        rotary = self._rotary(positions, sequences)
        drop_in = self._dropout(positions.numel())
        x = drop_in(None)("embedding", self.embedding(input_ids.flatten())) if hidden is None else hidden  # [T, H]
        offloading = self._offloading(chunk, (*rotary, sequences.cu_seqlens, *([] if hidden is None else [hidden])))
        for place, number in enumerate(self.stage_layers.chunks[chunk]):
            run = partial(self._block, number, rotary=rotary, sequences=sequences, drop=drop_in(number))
            x = offloading.run(place, run, x)
        offloading.finish()
        return x

    def _block(self, number: int, x: Tensor, rotary: Rotary, sequences: PackedSequences, drop: Drop) -> Tensor:
        """x: [T, H] → [T, H]."""
        run: Callable[..., Tensor] = self.layers[number]
        if self.spec.recomputes(number) and torch.is_grad_enabled():
            # Nothing in a block draws from the common generators, so their state need not be kept.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        return run(x, rotary, sequences, drop)

    def _dropout(self, tokens: int) -> Callable[[int | None], Drop]:
        """What drops in each layer, by its number, and at the embedding; ``tokens``: of the row."""
        c = self.spec.config
        if not (c.drop_rate and self.training):
            return lambda layer: no_drop
        dropout = Dropout(c.drop_rate, not c.dropout_selective_checkpoint, current_dropout_key(), tokens)
        return lambda layer: partial(dropout, layer)

    def _offloading(self, chunk: int, shared: Iterable[Tensor]) -> Offloading:
        """Of a pass through ``chunk``, whose blocks share ``shared``."""
        count = self.spec.config.cpu_offloading if torch.is_grad_enabled() else 0
        numbers = self.stage_layers.chunks[chunk][:count]
        parameters = (
            local_shard(parameter).flat for number in numbers for parameter in self.layers[number].parameters()
        )
        return Offloading(len(numbers), [*parameters, *shared])

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
            seq_len=sequences.max_seqlen,
            dtype=self.dtype,
        )


def _packed_sequences(input_ids: Tensor, cu_seqlens: Tensor | None) -> PackedSequences:
    """Boundaries of the sequences, across which no token attends."""
    if cu_seqlens is not None:
        return PackedSequences.from_cu_seqlens(cu_seqlens)
    batch, seq_len = input_ids.shape
    return PackedSequences.uniform(batch, seq_len, input_ids.device)


def _positions(sequences: PackedSequences) -> Tensor:
    """Position of each token within its sequence: [T]."""
    bounds, tokens = sequences.cu_seqlens, sequences.tokens
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=tokens)
    return torch.arange(tokens, device=bounds.device) - starts
