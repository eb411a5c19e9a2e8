"""Formulas of activation memory: bytes that autograd saves for a micro-batch, and their peak over a schedule.

Every storage that autograd saves is counted once. Parameters are not counted, nor are the weights that isp gathers,
because each is released after the matmul that uses it. Where a norm or SwiGLU precedes a linear, only the input of the
norm or SwiGLU is saved, and backward recomputes the input of the linear from it (Korthikanti et al. 2022, arXiv
2205.05198, section 5, recompute cheap operations in the same way). :func:`~internlm.costs.block_activations.block`
lists the tensors that a block saves. Vectors of H elements are not counted, such as a norm's weight plus its offset.

With ``model.checkpoint="selective"``, attention is recomputed too, from the q, k and v that wqkv returned. Dropout
masks, one byte per element, are saved unless backward draws them again. For the first ``model.cpu_offloading`` layers
of a chunk, all saved tensors are moved to host memory, except for the hidden states received from the previous stage.

In a pipeline, every chunk saves its own activations. The hidden states that a chunk receives are counted as the input
of its first block. The output of a chunk is released once it is sent. Messages between stages are not counted.

A (chunk, micro-batch) pair is in flight from its forward action (F) to its last action: the one for weight gradients
(W), or backward (B) if the schedule does not defer weight gradients (Qi et al. 2023, zero bubble, arXiv 2401.10241).
The pair holds the bytes of :func:`saved_for_backward` from F to B, and those of :func:`kept_for_weights` from B to W. A
rank runs one action at a time, so the peak depends only on the order of its actions.

Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from internlm.accelerator import HOST
from internlm.config import Config
from internlm.core.scheduler.actions import BACKWARD, FORWARD, Table
from internlm.costs.block_activations import (
    RESIDUAL,
    block,
    block_for_weights,
    mask,
    norm_input,
    saves_input,
)
from internlm.costs.flops import attention_has_grad
from internlm.costs.stages import table_of
from internlm.costs.symbols import Symbols, rows_per_rank
from internlm.ops.cross_entropy import keeps_dlogits
from internlm.utils.dtype import torch_dtype

TOKEN_IDS = "embedding: token ids"
MASK = "embedding: mask of dropout"
ROTARY = "rotary: cosines and sines"
RECOMPUTED = "recomputed block: input"
NORM = "final norm"
LOSS_INPUT = "loss: gradient of its input"
LOSS_WEIGHT = "loss: gradient of the head's weight"
LOSS_LOGITS = "loss: its input and the gradient of the logits"


def saved_for_backward(
    config: Config,
    world_size: int,
    tokens: int | None = None,
    *,
    stage: int = 0,
    chunk: int | None = None,
    device_type: str = HOST.type,
) -> dict[str, int]:
    """Return the bytes, by tensor, that a rank saves on the device from forward to backward of a micro-batch.

    Args:
        config: Resolved config.
        world_size: Number of ranks of the run.
        tokens: Number of tokens that take part in the loss, K; by default all, as if no label were ignored.
        stage: Pipeline stage of the rank.
        chunk: Chunk of the stage; by default bytes are summed over all its chunks.
        device_type: Type of the device, which decides the attention kernel and what the loss saves.

    Raises:
        NoCostFormulaError: The model is not of a built-in family.
    """
    s = Symbols.of(config, world_size, stage, device_type=device_type)
    return _sum_over_chunks(s, chunk, lambda index: _saved_by_chunk(s, index, tokens))


def saved_on_host(
    config: Config,
    world_size: int,
    *,
    stage: int = 0,
    chunk: int | None = None,
    device_type: str = HOST.type,
) -> dict[str, int]:
    """Return the bytes, by tensor, that a rank saves in host memory for a micro-batch (``model.cpu_offloading``).

    Arguments and exceptions are those of :func:`saved_for_backward`.
    """
    s = Symbols.of(config, world_size, stage, device_type=device_type)
    return _sum_over_chunks(s, chunk, lambda index: _offloaded_by_chunk(s, index))


def kept_for_weights(config: Config, world_size: int, *, stage: int = 0, chunk: int | None = None) -> dict[str, int]:
    """Return the bytes, by tensor, that a rank keeps for the deferred weight gradients of a micro-batch.

    The rank keeps them from the backward action (B) to the weight-gradient action (W). Only the linears of blocks defer
    weight gradients; all other gradients are computed in B. Arguments and exceptions are those of
    :func:`saved_for_backward`.
    """
    s = Symbols.of(config, world_size, stage)
    return _sum_over_chunks(s, chunk, lambda index: _times(len(s.stage_layers.chunks[index]), block_for_weights(s)))


def _sum_over_chunks(s: Symbols, chunk: int | None, tensors: Callable[[int], dict[str, int]]) -> dict[str, int]:
    """Return ``tensors(chunk)``, the bytes of a chunk by tensor; if ``chunk`` is None, sum them over all chunks."""
    by_chunk = [tensors(index) for index in (s.chunks if chunk is None else [chunk])]
    return _total(by_chunk)


def _total(tables: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(sizes[name] for sizes in tables) for name in tables[0]}


def _saved_by_chunk(s: Symbols, chunk: int, tokens: int | None) -> dict[str, int]:
    """Return the bytes that a chunk saves on the device, by tensor.

    Every chunk saves the tensors of its blocks and its rotary tables. The first chunk of the model also saves those of
    the embedding, and the last chunk those of the final norm and the loss.
    """
    first, last = s.stage_layers.is_first(chunk), s.stage_layers.is_last(chunk)
    _, on_device = _offloaded_and_not(s, chunk)
    saved = {
        TOKEN_IDS: first * token_ids(s),
        MASK: first * s.trains_base * mask(s),
        ROTARY: rotary(s, s.stage_layers.chunks[chunk]),
        **_layers(s, on_device),
        NORM: last * norm(s),
        **_times(last, loss(s, tokens)),
    }
    for name, size in _received_input(s, chunk).items():
        saved[name] += size
    return saved


def _offloaded_by_chunk(s: Symbols, chunk: int) -> dict[str, int]:
    offloaded, _ = _offloaded_and_not(s, chunk)
    on_device = _received_input(s, chunk)
    return {name: max(size - on_device.get(name, 0), 0) for name, size in _layers(s, offloaded).items()}


def _offloaded_and_not(s: Symbols, chunk: int) -> tuple[range, range]:
    """Return the indices of the offloaded layers of a chunk, and of its other layers."""
    layers, offloaded = s.stage_layers.chunks[chunk], s.config.model.cpu_offloading
    return layers[:offloaded], layers[offloaded:]


def _received_input(s: Symbols, chunk: int) -> dict[str, int]:
    """Return the bytes, by tensor, of the received hidden states that a chunk keeps, but none of its layers saves.

    They are the input of the chunk's first layer, and take S·H·x. The result is empty if that layer saves them on the
    device, or is the first layer of the model.
    """
    offloaded, _ = _offloaded_and_not(s, chunk)
    recomputes = s.config.model.recomputes(s.stage_layers.chunks[chunk][0])
    # The scheduler keeps the received tensor, because its gradient is sent back: offloading a copy would free nothing.
    if s.stage_layers.is_first(chunk) or (not offloaded and (recomputes or saves_input(s))):
        return {}
    return {RECOMPUTED if recomputes else RESIDUAL: s.S * s.H * s.x}


def _layers(s: Symbols, layers: range) -> dict[str, int]:
    """Return the bytes, by tensor, that ``layers`` save.

    A recomputed layer saves only its input, S·H·x. Any other layer saves the tensors of
    :func:`~internlm.costs.block_activations.block`.
    """
    recomputes = s.config.model.recomputes
    saved = _total([_times(0, block(s, 0)), *(block(s, layer) for layer in layers if not recomputes(layer))])
    return {**saved, RECOMPUTED: sum(map(recomputes, layers)) * s.S * s.H * s.x}


def saved_by_layer(s: Symbols, layer: int) -> int:
    """Return the bytes that the layer of index ``layer`` saves, on the device or offloaded."""
    return sum(_layers(s, range(layer, layer + 1)).values())


def _times(count: int, sizes: dict[str, int]) -> dict[str, int]:
    return {name: count * size for name, size in sizes.items()}


def token_ids(s: Symbols) -> int:
    """Return the bytes that the embedding lookup saves: token ids, 8·T (isp: 8·T/t), and possibly a mask, T.

    Only an embedding that is split by vocabulary entries has the mask, which marks the tokens whose entries other ranks
    hold. A frozen embedding saves nothing.
    """
    if not s.trains_base:
        return 0
    if s.mode == "isp":
        return 8 * s.S
    by_entries = s.config.model.tie_word_embeddings or not s.config.model.embed_split_hidden
    return (9 if by_entries and s.t.size > 1 else 8) * s.T


def rotary(s: Symbols, layers: Iterable[int]) -> int:
    """Return the bytes of the rotary cosines and sines that ``layers`` of a chunk share, T·D·e for each table.

    Both are [T, D/2]; every rank needs all positions of a row. With ``local_rope_base`` there are two tables: one for
    layers with a sliding window, and one for the other layers.
    """
    model = s.config.model
    used = [layer for layer in layers if attention_has_grad(model, layer)]
    bases = {model.window(layer) is not None and model.local_rope_base is not None for layer in used}
    return len(bases) * s.T * s.D * s.e


def norm(s: Symbols) -> int:
    """Return the bytes that the final norm saves, whose input takes S·H·x."""
    return norm_input(s, s.x)


def loss(s: Symbols, tokens: int | None) -> dict[str, int]:
    """Return the bytes, by tensor, that the head and the loss save.

    They save the gradients of the head, which are computed together with the loss, but neither its input nor the
    logits. The gradient of the input takes K·H·e, plus 8·K for token positions if some labels are ignored. The gradient
    of the weight takes ⌈V/t⌉·H·g, under isp V·H·g. An accelerator saves the input and the gradient of the logits
    instead, K·(H + ⌈V/t⌉)·e, if they take no more memory (:func:`internlm.ops.cross_entropy.keeps_dlogits`). A frozen
    head has no gradient of the weight.
    """
    rows, labels = (s.V, s.S) if s.mode == "isp" else (rows_per_rank(s.V, s.t), s.T)
    kept = labels if tokens is None else tokens
    # Rows without a valid label are dropped before the head, and their positions restore them.
    positions = 8 * kept if kept < labels else 0
    keeps = saves_logits_gradient(s, tokens)
    return {
        LOSS_INPUT: kept * s.H * s.e + positions,
        LOSS_WEIGHT: (s.trains_base and not keeps) * rows * s.H * s.g,
        LOSS_LOGITS: keeps * kept * (s.H + rows) * s.e,
    }


def saves_logits_gradient(s: Symbols, tokens: int | None) -> bool:
    """Return whether the loss saves its input and the gradient of the logits; see :func:`loss`."""
    rows, labels = (s.V, s.S) if s.mode == "isp" else (rows_per_rank(s.V, s.t), s.T)
    dtype = torch_dtype(str(s.config.model.dtype))
    return s.trains_base and keeps_dlogits(s.on_host, dtype, labels if tokens is None else tokens, rows, s.H)


# -- activations in flight


def peak_saved(
    config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0, device_type: str = HOST.type
) -> int:
    """Return the peak bytes of saved tensors that a rank of ``stage`` holds between two actions of its schedule.

    Within an action the peak may be higher: gradients of activations, and tensors of a recomputed block, are not
    counted. Arguments and exceptions are those of :func:`saved_for_backward`.
    """
    return max(kept_after_each_action(config, world_size, tokens, stage=stage, device_type=device_type))


def kept_after_each_action(
    config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0, device_type: str = HOST.type
) -> list[int]:
    """Return the bytes of saved tensors that a rank of ``stage`` holds after each action of its schedule, in order.

    Arguments and exceptions are those of :func:`saved_for_backward`.
    """
    table = table_of(config)
    chunks = range(table.stage_layout.chunks)
    by_chunk = [
        saved_for_backward(config, world_size, tokens, stage=stage, chunk=chunk, device_type=device_type)
        for chunk in chunks
    ]
    saved = [sum(tensors.values()) for tensors in by_chunk]
    deferred = [sum(kept_for_weights(config, world_size, stage=stage, chunk=c).values()) for c in chunks]
    return _after_each_action(table, stage, saved, deferred)


def peak_on_host(config: Config, world_size: int, *, stage: int = 0, device_type: str = HOST.type) -> int:
    """Return the peak bytes of tensors that a rank of ``stage`` has offloaded to host memory.

    Arguments and exceptions are those of :func:`saved_for_backward`.
    """
    table = table_of(config)
    chunks = range(table.stage_layout.chunks)
    by_chunk = [saved_on_host(config, world_size, stage=stage, chunk=c, device_type=device_type) for c in chunks]
    offloaded = [sum(tensors.values()) for tensors in by_chunk]
    return max(_after_each_action(table, stage, offloaded, [0] * len(chunks)))


def _after_each_action(table: Table, stage: int, forward: Sequence[int], deferred: Sequence[int]) -> list[int]:
    """Return the bytes that a rank of ``stage`` holds after each action.

    Args:
        table: Table of actions.
        stage: Pipeline stage of the rank.
        forward: Bytes that F adds for a micro-batch, by chunk.
        deferred: Bytes to which a B that defers weight gradients reduces them, by chunk.
    """
    in_flight: dict[tuple[int, int], int] = {}
    totals = []
    # F adds a pair. A B that defers weight gradients replaces the pair's tensors by those for W. The last action frees
    # the pair.
    for action in table.actions[stage]:
        pair = action.chunk, action.micro_batch
        if action.type == FORWARD:
            in_flight[pair] = forward[action.chunk]
        elif action.type == BACKWARD and table.defers_weight(stage, action):
            in_flight[pair] = deferred[action.chunk]
        else:
            del in_flight[pair]
        totals.append(sum(in_flight.values()))
    return totals
