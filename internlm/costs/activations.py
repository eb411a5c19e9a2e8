"""What a micro-batch keeps for its backward pass, by formula: bytes on each rank, from the config alone.

The symbols are those of :mod:`internlm.costs.symbols`; besides

==========  =========================================================================================================
K           tokens that take part in the loss, of those whose labels this rank has: T, under isp T/t
L, R        layers of a chunk, and those of them that are recomputed (``model.checkpoint``)
==========  =========================================================================================================

Counted is what autograd saves, each storage once; parameters are not, nor the weights that isp gathers, which are
given up after each product. A linear saves its input alone: what a norm or SwiGLU made of it is made again in
backward. So a block keeps four tensors of its own, the queries, keys and values, and what :func:`kernel` tells.

With ``model.checkpoint="selective"`` the attention between its linears is computed again too, and the queries, keys and
values are kept as their product gave them. Masks of dropout, a byte for each element, are kept if they are not to be
drawn again. Of the first ``model.cpu_offloading`` layers of a chunk all this is kept on the host, but for what the
chunk was sent.

In a pipeline each chunk keeps its own. The hidden units that it was sent are the input of its first block, and counted
there; its output is kept by nobody once it was sent. What is on its way between stages is not counted.

What a stage of a pipeline keeps of all micro-batches and chunks that are in flight, from the config alone.

A pair of micro-batch and chunk is in flight from its F to its last action: W, or B where the schedule puts no weights
off. From F to B it keeps what :func:`~internlm.costs.activations.saved_for_backward` tells, from B to W what
:func:`~internlm.costs.activations.kept_for_weights` tells. A rank does one thing at a time, so the order of its actions
alone says what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable

from internlm.config import Config
from internlm.core.scheduler.actions import BACKWARD, FORWARD, Table
from internlm.core.scheduler.table import make_table, schedule_of
from internlm.costs.stages import own_table
from internlm.costs.symbols import Symbols

TOKEN_IDS = "embedding: token ids"
MASK = "embedding: mask of dropout"
ROTARY = "rotary: cosines and sines"
RESIDUAL = "block: residual inputs"
GATHERED = "block: kept gathered inputs"
QKV = "block: queries, keys, values"
HEADS = "block: attention output"
KERNEL = "block: sums and output of the attention kernel"
GATE_UP = "block: gate and up"
MASKS = "block: masks of dropout"
RECOMPUTED = "recomputed block: input"
NORM = "final norm"
LOSS_INPUT = "loss: gradient of its input"
LOSS_WEIGHT = "loss: gradient of the head's weight"

NORMALISED = "block: normalised inputs"
SWIGLU = "block: input of w2"
GRAD_QKV = "block: gradient of queries, keys, values"
GRAD_GATE_UP = "block: gradient of gate and up"
GRAD_RESIDUAL = "block: gradients of residual outputs"


def saved_for_backward(
    config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0, chunk: int | None = None
) -> dict[str, int]:
    """Bytes of each part that a rank of pipeline stage ``stage`` holds on its device between the forward and the
    backward pass of one micro-batch: of all its chunks together, or of ``chunk``.

    ``tokens``: K; without it, no label is ignored. ``config`` is resolved. Raises KeyError for a model that is not
    ours.
    """
    s = Symbols.of(config, world_size, stage)
    return _of_chunks(s, chunk, lambda each: _saved(s, each, tokens))


def saved_on_host(config: Config, world_size: int, *, stage: int = 0, chunk: int | None = None) -> dict[str, int]:
    """The same in host memory (``model.cpu_offloading``)."""
    s = Symbols.of(config, world_size, stage)
    return _of_chunks(s, chunk, lambda each: _on_host(s, each))


def kept_for_weights(config: Config, world_size: int, *, stage: int = 0, chunk: int | None = None) -> dict[str, int]:
    """The same between the backward pass and the gradients of the weights, where a schedule puts these off: what the
    linears of blocks need for theirs. All else is computed in the backward pass."""
    s = Symbols.of(config, world_size, stage)
    return _of_chunks(s, chunk, lambda each: _times(len(s.stage_layers.chunks[each]), block_for_weights(s)))


def _of_chunks(s: Symbols, chunk: int | None, parts: Callable[[int], dict[str, int]]) -> dict[str, int]:
    """The sum of ``parts`` of all chunks, or those of one."""
    each = [parts(number) for number in (s.chunks if chunk is None else [chunk])]
    return {part: sum(sizes[part] for sizes in each) for part in each[0]}


def _saved(s: Symbols, chunk: int, tokens: int | None) -> dict[str, int]:
    """By ``chunk``: rotary table and blocks; by the first also the token ids, by the last norm and loss."""
    first, last = s.stage_layers.is_first(chunk), s.stage_layers.is_last(chunk)
    _, here = _by_place(s, chunk)
    parts = {
        TOKEN_IDS: first * token_ids(s),
        MASK: first * mask(s),
        ROTARY: rotary(s),
        **_layers(s, here),
        NORM: last * norm(s),
        **_times(last, loss(s, tokens)),
    }
    for part, size in _sent_input(s, chunk).items():
        parts[part] += size
    return parts


def _on_host(s: Symbols, chunk: int) -> dict[str, int]:
    away, _ = _by_place(s, chunk)
    stays = _sent_input(s, chunk)
    return {part: size - stays.get(part, 0) for part, size in _layers(s, away).items()}


def _by_place(s: Symbols, chunk: int) -> tuple[range, range]:
    """Layers of ``chunk`` that are offloaded, and those that are not."""
    numbers, offloaded = s.stage_layers.chunks[chunk], s.config.model.cpu_offloading
    return numbers[:offloaded], numbers[offloaded:]


def _sent_input(s: Symbols, chunk: int) -> dict[str, int]:
    """S·H·e that stay here though the first layer is offloaded: what a chunk was sent waits for its gradient."""
    away, _ = _by_place(s, chunk)
    part = RECOMPUTED if away and s.config.model.recomputes(away[0]) else RESIDUAL
    return {part: s.S * s.H * s.e} if away and not s.stage_layers.is_first(chunk) else {}


def _layers(s: Symbols, numbers: range) -> dict[str, int]:
    """Layers of these numbers: a block each, or its input alone, S·H·e."""
    recomputed = sum(map(s.config.model.recomputes, numbers))
    return {**_times(len(numbers) - recomputed, block(s)), RECOMPUTED: recomputed * s.S * s.H * s.e}


def _times(count: int, parts: dict[str, int]) -> dict[str, int]:
    return {part: count * size for part, size in parts.items()}


def block(s: Symbols) -> dict[str, int]:
    """One block that is not recomputed.

    =======================  ===========  ===========  ===========  =========================
    part                     mtp          msp          fsp          isp
    =======================  ===========  ===========  ===========  =========================
    inputs of wqkv and w13   2·T·H·e      2·T·H·e/t    2·T·H·e/t    2·T·H·e/t
    the same, gathered       –            2·T·H·e      –            –
    queries, keys, values    T·G·(Q + 2)·D·e/t         as mtp       T·(G·Q + 2·max(G, t))·D·e/t
    attention output         T·G·Q·D·e/t in every mode; not if attention is recomputed
    its kernel               see :func:`kernel`; nothing if attention is recomputed
    gate and up              2·T·F·e/t in every mode
    masks, if kept           2·T·H        2·T·H/t      2·T·H/t      2·T·H/t
    =======================  ===========  ===========  ===========  =========================

    msp gathers nothing where t is 1. Under isp, of kv heads fewer than t each is held by several ranks.
    """
    heads = s.G * s.Q
    return {
        RESIDUAL: 2 * s.S * s.H * s.e,
        GATHERED: gathered(s),
        QKV: s.T * (heads + 2 * max(s.G, s.t.size)) * s.D * s.e // s.t.size,
        HEADS: 0 if s.spec.recomputes_attention else attention_output(s),
        KERNEL: 0 if s.spec.recomputes_attention else kernel(s),
        GATE_UP: 2 * s.T * s.F * s.e // s.t.size,
        MASKS: 2 * mask(s),
    }


def block_for_weights(s: Symbols) -> dict[str, int]:
    """One block, recomputed or not, whose gradients of weights are put off: inputs of its four linears, and the
    gradients of their outputs, as the products take them.

    =======================  ===========  ===========  ===========  ===========
    part                     mtp          msp          fsp          isp
    =======================  ===========  ===========  ===========  ===========
    inputs of wqkv and w13   2·T·H·e      –            2·T·H·e/t    2·T·H·e/t
    the same, gathered       –            2·T·H·e      –            –
    input of wo              T·G·Q·D·e/t in every mode
    input of w2              T·F·e/t in every mode
    gradient of wqkv         T·G·(Q + 2)·D·e/t in every mode
    gradient of w13          2·T·F·e/t in every mode
    gradients of wo and w2   2·T·H·e      2·T·H·e      2·T·H·e      2·T·H·e/t
    =======================  ===========  ===========  ===========  ===========

    msp gathers nothing where t is 1.
    """
    tokens = s.S if s.mode == "isp" else s.T  # of the gradients that msp and fsp gather
    return {
        NORMALISED: 0 if gathered(s) else 2 * s.S * s.H * s.e,
        GATHERED: gathered(s),
        HEADS: attention_output(s),
        SWIGLU: s.T * s.F * s.e // s.t.size,
        GRAD_QKV: s.T * s.G * (s.Q + 2) * s.D * s.e // s.t.size,
        GRAD_GATE_UP: 2 * s.T * s.F * s.e // s.t.size,
        GRAD_RESIDUAL: 2 * tokens * s.H * s.e,
    }


def attention_output(s: Symbols) -> int:
    """T·G·Q·D·e/t."""
    return s.T * s.G * s.Q * s.D * s.e // s.t.size


def kernel(s: Symbols) -> int:
    """What the kernel of attention keeps besides: for the sums of its softmax g·T·G·Q/t, and its output, T·G·Q·D·e/t,
    if that is not what the next linear gets.

    =============  ====  =========================
    kernel         sums  output
    =============  ====  =========================
    blocked        –     –
    flash, varlen  yes   under isp, where t > 1
    sdpa           yes   yes
    =============  ====  =========================

    The kernel that ``auto`` takes is that of a CUDA device in half precision, and that of the CPU else.
    """
    backend = s.spec.attention_backend
    if backend == "auto":
        backend = "flash" if s.e < s.g else "blocked"
    if backend == "blocked":
        return 0
    copied = backend == "sdpa" or (s.mode == "isp" and s.t.size > 1)
    return s.g * s.T * s.G * s.Q // s.t.size + copied * attention_output(s)


def gathered(s: Symbols) -> int:
    """msp: 2·T·H·e, where it gathers."""
    return 2 * s.T * s.H * s.e if s.mode == "msp" and s.t.size > 1 else 0


def token_ids(s: Symbols) -> int:
    """8·T, the ids that were looked up; where the table is split by words, also T for which of them lie elsewhere. isp:
    8·T/t."""
    if s.mode == "isp":
        return 8 * s.S
    by_words = s.config.model.tie_word_embeddings or not s.config.model.embed_split_hidden
    return (9 if by_words and s.t.size > 1 else 8) * s.T


def mask(s: Symbols) -> int:
    """S·H, where masks are kept."""
    model = s.config.model
    return s.S * s.H if model.drop_rate and not model.dropout_selective_checkpoint else 0


def rotary(s: Symbols) -> int:
    """T·D·e: two of [T, D/2], which all blocks share; every rank's attention sees the whole row."""
    return s.T * s.D * s.e


