"""Formulas of the collectives of the decoder's layers, by parallel mode and tensor.

The formulas follow the papers rather than the code that communicates, so that tests can check the code against them.
mtp is tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3). msp and fsp add sequence parallelism
(Korthikanti et al. 2022, arXiv 2205.05198, section 4.2). isp gathers weights and exchanges heads (Chen et al. 2024,
arXiv 2401.09149; the all-to-alls are those of Jacobs et al. 2023, arXiv 2309.14509).

Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from internlm.accelerator import kind_of
from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.parallel.ledger import Collective, Ledger, Traffic
from internlm.core.parallel.sharding import Role, TensorMode
from internlm.costs.flops import BlockLinear, LinearShape, attention_has_grad, linears_of_layer
from internlm.costs.symbols import Symbols, rows_per_rank
from internlm.ops.cross_entropy import default_chunk_tokens

AG: Final = "all-gather"
RS: Final = "reduce-scatter"
AR: Final = "all-reduce"
A2A: Final = "all-to-all"


class Call(NamedTuple):
    """One collective, and the bytes that a rank sends in it."""

    mode: ParallelMode
    collective: Collective
    sent: int


class PassCalls(NamedTuple):
    """Collectives of a part of the model, in forward and in backward."""

    forward: list[Call]
    backward: list[Call]


def calls_on(group: Group, collective: Collective, nbytes: int) -> list[Call]:
    """Return a list with one collective over ``group`` on ``nbytes`` bytes; empty if the group has one rank.

    The bytes sent are the lower bound over all algorithms (Chan et al. 2007, table II), as the ledger counts them.
    """
    n, passes = group.size, 2 if collective == AR else 1
    return [Call(group.mode, collective, passes * (n - 1) * nbytes // n)] if n > 1 else []


def merge(*parts: PassCalls) -> PassCalls:
    """Concatenate the forward calls of all ``parts``, and their backward calls."""
    return PassCalls([c for part in parts for c in part.forward], [c for part in parts for c in part.backward])


def count_calls(calls: Iterable[Call]) -> Traffic:
    """Count calls and bytes by mode and collective, as the ledger does."""
    ledger = Ledger()
    for call in calls:
        ledger.record(*call)
    return ledger.snapshot()


#: Collectives in (forward, backward), by mode and role (see :mod:`internlm.core.parallel.sharding`). The functions
#: below give the bytes of their tensors.
TABLE: dict[tuple[TensorMode, Role], tuple[tuple[Collective, ...], tuple[Collective, ...]]] = {
    ("mtp", "column"): ((), (AR,)),
    ("mtp", "row"): ((AR,), ()),
    ("mtp", "embedding"): ((AR,), ()),
    ("mtp", "embedding by hidden units"): ((AG,), ()),
    ("mtp", "head"): ((), (AR,)),
    ("mtp", "heads"): ((AR,), (AR,)),
    ("msp", "column"): ((AG,), (RS,)),
    ("msp", "row"): ((RS,), (AG,)),
    ("msp", "embedding"): ((RS,), (AG,)),
    ("msp", "embedding by hidden units"): ((A2A,), (A2A,)),
    ("msp", "head"): ((AG,), (RS,)),
    ("msp", "heads"): ((AR,), (AR,)),
    ("fsp", "column"): ((AG,), (AG, RS)),
    ("fsp", "row"): ((RS,), (AG,)),
    ("fsp", "embedding"): ((RS,), (AG,)),
    ("fsp", "embedding by hidden units"): ((A2A,), (A2A,)),
    ("fsp", "head"): ((AG,), (RS,)),
    ("fsp", "heads"): ((AR,), (AR,)),
    ("isp", "column"): ((AG,), (AG, RS)),
    ("isp", "row"): ((AG,), (AG, RS)),
    ("isp", "embedding"): ((AG,), (RS,)),
    ("isp", "head"): ((AG,), (RS,)),
    ("isp", "attention"): ((A2A,), (A2A,)),
    ("isp", "model"): ((AG,), ()),
}


#: Collectives in backward that only the gradient of the weight needs, so that a frozen weight has none of them.
OF_WEIGHT: dict[tuple[TensorMode, Role], tuple[Collective, ...]] = {
    ("msp", "embedding"): (AG,),
    ("msp", "embedding by hidden units"): (A2A,),
    ("fsp", "column"): (AG,),
    ("fsp", "embedding"): (AG,),
    ("fsp", "embedding by hidden units"): (A2A,),
    ("isp", "column"): (RS,),
    ("isp", "row"): (RS,),
    ("isp", "embedding"): (RS,),
    ("isp", "head"): (RS,),
}


def block(s: Symbols, layer: int) -> PassCalls:
    """Return the collectives of the block of index ``layer``.

    They are those of its linears and their adapters, of attention, and of a norm of all queries and keys together.
    """
    model = s.config.model
    around = merge(attention(s), qk_norm(s))
    if not attention_has_grad(model, layer):
        around = PassCalls(around.forward, [])
    linears = linears_of_layer(model, layer)
    is_last = [not following.shape.shares_input for following in linears[1:]] + [True]
    calls = (_block_linear(s, weight, last) for weight, last in zip(linears, is_last, strict=True))
    return merge(*calls, around)


def _block_linear(s: Symbols, weight: BlockLinear, is_last: bool) -> PassCalls:
    """Return the collectives of a linear of a block and of its adapter, whose weights are replicated under isp.

    ``is_last`` tells whether it is the last of the linears with its input.
    """
    base = linear(s, weight.shape, is_trained=weight.is_trained)
    if not weight.needs_input_grad:
        # With overlap, isp has started to gather the weight when the backward pass ends.
        prefetched = s.mode == "isp" and is_last and weight.adapter and s.config.parallel.weight.overlap
        base = PassCalls(base.forward, base.backward if prefetched else [])
    adapter = () if s.mode == "isp" else weight.adapter
    return merge(base, *(linear(s, factor) for factor in adapter))


def linear(s: Symbols, weight: LinearShape, *, is_trained: bool = True) -> PassCalls:
    """Return the collectives of a linear: on its weight under isp, otherwise on its activation of width H.

    ===========  ============================================  ==============================================
    mode, role   forward                                       backward
    ===========  ============================================  ==============================================
    mtp, column  –                                             all-reduce over t of T·inputs·e
    mtp, row     all-reduce over t of T·outputs·e              –
    msp, column  all-gather over t of T·inputs·e               reduce-scatter of the same size
    msp, row     reduce-scatter over t of T·outputs·e          all-gather of the same size
    fsp          as msp                                        as msp, and one more all-gather if column
    isp          all-gather over w of w⌈outputs/w⌉·inputs·e    all-gather and reduce-scatter of the same size
    ===========  ============================================  ==============================================

    A weight that is not trained has no second all-gather under fsp, and no reduce-scatter under isp. Except under isp,
    linears with one input communicate it once.
    """
    if s.mode == "isp":
        group, nbytes = s.w, s.w.size * rows_per_rank(weight.outputs, s.w) * weight.inputs * s.e
    elif weight.shares_input:
        return PassCalls([], [])
    else:
        # Between a column linear and its row linear the activation is split by features, so nothing is sent.
        group, nbytes = s.t, s.T * (weight.outputs if weight.role == "row" else weight.inputs) * s.e
    return _role_calls(s, weight.role, group, nbytes, is_trained)


def attention(s: Symbols) -> PassCalls:
    """Return the all-to-alls of attention under isp, over t; other modes have none.

    The first exchanges q, k and v of T/t tokens, (T/t)·(G·Q + 2·max(G, t))·D·e. The second exchanges the attention
    output (:func:`heads_to_tokens`). Backward exchanges the gradients of these tensors, in the same sizes. With fewer
    kv heads than ranks, each kv head is sent to several ranks.
    """
    qkv = s.T // s.t.size * (s.G * s.Q + 2 * max(s.G, s.t.size)) * s.D * s.e
    return merge(_role_calls(s, "attention", s.t, qkv), heads_to_tokens(s))


def heads_to_tokens(s: Symbols) -> PassCalls:
    """Return the all-to-all of the attention output under isp: (T/t)·G·Q·D·e over t."""
    return _role_calls(s, "attention", s.t, s.T // s.t.size * s.G * s.Q * s.D * s.e)


def qk_norm(s: Symbols) -> PassCalls:
    """Return the all-reduces over t of the norm of all queries and all keys of a token: 2·T·g in each direction.

    They are two sums for each of T tokens. isp has all heads of its tokens, and a norm of single heads needs no sums of
    other ranks.
    """
    if s.config.model.qk_norm != "projection":
        return PassCalls([], [])
    return _role_calls(s, "heads", s.t, 2 * s.T * s.g)


def positions(s: Symbols) -> PassCalls:
    """Return the all-gather of positions under isp: 8·T over t, for T positions in int64."""
    return _role_calls(s, "model", s.t, s.T * 8)


def embedding(s: Symbols) -> PassCalls:
    """Return the collectives of the embedding, which is split by vocabulary entries or by hidden units.

    ===================  ======================================  ===============================
    mode, split by       forward                                 backward
    ===================  ======================================  ===============================
    mtp, entries         all-reduce over t of T·H·e              –
    mtp, hidden units    all-gather over t of T·H·e              –
    msp, fsp, entries    reduce-scatter over t of T·H·e          all-gather of the same size
    msp, fsp, hidden     all-to-all over t of T·(H/t)·e          all-to-all of the same size
    isp                  all-gather over w of w⌈V/w⌉·H·e         reduce-scatter of the same size
    ===================  ======================================  ===============================
    """
    model = s.config.model
    # A tied embedding is also the head's weight, which is split by vocabulary entries.
    if s.mode == "isp" or not model.embed_split_hidden or model.tie_word_embeddings:
        return linear(s, LinearShape("embedding", s.H, s.V), is_trained=s.trains_base)
    hidden = s.H if s.mode == "mtp" else s.H // s.t.size
    return _role_calls(s, "embedding by hidden units", s.t, s.T * hidden * s.e, s.trains_base)


def head(s: Symbols) -> PassCalls:
    """Return the collectives of the head, without the loss that is computed with it.

    ========  ======================================  ================================
    mode      forward                                 backward
    ========  ======================================  ================================
    mtp       –                                       all-reduce over t of T·H·e
    msp, fsp  all-gather over t of T·H·e              reduce-scatter of the same size
    isp       all-gather over w of w⌈V/w⌉·H·e         reduce-scatter of the same size
    ========  ======================================  ================================
    """
    return linear(s, LinearShape("head", s.H, s.V), is_trained=s.trains_base)


def loss(s: Symbols, tokens: int, device_type: str) -> list[Call]:
    """Return the all-reduces of the vocabulary-parallel loss of K = ``tokens`` tokens; isp needs none.

    Each chunk of C tokens takes two all-reduces over t: C·g for the largest logits, and 2·C·g for the sum of
    exponentials and the label's logit. With label smoothing the second takes 3·C·g, because it adds the sum of logits.
    """
    if s.mode == "isp":
        return []
    chunk = default_chunk_tokens(kind_of(device_type).is_host, rows_per_rank(s.V, s.t))
    sums = 3 if s.config.loss.label_smoothing else 2
    lengths = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    return [call for length in lengths for rows in (1, sums) for call in calls_on(s.t, AR, rows * length * s.g)]


def _role_calls(s: Symbols, role: Role, group: Group, nbytes: int, is_trained: bool = True) -> PassCalls:
    """Return the collectives of ``role`` in the tensor mode of ``s``, each on a tensor of ``nbytes`` bytes."""
    forward, backward = TABLE.get((s.mode, role), ((), ()))
    if not is_trained:
        backward = tuple(collective for collective in backward if collective not in OF_WEIGHT.get((s.mode, role), ()))
    return PassCalls(
        [call for collective in forward for call in calls_on(group, collective, nbytes)],
        [call for collective in backward for call in calls_on(group, collective, nbytes)],
    )
