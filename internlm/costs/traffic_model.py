"""Calls, as the ledger counts them.

What a part of the model sends: a table of collectives, and the tensors that they are on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.parallel.ledger import Collective, Ledger, Traffic
from internlm.costs.symbols import Symbols
from internlm.ops.cross_entropy import default_chunk_tokens

AG: Final = "all-gather"
RS: Final = "reduce-scatter"
AR: Final = "all-reduce"
A2A: Final = "all-to-all"
SEND: Final = "send"
REDUCE: Final = "reduce"
BROADCAST: Final = "broadcast"


class Call(NamedTuple):
    """One collective, and the bytes that a rank sends by it."""

    mode: ParallelMode
    collective: Collective
    sent: int


class Passes(NamedTuple):
    """What a part of the model sends as it runs forward, and backward."""

    forward: list[Call]
    backward: list[Call]


def calls_of(group: Group, collective: Collective, whole: int) -> list[Call]:
    """One collective on a tensor of ``whole`` bytes, as a list; of a group of one rank, none."""
    n, passes = group.size, 2 if collective == AR else 1
    return [Call(group.mode, collective, passes * (n - 1) * whole // n)] if n > 1 else []


def together(*parts: Passes) -> Passes:
    """Forward all that is sent forward, and backward likewise."""
    return Passes(*([call for part in parts for call in part[i]] for i in range(2)))


def count_calls(calls: Iterable[Call]) -> Traffic:
    """Calls as the ledger counts them."""
    ledger = Ledger()
    for call in calls:
        ledger.record(*call)
    return ledger.snapshot()


#: Collectives forward and backward by mode and role (a role says what a layer is to the modes, see
#: :mod:`internlm.core.parallel.sharding`); which tensor they are on is told by the function of the part.
TABLE: dict[tuple[str, str], tuple[tuple[Collective, ...], tuple[Collective, ...]]] = {
    ("mtp", "column"): ((), (AR,)),
    ("mtp", "row"): ((AR,), ()),
    ("mtp", "embedding"): ((AR,), ()),
    ("mtp", "embedding by hidden units"): ((AG,), ()),
    ("mtp", "head"): ((), (AR,)),
    ("msp", "column"): ((AG,), (RS,)),
    ("msp", "row"): ((RS,), (AG,)),
    ("msp", "embedding"): ((RS,), (AG,)),
    ("msp", "embedding by hidden units"): ((A2A,), (A2A,)),
    ("msp", "head"): ((AG,), (RS,)),
    ("fsp", "column"): ((AG,), (AG, RS)),
    ("fsp", "row"): ((RS,), (AG,)),
    ("fsp", "embedding"): ((RS,), (AG,)),
    ("fsp", "embedding by hidden units"): ((A2A,), (A2A,)),
    ("fsp", "head"): ((AG,), (RS,)),
    ("isp", "column"): ((AG,), (AG, RS)),
    ("isp", "row"): ((AG,), (AG, RS)),
    ("isp", "embedding"): ((AG,), (RS,)),
    ("isp", "head"): ((AG,), (RS,)),
    ("isp", "attention"): ((A2A,), (A2A,)),
    ("isp", "model"): ((AG,), ()),
}


class Linear(NamedTuple):
    """A weight [outputs, inputs] in a role, and whether it has a bias [outputs]."""

    role: str
    inputs: int
    outputs: int
    bias: bool = False


def block(s: Symbols) -> Passes:
    """One block: four linears, and attention."""
    return together(*(linear(s, each) for each in block_linears(s)), attention(s))


def block_linears(s: Symbols) -> list[Linear]:
    """wqkv: H → G·(Q + 2)·D; wo: G·Q·D → H; w13: H → 2·F; w2: F → H."""
    return [
        Linear("column", s.H, s.G * (s.Q + 2) * s.D, s.spec.qkv_bias),
        Linear("row", s.G * s.Q * s.D, s.H, s.spec.o_bias),
        Linear("column", s.H, 2 * s.F, s.spec.mlp_bias),
        Linear("row", s.F, s.H, s.spec.mlp_bias),
    ]


def linear(s: Symbols, weight: Linear) -> Passes:
    """A linear: isp sends its weight, the other modes the side of it that is H wide.

    ===========  ============================================  ========================================
    mode, role   forward                                       backward
    ===========  ============================================  ========================================
    mtp, column  –                                             all-reduce over t of T·inputs·e
    mtp, row     all-reduce over t of T·outputs·e              –
    msp, column  all-gather over t of T·inputs·e               reduce-scatter of the same
    msp, row     reduce-scatter over t of T·outputs·e          all-gather of the same
    fsp          as msp                                        as msp; column: one all-gather more
    isp          all-gather over w of w⌈outputs/w⌉·inputs·e    all-gather and reduce-scatter of the same
    ===========  ============================================  ========================================
    """
    if s.mode == "isp":
        return _part(s, weight.role, s.w, s.w.size * share(weight.outputs, s.w) * weight.inputs * s.e)
    return _part(s, weight.role, s.t, s.T * (weight.outputs if weight.role == "row" else weight.inputs) * s.e)


def attention(s: Symbols) -> Passes:
    """isp: over t, all-to-all of the queries, keys and values of T/t tokens, (T/t)·(G·Q + 2·max(G, t))·D·e, and of the
    heads' outputs, (T/t)·G·Q·D·e; backward the same. Of kv heads fewer than t each is sent to several ranks."""
    qkv = s.T // s.t.size * (s.G * s.Q + 2 * max(s.G, s.t.size)) * s.D * s.e
    return together(_part(s, "attention", s.t, qkv), to_tokens(s))


