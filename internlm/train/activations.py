"""What a micro-batch keeps for its backward pass, by formula: bytes on each rank, from the config alone.

==========  =========================================================================================================
t, w        ranks of the tensor group and of the weight group (w is 1 but under isp)
T           tokens of a row on a data rank, ``data.packed_length``
S           those of them that this rank has between the linears: T under mtp, T/t under msp, fsp and isp
K           tokens that take part in the loss, of those whose labels this rank has: T, under isp T/t
L, R        layers, and those of them that are recomputed (``model.checkpoint``)
H, F, V     hidden width, intermediate width, vocabulary
G, Q, D     kv heads, query heads per kv head, head width
e, g        bytes of an activation; of a gradient or a statistic where they are summed up (4 at least)
==========  =========================================================================================================

Counted is what autograd saves, each storage once; parameters are not, nor the weights that isp gathers, which are
given up after each product. A linear saves its input alone: what a norm or SwiGLU made of it is made again in
backward. So a block keeps four tensors of its own, and the queries, keys and values. The kernel of attention is the
one for the CPU, which saves these alone; flash attention also saves 4·T·G·Q/t for the sums of its softmax and, under
isp, its output before the all-to-all, T·G·Q·D·e/t.
"""

from __future__ import annotations

from internlm.config import Config
from internlm.train.traffic import Symbols

TOKEN_IDS = "embedding: token ids"
ROTARY = "rotary: cosines and sines"
RESIDUAL = "block: residual inputs"
GATHERED = "block: kept gathered inputs"
QKV = "block: queries, keys, values"
HEADS = "block: attention output"
GATE_UP = "block: gate and up"
RECOMPUTED = "recomputed block: input"
NORM = "final norm"
LOSS_INPUT = "loss: gradient of its input"
LOSS_WEIGHT = "loss: gradient of the head's weight"


def saved_for_backward(config: Config, world_size: int, tokens: int | None = None) -> dict[str, int]:
    """Bytes of each part that a rank holds between the forward and the backward pass of one micro-batch.

    ``tokens``: K; without it, no label is ignored. ``config`` is resolved, and without pipeline. Raises KeyError for a
    model that is not ours.
    """
    s = Symbols.of(config, world_size)
    recomputed = s.spec.recomputed_layers
    blocks = {part: (config.model.num_layers - recomputed) * size for part, size in block(s).items()}
    return {
        TOKEN_IDS: token_ids(s),
        ROTARY: rotary(s),
        **blocks,
        RECOMPUTED: recomputed * own_tokens(s) * s.H * s.e,
        NORM: norm(s),
        **loss(s, tokens),
    }


def total_saved(config: Config, world_size: int, tokens: int | None = None) -> int:
    """The sum of :func:`saved_for_backward`."""
    return sum(saved_for_backward(config, world_size, tokens).values())


def own_tokens(s: Symbols) -> int:
    """S."""
    return s.T if s.mode == "mtp" else s.T // s.t.size


def block(s: Symbols) -> dict[str, int]:
    """One block that is not recomputed.

    =======================  ===========  ===========  ===========  =========================
    part                     mtp          msp          fsp          isp
    =======================  ===========  ===========  ===========  =========================
    inputs of wqkv and w13   2·T·H·e      2·T·H·e/t    2·T·H·e/t    2·T·H·e/t
    the same, gathered       –            2·T·H·e      –            –
    queries, keys, values    T·G·(Q + 2)·D·e/t         as mtp       T·(G·Q + 2·max(G, t))·D·e/t
    attention output         T·G·Q·D·e/t in every mode
    gate and up              2·T·F·e/t in every mode
    =======================  ===========  ===========  ===========  =========================

    msp gathers nothing where t is 1. Under isp, of kv heads fewer than t each is held by several ranks.
    """
    keeps_gathered = s.mode == "msp" and s.t.size > 1
    heads = s.G * s.Q
    return {
        RESIDUAL: 2 * own_tokens(s) * s.H * s.e,
        GATHERED: 2 * s.T * s.H * s.e if keeps_gathered else 0,
        QKV: s.T * (heads + 2 * max(s.G, s.t.size)) * s.D * s.e // s.t.size,
        HEADS: s.T * heads * s.D * s.e // s.t.size,
        GATE_UP: 2 * s.T * s.F * s.e // s.t.size,
    }


def token_ids(s: Symbols) -> int:
    """8·T, the ids that were looked up; where the table is split by words, also T for which of them lie elsewhere. isp:
    8·T/t."""
    if s.mode == "isp":
        return 8 * own_tokens(s)
    by_words = s.config.model.tie_word_embeddings or not s.config.model.embed_split_hidden
    return (9 if by_words and s.t.size > 1 else 8) * s.T


def rotary(s: Symbols) -> int:
    """T·D·e: two of [T, D/2], which all blocks share; every rank's attention sees the whole row."""
    return s.T * s.D * s.e


def norm(s: Symbols) -> int:
    """S·H·e for its input, and of each token a statistic, g (of a layernorm two)."""
    statistics = 2 if s.config.model.norm_type == "layernorm" else 1
    return own_tokens(s) * (s.H * s.e + statistics * s.g)


def loss(s: Symbols, tokens: int | None) -> dict[str, int]:
    """Head and loss keep no input and no logits, but gradients, which are made with the loss.

    For their input K·H·e, and 8·K for the places of the tokens where some labels are ignored. For the weight
    ⌈V/t⌉·H·g, under isp V·H·g.
    """
    split, labels = (1, own_tokens(s)) if s.mode == "isp" else (s.t.size, s.T)
    kept = labels if tokens is None else tokens
    places = 8 * kept if kept < labels else 0
    return {LOSS_INPUT: kept * s.H * s.e + places, LOSS_WEIGHT: -(-s.V // split) * s.H * s.g}