def norm(s: Symbols) -> int:
    """S·H·e for its input, and of each token a statistic, g (of a layernorm two)."""
    statistics = 2 if s.config.model.norm_type == "layernorm" else 1
    return s.S * (s.H * s.e + statistics * s.g)


def loss(s: Symbols, tokens: int | None) -> dict[str, int]:
    """Head and loss keep no input and no logits, but gradients, which are made with the loss.

    For their input K·H·e, and 8·K for the places of the tokens where some labels are ignored. For the weight
    ⌈V/t⌉·H·g, under isp V·H·g.
    """
    split, labels = (1, s.S) if s.mode == "isp" else (s.t.size, s.T)
    kept = labels if tokens is None else tokens
    places = 8 * kept if kept < labels else 0
    return {LOSS_INPUT: kept * s.H * s.e + places, LOSS_WEIGHT: -(-s.V // split) * s.H * s.g}


def peak_saved(config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0) -> int:
    """Bytes that a rank of ``stage`` keeps at the most between two actions of its schedule.

    Within an action it may have more: gradients of activations, and what a block that is recomputed would have kept.
    Arguments as those of :func:`~internlm.costs.activations.saved_for_backward`.
    """
    return max(kept_after_each_action(config, world_size, tokens, stage=stage))


def kept_after_each_action(config: Config, world_size: int, tokens: int | None = None, *, stage: int = 0) -> list[int]:
    """The same after each of its actions."""
    table = table_of(config)
    chunks = range(table.stage_layout.chunks)
    saved = [sum(saved_for_backward(config, world_size, tokens, stage=stage, chunk=each).values()) for each in chunks]
    put_off = [sum(kept_for_weights(config, world_size, stage=stage, chunk=each).values()) for each in chunks]
    kept: dict[tuple[int, int], int] = {}
    sums = []
    for action in table.actions[stage]:
        pair = action.chunk, action.micro_batch
        if action.type == FORWARD:
            kept[pair] = saved[action.chunk]
        elif action.type == BACKWARD and table.defers_weight(stage, action):
            kept[pair] = put_off[action.chunk]
        else:
            del kept[pair]
        sums.append(sum(kept.values()))
    return sums


def table_of(config: Config) -> Table:
    """The schedule of a step; raises :class:`~internlm.core.scheduler.validate.ScheduleError` where there is none."""
    own, pipeline, chunks = own_table(config), config.parallel.pipeline, config.model.num_chunks
    if own is not None:
        return own(config.data.micro_num)
    return make_table(schedule_of(pipeline.mode, chunks), pipeline.size, chunks, config.data.micro_num)
