"""Formulas of memory that a run needs on an accelerator beside what it holds: transients, and buffers of NCCL.

Transients are the bytes by which the peak within an action exceeds the most that is saved between two actions. Within
an action, beside what its rank saved before:

==========================  ==========================================================================================
F of the last chunk         what it saves, and the logits of a chunk of the loss: C·⌈V/t⌉·(g + e), under isp
                            C·V·(g + e); C·⌈V/t⌉·g in float32, as nothing is converted, and where the loss saves the
                            gradient of the logits, which then has its memory already; else the input of the loss,
                            T·H·e (isp: S·H·e), under msp and fsp S·H·e more; a normalised head, ⌈V/t⌉·H·e, under isp
                            V·H·e
B, at the loss              the gradient of a normalised head, of the same size; afterwards also twice the rows of it
                            that the rank holds, in g bytes an element
B, at each layer            its gradients: 4·T·F·e/t + S·H·x, S·H·e more with a norm of outputs or if x ≠ e, T·H·e more
                            under msp and fsp; 5·S·H for a mask of dropout if that is more; plus what a recomputed
                            layer would save. What head, loss and later layers saved has been freed; a B that defers
                            weight gradients keeps their factors instead. If the layer, or the one before it, is
                            offloaded, what it saved is back. Under ``zero1.fsdp`` the gradients of head and w2, V·H·g
                            and H·F·g, wait for their reduction
B of the first chunk        at its end, the gradient of the embedding, ⌈V/t⌉·H·e, and of its output
==========================  ==========================================================================================

Beside adapters, embedding, head and w2 have no gradients. If w2 has an adapter, 6·T·F·e/t takes the place of
4·T·F·e/t: both compute a gradient of the input, one after the other.

Buffers of NCCL take :data:`NCCL_BYTES` for each communicator of more than one rank, an estimate. C is the number of
tokens of a chunk of the loss. Other symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from internlm.accelerator import HOST
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context.layout import Layout
from internlm.core.context.parallel_context import sizes_of
from internlm.core.scheduler.actions import BACKWARD, FORWARD
from internlm.costs.activations import (
    kept_after_each_action,
    loss,
    norm,
    saved_by_layer,
    saves_logits_gradient,
)
from internlm.costs.block_activations import attention_output, block, block_for_weights, kernel
from internlm.costs.stages import table_of
from internlm.costs.symbols import Symbols, rows_per_rank
from internlm.ops.cross_entropy import default_chunk_tokens

#: Channels that NCCL opens for a communicator on machines with NVLink; ``NCCL_MAX_CTAS`` limits them.
NCCL_CHANNELS = 16
#: Bytes of the buffer of a channel in one direction, NCCL's default of ``NCCL_BUFFSIZE``.
NCCL_BUFFER = 2**22
#: Bytes of the buffers of a communicator.
NCCL_BYTES = 2 * NCCL_CHANNELS * NCCL_BUFFER

#: Modes whose groups run collectives in a training step; NCCL connects the ranks of a group at its first collective.
_USED = (
    ParallelMode.GLOBAL,
    ParallelMode.DATA,
    ParallelMode.TENSOR,
    ParallelMode.PIPELINE,
    ParallelMode.ZERO1,
    ParallelMode.ZERO1_REPLICA,
    ParallelMode.WEIGHT,
    ParallelMode.WEIGHT_DATA,
    ParallelMode.ISP_DATA,
)


def logits_of_chunk(s: Symbols, tokens: int | None = None) -> int:
    """Return the peak bytes of the logits of one chunk of the loss; 0 on a stage without the head.

    They exist in g bytes an element, in which the loss is computed; their gradient is then converted to e bytes.
    Neither survives the chunk, unless the loss saves that gradient for all tokens.

    Args:
        s: Symbols of the stage.
        tokens: Number of tokens in the loss, K; by default all tokens of a micro-batch.
    """
    if not s.stage_layers.has_head:
        return 0
    rows, labels = (s.V, s.S) if s.mode == "isp" else (rows_per_rank(s.V, s.t), s.T)
    chunk = min(default_chunk_tokens(s.on_host, rows), labels if tokens is None else tokens)
    converted = s.e < s.g and not saves_logits_gradient(s, tokens)
    return chunk * rows * (s.g + converted * s.e)


def gradients_of_block(s: Symbols, layer: int) -> int:
    """Return the peak bytes of the gradients in the backward pass of the layer of index ``layer``.

    The peak is at SwiGLU: its recomputed output, the gradients of its output, gate and up, and that of the block. A
    recomputed block also holds again what it would have saved. A mask of dropout, with its random numbers, may take
    more.
    """
    saved = 0
    if s.config.model.recomputes(layer):
        saved = sum(block(s, layer).values()) - s.S * s.H * s.x  # its input is saved in any case
    elif s.spec.recomputes_attention:
        saved = attention_output(s) + kernel(s, layer)
    gathered = s.T * s.H * s.e if s.mode in ("msp", "fsp") and s.t.size > 1 else 0  # the gradient of w2's output
    # That of the output of w2, where it is not that of the block.
    branch = s.S * s.H * s.e if s.spec.normalises_output or s.x != s.e else 0
    lora = s.config.model.lora
    twice = lora is not None and "w2" in lora.targets
    gradients = (6 if twice else 4) * s.T * s.F * s.e // s.t.size + s.S * s.H * s.x + branch + gathered
    masks = 5 * s.S * s.H if s.config.model.drop_rate else 0  # random numbers of 16 bits as int64, and the mask
    return max(gradients, masks) + saved


def transients(
    config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0, device_type: str = HOST.type
) -> int:
    """Return the bytes by which the peak within an action exceeds :func:`~internlm.costs.activations.peak_saved`.

    Arguments are those of :func:`~internlm.costs.activations.saved_for_backward`.
    """
    s, table = Symbols.of(config, world_size, stage, device_type=device_type), table_of(config)
    kept = kept_after_each_action(config, world_size, tokens, stage=stage, device_type=device_type)
    peaks = list(kept)
    for action, before, after in zip(table.actions[stage], [0, *kept], kept, strict=False):
        if action.type == FORWARD and s.stage_layers.is_last(action.chunk):
            peaks.append(after + logits_of_chunk(s, tokens) + _normalised_head(s) + _loss_input(s, tokens))
        elif action.type == BACKWARD:
            peaks.append(before + _backward_peak(s, action.chunk, tokens, table.defers_weight(stage, action)))
            if s.stage_layers.is_first(action.chunk) and s.trains_base:
                peaks.append(after + _vocab_gradient(s) + s.S * s.H * s.x)
    return max(peaks) - max(kept)


def _backward_peak(s: Symbols, chunk: int, tokens: int | None, defers: bool) -> int:
    """Return the peak bytes in the backward pass of a chunk, beside those that are saved before it."""
    layers, offloaded = s.stage_layers.chunks[chunk], s.config.model.cpu_offloading
    held, peaks, unreduced = 0, [0], s.trains_base * s.shares_parameters * s.H * s.g
    if s.stage_layers.is_last(chunk):
        # fully_shard reduces the gradient of the head, which is in the root, at the end of the backward pass.
        held += unreduced * rows_per_rank(s.V, s.split)
        peaks += [held, s.trains_base * _normalised_head(s)]
        held -= sum(loss(s, tokens).values()) + norm(s)
        # Else it is added to the main gradient at once.
        peaks.append(held + (s.trains_base and s.w.size > 1) * _vocab_gradient(s))
        if normalised := s.trains_base * _normalised_head(s):
            peaks.append(held + normalised + 2 * rows_per_rank(s.V, s.split) * s.H * s.g)
    kept = defers * sum(block_for_weights(s).values())
    for position, layer in reversed(list(enumerate(layers))):
        # The layer before is fetched already.
        fetched = sum(saved_by_layer(s, layers[index]) for index in (position - 1, position) if 0 <= index < offloaded)
        peaks.append(held + fetched + gradients_of_block(s, layer) + unreduced * s.F // s.t.size)  # of w2
        held += kept - (position >= offloaded) * saved_by_layer(s, layer)
    return max(peaks)


def _loss_input(s: Symbols, tokens: int | None) -> int:
    """Return the bytes of the output of the final norm, and of its gathered copy; 0 if the loss saves its input."""
    gathered = s.T if s.S < s.T and s.mode != "isp" else 0
    return 0 if saves_logits_gradient(s, tokens) else (s.S + gathered) * s.H * s.e


def _normalised_head(s: Symbols) -> int:
    """Return the bytes of the normalised weight of the head (``model.norm_head``), whole under isp; 0 without it."""
    rows = s.V if s.mode == "isp" else rows_per_rank(s.V, s.t)
    return rows * s.H * s.e if s.config.model.norm_head else 0


def _vocab_gradient(s: Symbols) -> int:
    """Return the bytes of the gradient of embedding or head before it is added to the main gradient.

    Under isp it takes as much as the gathered weight did, whose buffer is counted and free by then; and more for the
    reduced shard, and for a copy with padding.
    """
    if s.w.size == 1:
        return rows_per_rank(s.V, s.split) * s.H * s.e
    shard = rows_per_rank(s.V, s.w)
    return (shard + (s.V % s.w.size > 0) * shard * s.w.size) * s.H * s.e


def nccl_buffers(config: Config, world_size: int, stage: int) -> int:
    """Return the estimated bytes of NCCL's buffers on a rank of pipeline stage ``stage``."""
    return communicators(config, world_size, stage) * NCCL_BYTES


def communicators(config: Config, world_size: int, stage: int) -> int:
    """Return the number of communicators of more than one rank that a rank of pipeline stage ``stage`` uses.

    Groups of the same ranks share one, except that isp's weights have their own. Each direction between two
    neighbouring stages has one.
    """
    layout, parallel = Layout(sizes_of(config, world_size)), config.parallel
    stages = parallel.pipeline.size
    rank = layout.group_of(0, ParallelMode.PIPELINE)[stage]
    groups = {mode: tuple(layout.group_of(rank, mode)) for mode in _USED}
    own_of_weights = len(groups[ParallelMode.WEIGHT]) > 1 and groups[ParallelMode.WEIGHT] == groups[ParallelMode.TENSOR]
    has_ring = config.parallel.pipeline.mode == "1F1B" and config.model.num_chunks > 1 and stages > 2
    neighbours = 2 if has_ring else (stage > 0) + (stage < stages - 1)
    ends = config.model.tie_word_embeddings and config.model.lora is None and stages > 1 and stage in (0, stages - 1)
    return len({ranks for ranks in groups.values() if len(ranks) > 1}) + own_of_weights + 2 * neighbours + ends