def to_tokens(s: Symbols) -> Passes:
    """The second of the two."""
    return _part(s, "attention", s.t, s.T // s.t.size * s.G * s.Q * s.D * s.e)


def positions(s: Symbols) -> Passes:
    """isp: all-gather over t of T positions, of 8 bytes each."""
    return _part(s, "model", s.t, s.T * 8)


def embedding(s: Symbols) -> Passes:
    """The embedding, split by words or by hidden units.

    ===============  ======================================  ==========================
    mode, split by   forward                                 backward
    ===============  ======================================  ==========================
    mtp, words       all-reduce over t of T·H·e              –
    mtp, units       all-gather over t of T·H·e              –
    msp, fsp, words  reduce-scatter over t of T·H·e          all-gather of the same
    msp, fsp, units  all-to-all over t of T·(H/t)·e          all-to-all of the same
    isp              all-gather over w of w⌈V/w⌉·H·e         reduce-scatter of the same
    ===============  ======================================  ==========================
    """
    if s.mode == "isp" or not by_hidden_units(s):
        return linear(s, Linear("embedding", s.H, s.V))
    units = s.H if s.mode == "mtp" else s.H // s.t.size
    return _part(s, "embedding by hidden units", s.t, s.T * units * s.e)


def head(s: Symbols) -> Passes:
    """The head, without the loss that is computed with it.

    ========  ======================================  ===========================
    mode      forward                                 backward
    ========  ======================================  ===========================
    mtp       –                                       all-reduce over t of T·H·e
    msp, fsp  all-gather over t of T·H·e              reduce-scatter of the same
    isp       all-gather over w of w⌈V/w⌉·H·e         reduce-scatter of the same
    ========  ======================================  ===========================
    """
    return linear(s, Linear("head", s.H, s.V))


def loss(s: Symbols, tokens: int, device_type: str) -> list[Call]:
    """mtp, msp, fsp: for each chunk of C tokens two all-reduces over t: the largest logits, C·g; and the sum of
    exponentials and the label's logit, 2·C·g, with label smoothing also the sum of logits, 3·C·g. isp: nothing."""
    if s.mode == "isp":
        return []
    chunk = default_chunk_tokens(device_type, share(s.V, s.t))
    sums = 3 if s.config.loss.label_smoothing else 2
    lengths = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    return [call for C in lengths for rows in (1, sums) for call in calls_of(s.t, AR, rows * C * s.g)]


def _part(s: Symbols, role: str, group: Group, whole: int) -> Passes:
    """The collectives of a role, each on a tensor of ``whole`` bytes."""
    directions = TABLE.get((s.mode, role), ((), ()))
    forward, backward = ([call for each in names for call in calls_of(group, each, whole)] for names in directions)
    return Passes(forward, backward)


def share(rows: int, group: Group) -> int:
    """⌈rows/n⌉."""
    return -(-rows // group.size)


def by_hidden_units(s: Symbols) -> bool:
    """Whether the embedding is split by hidden units, rather than by words as a tied one must be."""
    return s.config.model.embed_split_hidden and not s.config.model.tie_word_embeddings
