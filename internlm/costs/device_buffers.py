"""Formulas of memory that a run needs on an accelerator beside what it holds: transients, and buffers of NCCL.

======================  ==============================================================================================
logits of a chunk       C·⌈V/t⌉·(g + e), under isp C·V·(g + e); C·⌈V/t⌉·g in float32, as nothing is converted, and
                        where the loss saves the gradient of the logits, which then has its memory already
gradients of a block    4·T·F·e/t + S·H·e, T·H·e more under msp and fsp; 5·S·H for a mask of dropout if that is
                        more; plus what a recomputed block would save
transients              the larger of these two; on the stage with the head, less what head and loss saved
buffers of NCCL         :data:`NCCL_BYTES` for each communicator of more than one rank, an estimate
======================  ==============================================================================================

C is the number of tokens of a chunk of the loss. Other symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context.layout import Layout
from internlm.core.context.parallel_context import sizes_of
from internlm.costs.activations import attention_output, block, kernel, loss, norm, saves_logits_gradient
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


def gradients_of_block(s: Symbols) -> int:
    """Return the peak bytes of the gradients in the backward pass of one block; 0 on a stage without layers.

    The peak is at SwiGLU: its recomputed output, the gradients of its output, gate and up, and that of the block. A
    recomputed block also holds again what it would have saved. A mask of dropout, with its random numbers, may take
    more.
    """
    if not s.layers:
        return 0
    saved = 0
    if any(s.recomputed(chunk) for chunk in s.chunks):
        saved = sum(block(s).values()) - s.S * s.H * s.e  # its input is saved in any case
    elif s.spec.recomputes_attention:
        saved = attention_output(s) + kernel(s)
    gathered = s.T * s.H * s.e if s.mode in ("msp", "fsp") and s.t.size > 1 else 0  # the gradient of w2's output
    gradients = 4 * s.T * s.F * s.e // s.t.size + s.S * s.H * s.e + gathered
    masks = 5 * s.S * s.H if s.config.model.drop_rate else 0  # random numbers of 16 bits as int64, and the mask
    return max(gradients, masks) + saved


def transients(s: Symbols, tokens: int | None = None) -> int:
    """Return the peak bytes that the computation itself needs; see :func:`logits_of_chunk` for the arguments."""
    # Before the backward pass of a block, what head and loss saved has been freed.
    freed = sum(loss(s, tokens).values()) + norm(s) if s.stage_layers.has_head else 0
    return max(logits_of_chunk(s, tokens), gradients_of_block(s) - freed)


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
    ends = config.model.tie_word_embeddings and stages > 1 and stage in (0, stages - 1)
    return len({ranks for ranks in groups.values() if len(ranks) > 1}) + own_of_weights + 2 * neighbours + ends
