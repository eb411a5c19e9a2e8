"""Formulas of the activations that one block saves for backward, and keeps for deferred weight gradients.

:mod:`internlm.costs.activations` sums them over the layers of a chunk. Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from internlm.costs.flops import BlockLinear, attention_has_grad, linears_of_layer
from internlm.costs.symbols import Symbols
from internlm.ops.attention import groups_heads
from internlm.utils.dtype import torch_dtype

RESIDUAL = "block: residual inputs"
NORMS = "block: inputs of norms of outputs or sums"
QK_NORM = "block: queries and keys before their norm"
GATHERED = "block: kept gathered inputs"
QKV = "block: queries, keys, values"
HEADS = "block: attention output"
KERNEL = "block: sums and output of the attention kernel"
GATE_UP = "block: gate and up"
MASKS = "block: masks of dropout"
ADAPTERS = "block: inputs of the second factors of adapters"

NORMALISED = "block: normalised inputs"
SWIGLU = "block: input of w2"
GRAD_QKV = "block: gradient of queries, keys, values"
GRAD_GATE_UP = "block: gradient of gate and up"
GRAD_RESIDUAL = "block: gradients of residual outputs"


def block(s: Symbols, layer: int) -> dict[str, int]:
    """Return the bytes, by tensor, that the block of index ``layer`` saves if it is not recomputed.

    =======================  ===========  ===========  ===========  =========================
    tensors                  mtp          msp          fsp          isp
    =======================  ===========  ===========  ===========  =========================
    inputs of wqkv and w13   2·T·H·x      2·T·H·x/t    2·T·H·x/t    2·T·H·x/t
    gathered inputs          –            2·T·H·e      –            –
    inputs of other norms    see :func:`norms`
    before norms of heads    see :func:`qk_norm`
    queries, keys, values    T·G·(Q + 2)·D·e/t         as mtp       T·(G·Q + 2·max(G, t))·D·e/t
    attention output         T·G·Q·D·e/t in every mode; not if attention is recomputed
    attention kernel         see :func:`kernel`; nothing if attention is recomputed
    gate and up              2·T·F·e/t in every mode
    masks, if kept           2·T·H        2·T·H/t      2·T·H/t      2·T·H/t
    adapters                 see :func:`adapters`
    =======================  ===========  ===========  ===========  =========================

    msp gathers nothing if t is 1; without a norm before wqkv and w13, it saves only what it gathers. Under isp with
    fewer kv heads than t, several ranks hold each kv head. Beside adapters, the first layer of the model saves nothing
    before the first of them, and msp keeps gathered inputs of adapters only, which :func:`adapters` counts.
    """
    whole = _whole_block(s, layer)
    # The input of a linear is saved if its own gradient is needed, or that of a weight.
    linears = linears_of_layer(s.config.model, layer)
    saves = {linear.target: linear.needs_input_grad or bool(linear.adapter) for linear in linears}
    if not attention_has_grad(s.config.model, layer):
        whole |= dict.fromkeys((QK_NORM, QKV, KERNEL), 0)
        whole[HEADS] *= saves["wo"]
    branches = saves["wo"] + 1  # whose output has a gradient
    for name in (NORMS, MASKS):
        whole[name] = whole[name] * branches // 2
    whole[RESIDUAL] = whole[RESIDUAL] * (saves["wqkv"] + saves["w13"]) // 2
    whole[GATE_UP] *= saves["w2"]
    return whole


def _whole_block(s: Symbols, layer: int) -> dict[str, int]:
    """Return what :func:`block` does for a layer in which all inputs have a gradient."""
    heads = s.G * s.Q
    return {
        # Inputs of the two norms, which the following linears recompute; additions to the residual stream save nothing.
        # Without norms there, the inputs of the linears, unless gathered inputs are kept.
        RESIDUAL: 2 * s.S * s.H * s.x * saves_input(s),
        GATHERED: gathered(s),
        NORMS: norms(s),
        QK_NORM: qk_norm(s),
        QKV: s.T * (heads + 2 * max(s.G, s.t.size)) * s.D * s.e // s.t.size,
        # Selective checkpointing recomputes attention right before the gradients of wo, which need its output.
        HEADS: 0 if s.spec.recomputes_attention else attention_output(s),
        KERNEL: 0 if s.spec.recomputes_attention else kernel(s, layer),
        # The output of SwiGLU is not saved: w2 recomputes it from these.
        GATE_UP: 2 * s.T * s.F * s.e // s.t.size,
        MASKS: 2 * mask(s),
        ADAPTERS: sum(adapters(s, linear) for linear in linears_of_layer(s.config.model, layer)),
    }


def saves_input(s: Symbols) -> bool:
    """Return whether wqkv and w13 save the input of a rank, and not only the gathered input, which msp keeps."""
    return s.spec.normalises_input or s.config.model.residual_in_fp32 or not gathered(s)


def adapters(s: Symbols, linear: BlockLinear) -> int:
    """Return the bytes that the adapter of a linear saves: the input of its second factor, S·r·e; 0 without one.

    The input of the first factor is that of the linear. msp saves the gathered input of a column, T·r·e, instead.
    """
    if not linear.adapter:
        return 0
    _, up = linear.adapter
    return (s.T if s.mode == "msp" and up.role == "column" else s.S) * up.inputs * s.e


def block_for_weights(s: Symbols) -> dict[str, int]:
    """Return the bytes, by tensor, that one block keeps for its deferred weight gradients.

    They are the inputs and the output gradients of its four linears:

    ===============================  ===========  ===========  ===========  ===========
    tensors                          mtp          msp          fsp          isp
    ===============================  ===========  ===========  ===========  ===========
    inputs of wqkv and w13           2·T·H·e      –            2·T·H·e/t    2·T·H·e/t
    gathered inputs of wqkv and w13  –            2·T·H·e      –            –
    input of wo                      T·G·Q·D·e/t in every mode
    input of w2                      T·F·e/t in every mode
    output gradient of wqkv          T·G·(Q + 2)·D·e/t in every mode
    output gradient of w13           2·T·F·e/t in every mode
    output gradients of wo and w2    2·T·H·e      2·T·H·e      2·T·H·e      2·T·H·e/t
    ===============================  ===========  ===========  ===========  ===========

    msp gathers nothing if t is 1. Recomputed blocks keep the same bytes. Frozen weights have no gradients, but those of
    adapters: see :func:`adapters_for_weights`.
    """
    tokens = s.S if s.mode == "isp" else s.T  # msp and fsp keep gathered output gradients
    if not s.trains_base:
        # The linears of all layers have the same adapters.
        return _total(adapters_for_weights(s, linear, tokens) for linear in linears_of_layer(s.config.model, 0))
    return {
        # W computes products only: it recomputes no norm, no SwiGLU and no gather.
        NORMALISED: 0 if gathered(s) else 2 * s.S * s.H * s.e,
        GATHERED: gathered(s),
        HEADS: attention_output(s),
        SWIGLU: s.T * s.F * s.e // s.t.size,
        GRAD_QKV: s.T * s.G * (s.Q + 2) * s.D * s.e // s.t.size,
        GRAD_GATE_UP: 2 * s.T * s.F * s.e // s.t.size,
        GRAD_RESIDUAL: 2 * tokens * s.H * s.e,
    }


def adapters_for_weights(s: Symbols, linear: BlockLinear, tokens: int) -> dict[str, int]:
    """Return the bytes, by tensor, that the adapter of a linear keeps for its deferred weight gradients.

    They are the inputs and the output gradients of its two factors. The output gradient of the second is that of the
    linear, multiplied by a factor. ``tokens`` are those of an output gradient of a row.
    """
    if not linear.adapter:
        return {}
    down, _ = linear.adapter
    is_row = linear.shape.role == "row"
    # The first factor of a row is a row itself, whose output gradient msp and fsp gather.
    kept = {ADAPTERS: (tokens if is_row else s.S) * down.outputs * s.e + adapters(s, linear)}
    if is_row:
        name = HEADS if linear.target == "wo" else SWIGLU
        return {**kept, name: s.T * linear.shape.inputs * s.e // s.t.size, GRAD_RESIDUAL: s.S * s.H * s.e}
    name = GRAD_QKV if linear.target == "wqkv" else GRAD_GATE_UP
    # Linears with one input have that in common.
    normalised = (not linear.shape.shares_input) * s.S * s.H * s.e
    return {**kept, NORMALISED: normalised, name: s.T * linear.shape.outputs * s.e // s.t.size}


def _total(tables: Iterable[dict[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for table in tables:
        total.update(table)
    return dict(total)


def norms(s: Symbols) -> int:
    """Return the bytes that the two norms of a block save that do not precede a linear.

    A norm saves its input and g bytes for each statistic of a token: layernorm has two, rmsnorm has one. The input is
    the output of attention or feed-forward layer, S·H·e, or with ``apply_post_layer_norm`` its sum with the residual
    stream, S·H·x.
    """
    inputs = s.spec.normalises_output * s.e + s.spec.normalises_sums * s.x
    return 2 * norm_input(s, inputs) if inputs else 0


def qk_norm(s: Symbols) -> int:
    """Return the bytes that the norm of queries and keys saves.

    They are its input, T·G·(Q + 2)·D·e/t with the values, and g bytes for each group of elements that are normalised
    together: T·G·(Q + 1)/t heads, or with ``projection`` all queries and all keys of the tokens of the rank.
    """
    scope = s.config.model.qk_norm
    if scope == "none":
        return 0
    tokens = s.S if s.mode == "isp" else s.T
    groups = 2 * tokens if scope == "projection" else s.T * s.G * (s.Q + 1) // s.t.size
    return s.T * s.G * (s.Q + 2) * s.D * s.e // s.t.size + groups * s.g


def attention_output(s: Symbols) -> int:
    """Return the bytes of the attention output, T·G·Q·D·e/t."""
    return s.T * s.G * s.Q * s.D * s.e // s.t.size


def kernel(s: Symbols, layer: int) -> int:
    """Return the bytes that the attention kernel of a layer saves besides queries, keys and values.

    The log-sum-exp of the attention scores takes g·T·G·Q/t bytes (Dao et al. 2022, arXiv 2205.14135, algorithm 1). The
    attention output takes T·G·Q·D·e/t bytes, unless wo saves the same storage as its input. Where a kernel cannot group
    query heads, keys and values are saved once per query head, which takes 2·T·(G·Q - max(G, t))·D·e/t more:

    =============  ===========  =============================================  ==========================
    kernel         log-sum-exp  output                                         keys and values, expanded
    =============  ===========  =============================================  ==========================
    blocked        –            –                                              –
    flash, varlen  yes          under isp, if t > 1                            –
    sdpa, CPU      yes          yes                                            –
    sdpa, GPU      yes          if rows are packed, and under isp, if t > 1    in float32
    =============  ===========  =============================================  ==========================

    ``sdpa`` runs once for all sequences of a length; packed rows are assumed to have several lengths, whose outputs are
    concatenated. With a window shorter than a sequence, it runs in pieces (:func:`pieces`): each saves a mask of
    rows·columns·e and, on a GPU with grouped queries, its keys and values once per query head. All sequences are
    assumed to have ``data.seq_len`` tokens then.

    ``auto`` is counted as ``flash`` in half precision (a CUDA device is assumed), else as ``blocked`` on the CPU and as
    ``sdpa`` on a GPU.
    """
    backend, model = s.spec.attention_backend, s.config.model
    if backend == "auto":
        backend = "flash" if s.e < s.g else "blocked" if s.on_host else "sdpa"
    if backend == "blocked":
        return 0
    sums, copied, expanded = s.g * s.T * s.G * s.Q // s.t.size, s.mode == "isp" and s.t.size > 1, 0
    if backend != "sdpa":
        return sums + copied * attention_output(s)
    length = s.config.data.seq_len
    masked = pieces(model.window(layer), length)
    copied = copied or s.on_host or s.config.data.use_packed_dataset or bool(masked)
    kv_heads = max(s.G, s.t.size)
    grouped = kv_heads < s.G * s.Q
    if grouped and not s.on_host and not groups_heads(None, torch_dtype(str(model.dtype)), s.D, bool(masked)):
        keys = sum(columns for _, columns in masked) * s.T // length if masked else s.T
        expanded = 2 * (keys * s.G * s.Q - s.T * kv_heads) * s.D * s.e // s.t.size
    masks = sum(rows * columns for rows, columns in masked) * s.e
    return sums + copied * attention_output(s) + expanded + masks


def pieces(window: int | None, length: int) -> list[tuple[int, int]]:
    """Return the pieces in which ``sdpa`` computes sequences of ``length`` tokens: (query rows, key columns) of each.

    Without a window, or if it is no shorter than the sequences, there are none.
    """
    if window is None or window >= length:
        return []
    starts = range(0, length, window)
    return [(min(window, length - start), min(start + window, length) - max(0, start - window + 1)) for start in starts]


def gathered(s: Symbols) -> int:
    """Return the bytes of the two gathered inputs that msp keeps per block, 2·T·H·e; other modes keep none.

    Those of frozen weights are not kept.
    """
    keeps = s.mode == "msp" and s.t.size > 1 and s.trains_base
    return 2 * s.T * s.H * s.e if keeps else 0


def mask(s: Symbols) -> int:
    """Return the bytes of a dropout mask, S·H, or 0 if masks are not kept."""
    model = s.config.model
    return s.S * s.H if model.drop_rate and not model.dropout_selective_checkpoint else 0


def norm_input(s: Symbols, itemsize: int) -> int:
    """Return the bytes that a norm saves: its input, and S·g per statistic (layernorm has two)."""
    statistics = 2 if s.config.model.norm_type == "layernorm" else 1
    return s.S * (s.H * itemsize + statistics * s.g)
