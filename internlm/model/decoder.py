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

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from internlm.core.context.group import NO_PIPELINE, Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import ParallelEmbedding, ParallelHead
from internlm.core.parallel.communicator import IDENTITY_MODEL, ModelCommunicator
from internlm.core.parallel.dropout import Drop, Dropout, current_dropout_key, no_drop
from internlm.core.parallel.param_state import placement_of, set_placement
from internlm.core.parallel.placement import normal
from internlm.core.parallel.sharding import current_stage_layers
from internlm.model.blocks import Block, Rotary, input_norm
from internlm.model.kv_cache import KVCache
from internlm.model.spec import DecoderSpec
from internlm.ops import PackedSequences, TokenLoss, rotary_table
from internlm.utils.compat import ReplacedNames
from internlm.utils.dtype import wide


class Decoder(ReplacedNames, nn.Module):
    """Decoder that maps token ids to logits or, given labels, to the loss of each token.

    The loss is computed without storing the logits of all tokens.
    """

    replaced: ClassVar[Mapping[str, str]] = {"model": "Use the model itself, which nothing wraps"}
    role = "model"
    communicator: ModelCommunicator = IDENTITY_MODEL
    host_inputs = ("cu_seqlens",)
    pipeline: Group = NO_PIPELINE  # set with the communicators; only generation, which has no scheduler, reads it

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
            {
                str(index): Block(spec, index, chunk)
                for chunk, run in enumerate(self.stage_layers.chunks)
                for index in run
            }
        )
        if self.stage_layers.has_head:
            self.norm = input_norm(spec)
            init = normal(c.out_head_init_std)
            self.output = ParallelHead(c.hidden_size, c.vocab_size, init, c.parallel_output, c.norm_head)
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
        cache: KVCache | None = None,
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
            cache: Keys and values of the tokens before ``input_ids``, which are then the next tokens [T] of the
                sequences of the cache. It takes the place of ``cu_seqlens`` and ``indexes``.

        Returns:
            Hidden states [T, H] if ``chunk`` is not the last of the model; otherwise logits [*input_ids.shape, V], or
            with ``labels`` a :class:`TokenLoss`, or with ``cache`` the logits of the last token of each sequence,
            [sequences, V], on every rank.
        """
        x = self._run_blocks(chunk, hidden, input_ids, cu_seqlens, indexes, cache)  # [T, H]
        if not self.stage_layers.is_last(chunk):
            return x
        if cache is not None:
            last = self.communicator.whole_tokens(x)[cache.last]
            return self.output.logits_of_whole(self.norm(last), cache.normalised_head)
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
        return (tokens, self.spec.config.hidden_size), self._residual_dtype

    @property
    def _residual_dtype(self) -> torch.dtype:
        return wide(self.dtype) if self.spec.config.residual_in_fp32 else self.dtype

    def _run_blocks(
        self,
        chunk: int,
        hidden: Tensor | None,
        input_ids: Tensor,
        cu_seqlens: Tensor | None,
        indexes: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Run the embedding if ``hidden`` is None, then the blocks of ``chunk``."""
        if cache is not None:
            sequences, positions = cache.sequences, cache.positions
        else:
            sequences = _packed_sequences(input_ids, cu_seqlens)
            own = None if indexes is None else indexes.flatten()
            # Under isp a rank holds some tokens of a row, but attention needs the positions of all of them.
            positions = _positions(sequences) if own is None else self.communicator.whole_positions(own)  # [T]
        # Layers with and without a window may have different angles; a chunk computes only those that it uses.
        lengths = None if cache is None or cache.is_prefill else cache.lengths
        rotary = functools.cache(partial(self._rotary, positions, sequences, lengths))
        drop_in = self._dropout(positions.numel())
        x = drop_in(None)("embedding", self._embed(input_ids)) if hidden is None else hidden  # [T, H]
        for index in self.stage_layers.chunks[chunk]:
            block = self.layers[str(index)]
            layer_cache = None if cache is None else cache.layer(index)
            table = rotary(block.is_local and self._has_local_rotary)
            x = block(x, table, sequences, drop_in(index), layer_cache)  # [T, H]
        return x

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Look up the first hidden states of the residual stream: [*] → [T, H]."""
        x: Tensor = self.embedding(input_ids.flatten())
        if self.spec.embedding_scale != 1.0:
            x = x * self.spec.embedding_scale
        return x.to(self._residual_dtype)

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

    @property
    def _has_local_rotary(self) -> bool:
        return self.spec.config.local_rope_base is not None

    def _rotary(
        self, positions: Tensor, sequences: PackedSequences, lengths: Sequence[int] | None, local: bool
    ) -> Rotary:
        """Compute the rotary table of the layers that attend to all tokens, or of the ``local`` ones: two [T, D/2].

        ``lengths`` are those of sequences with one new token each; None: all tokens of the sequences are new.
        """
        scaling = self.spec.local_rotary if local else self.spec.rotary
        dim, runs = self.spec.config.head_size, sequences.runs
        return rotary_table(positions, dim, scaling, runs=runs, lengths=lengths, dtype=self.dtype)


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
