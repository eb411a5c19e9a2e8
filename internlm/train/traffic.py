"""What a step sends, by formula: the entries that the ledger must hold after it, from the config alone.

==========  =========================================================================================================
t, w        ranks of the tensor group and of the weight group (w is 1 but under isp)
z, r        ranks that share one optimizer state, and copies of that state (replicas)
d           ranks whose labels make up the global batch: those of the data group, under isp all
T           tokens of a row on a data rank, ``data.packed_length``; where the sequence is split, t ranks share them
H, F, V     hidden width, intermediate width, vocabulary
G, Q, D     kv heads, query heads per kv head, head width
e, g        bytes of a parameter or an activation; of a gradient or a logit where they are summed up (4 at least)
n⌈V/n⌉      V rounded up to a multiple of n
==========  =========================================================================================================

A formula such as ``all-gather over t of T·H·e`` names the collective, the group and the bytes of the *whole* tensor,
N; of these each of n ranks sends (n − 1)·N/n, and by an all-reduce twice that, rounded down call by call, as told at
the top of :mod:`internlm.core.parallel.ledger`. A group of one rank sends nothing and counts no call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.context.parallel_context import sizes_of
from internlm.core.parallel.ledger import Ledger, Traffic
from internlm.model.families import FAMILIES, spec_of
from internlm.model.spec import DecoderSpec
from internlm.ops.cross_entropy import default_chunk_tokens
from internlm.ops.precision import wide
from internlm.solver.optimizer.flat_group import padded
from internlm.utils.dtype import torch_dtype

AG, RS, AR, A2A = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"

#: Collectives forward and backward by mode and role (a role says what a layer is to the modes, see
#: :mod:`internlm.core.parallel.sharding`); which tensor they are on is told by the function of the part.
TABLE: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
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


class Call(NamedTuple):
    """One collective, and the bytes that a rank sends by it."""

    mode: ParallelMode
    collective: str
    sent: int


class Part(NamedTuple):
    """What a part of the model sends as it runs forward, and backward."""

    forward: list[Call]
    backward: list[Call]


class Linear(NamedTuple):
    """A weight [outputs, inputs] in a role, and whether it has a bias [outputs]."""

    role: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Symbols:
    """The symbols at the top of this file; t, w, z, r and d as groups without handles."""

    config: Config
    spec: DecoderSpec
    t: Group
    w: Group
    z: Group
    r: Group
    d: Group
    T: int
    H: int
    F: int
    V: int
    G: int
    Q: int
    D: int
    e: int
    g: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> Symbols:
        """Those of a resolved ``config`` on ``world_size`` ranks; raises KeyError where the model is none of ours."""
        model, sizes = config.model, sizes_of(config, world_size)
        assert model.dtype is not None, "the resolver fills model.dtype"
        dtype = torch_dtype(model.dtype)
        return cls(
            config,
            spec_of(FAMILIES[config.model_type], model),
            t=Group(ParallelMode.TENSOR, size=sizes.tensor),
            w=Group(ParallelMode.WEIGHT, size=sizes.weight),
            z=Group(ParallelMode.ZERO1, size=sizes.zero),
            r=Group(ParallelMode.ZERO1_REPLICA, size=sizes.zero_parent // sizes.zero),
            d=Group(ParallelMode.ISP_DATA, size=world_size) if sizes.isp else Group(ParallelMode.DATA, size=sizes.data),
            T=config.data.packed_length,
            H=model.hidden_size,
            F=model.intermediate_size,
            V=model.vocab_size,
            G=model.kv_heads,
            Q=model.num_attention_heads // model.kv_heads,
            D=model.head_size,
            e=dtype.itemsize,
            g=wide(dtype).itemsize,
        )

    @property
    def mode(self) -> str:
        """The parallel mode."""
        return self.config.parallel.tensor.mode

    @property
    def split(self) -> Group:
        """The group over which weights are split."""
        return self.w if self.mode == "isp" else self.t


def expected_traffic(
    config: Config,
    world_size: int,
    tokens: Sequence[int] | None = None,
    *,
    types: int = 1,
    device_type: str = "cpu",
    forward_only: bool = False,
) -> Traffic:
    """What the ledger of each rank must hold after one training step of a decoder of ours: scalars, micro-batches,
    optimizer. With ``forward_only``, after one validation step.

    ``tokens``: of each micro-batch of this rank, how many take part in the loss: on the CPU those whose label is not
    ignored, elsewhere all. Without it, all of ``micro_num`` micro-batches. ``types``: number of data-set types.

    ``config`` is resolved, and without pipeline; the step is none that is skipped for its gradient norm. Raises
    KeyError for a model that is not ours.
    """
    s = Symbols.of(config, world_size)
    calls = scalars(s, types)
    for count in tokens if tokens is not None else [s.T] * config.data.micro_num:
        part = micro_batch(s, count, device_type)
        calls += part.forward if forward_only else part.forward + part.backward
    return count_calls(calls if forward_only else calls + optimizer(s))


def count_calls(calls: Iterable[Call]) -> Traffic:
    """Calls as the ledger counts them."""
    ledger = Ledger()
    for call in calls:
        ledger.record(*call)
    return ledger.snapshot()


# -- the model --------------------------------------------------------------------------------------------------------
def micro_batch(s: Symbols, tokens: int, device_type: str) -> Part:
    """One micro-batch: positions, embedding, blocks, head, loss of so many tokens. Backward runs blocks that are
    recomputed forward once more, the last product and all that is sent by it included."""
    outer, blocks = _together(positions(s), embedding(s), head(s)), block(s)
    recomputed = blocks.forward * s.spec.recomputed_layers
    layers = s.config.model.num_layers
    return Part(
        outer.forward + blocks.forward * layers + loss(s, tokens, device_type),
        outer.backward + blocks.backward * layers + recomputed,
    )


def block(s: Symbols) -> Part:
    """One block: four linears, and attention."""
    return _together(*(linear(s, each) for each in block_linears(s)), attention(s))


def block_linears(s: Symbols) -> list[Linear]:
    """wqkv: H → G·(Q + 2)·D; wo: G·Q·D → H; w13: H → 2·F; w2: F → H."""
    return [
        Linear("column", s.H, s.G * (s.Q + 2) * s.D, s.spec.qkv_bias),
        Linear("row", s.G * s.Q * s.D, s.H, s.spec.o_bias),
        Linear("column", s.H, 2 * s.F, s.spec.mlp_bias),
        Linear("row", s.F, s.H, s.spec.mlp_bias),
    ]


def linear(s: Symbols, weight: Linear) -> Part:
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
        return _part(s, weight.role, s.w, s.w.size * _share(weight.outputs, s.w) * weight.inputs * s.e)
    return _part(s, weight.role, s.t, s.T * (weight.outputs if weight.role == "row" else weight.inputs) * s.e)


def attention(s: Symbols) -> Part:
    """isp: over t, all-to-all of the queries, keys and values of T/t tokens, (T/t)·(G·Q + 2·max(G, t))·D·e, and of the
    heads' outputs, (T/t)·G·Q·D·e; backward the same. Of kv heads fewer than t each is sent to several ranks."""
    tokens, queries = s.T // s.t.size, s.G * s.Q
    sizes = (tokens * (queries + 2 * max(s.G, s.t.size)) * s.D * s.e, tokens * queries * s.D * s.e)
    return _together(*(_part(s, "attention", s.t, size) for size in sizes))


def positions(s: Symbols) -> Part:
    """isp: all-gather over t of T positions, of 8 bytes each."""
    return _part(s, "model", s.t, s.T * 8)


def embedding(s: Symbols) -> Part:
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
    if s.mode == "isp" or not _by_hidden_units(s):
        return linear(s, Linear("embedding", s.H, s.V))
    units = s.H if s.mode == "mtp" else s.H // s.t.size
    return _part(s, "embedding by hidden units", s.t, s.T * units * s.e)


def head(s: Symbols) -> Part:
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
    chunk = default_chunk_tokens(device_type, _share(s.V, s.t))
    sums = 3 if s.config.loss.label_smoothing else 2
    lengths = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    return [call for C in lengths for rows in (1, sums) for call in _calls(s.t, AR, rows * C * s.g)]


def scalars(s: Symbols, types: int) -> list[Call]:
    """Two all-reduces over d in a step: the number of valid tokens, 8; and loss, hits and tokens by type, 3·types·8."""
    return _calls(s.d, AR, 8) + _calls(s.d, AR, 3 * types * 8)


# -- the optimizer ----------------------------------------------------------------------------------------------------
class Kind(NamedTuple):
    """What parameters of one flat buffer have in common."""

    decays: bool
    is_split: bool = False
    is_partial: bool = False


def optimizer(s: Symbols) -> list[Call]:
    """Every flat buffer of B elements, padding included: its gradients, then the norm, then its parameters.

    1. reduce-scatter over z of B·g; all-reduce over r of (B/z)·g; where every rank has a part of the sum (vectors under
       msp and fsp: over t, under isp: over w) all-reduce of (B/z)·g
    2. all-reduce over z of 16; over the group by which weights are split, of 8
    3. all-gather over z of B·e
    """
    calls = _calls(s.z, AR, 16) + _calls(s.split, AR, 8)
    for kind, elements in flat_buffers(s).items():
        shard = elements // s.z.size * s.g
        calls += _calls(s.z, RS, elements * s.g) + _calls(s.r, AR, shard) + _calls(s.z, AG, elements * s.e)
        calls += _calls(s.split, AR, shard) if kind.is_partial else []
    return calls


def flat_buffers(s: Symbols) -> dict[Kind, int]:
    """Elements that a rank holds of each kind of parameter, rounded up to a multiple of z cache lines."""
    elements: dict[Kind, int] = {}
    for kind, count in parameters(s):
        elements[kind] = elements.get(kind, 0) + count
    return {kind: padded(count, s.z.size) for kind, count in elements.items()}


def parameters(s: Symbols) -> Iterator[tuple[Kind, int]]:
    """Kind and elements on this rank: of matrices, of biases split like the output that they are added to (of columns,
    but under isp), and of vectors that are whole (other biases, and norms: 2 in a block and 1 after the last, with
    bias for layernorm)."""
    model, adam, n = s.config.model, s.config.adam, s.split.size
    matrix, decays = Kind(True, n > 1), adam.decay_norm_and_bias or not adam.weight_decay
    split_vector, vector = Kind(decays, n > 1), Kind(decays, is_partial=s.mode != "mtp")
    for weight in block_linears(s) * model.num_layers:
        yield matrix, _elements(s, weight)
        if weight.bias and weight.role == "column" and s.mode != "isp":
            yield split_vector, weight.outputs // n
        elif weight.bias:
            yield vector, weight.outputs
    table = s.V * s.H // n if s.mode != "isp" and _by_hidden_units(s) else _share(s.V, s.split) * s.H
    yield matrix, table
    if not model.tie_word_embeddings:
        yield matrix, _share(s.V, s.split) * s.H
    yield vector, (2 * model.num_layers + 1) * s.H * (2 if model.norm_type == "layernorm" else 1)


def _elements(s: Symbols, weight: Linear) -> int:
    """Of a block's weight: isp splits its rows and pads them, the other modes split evenly."""
    if s.mode == "isp":
        return _share(weight.outputs, s.w) * weight.inputs
    return weight.outputs * weight.inputs // s.t.size


# -- small parts ------------------------------------------------------------------------------------------------------
def _calls(group: Group, collective: str, whole: int) -> list[Call]:
    """One collective on a tensor of ``whole`` bytes, as a list; of a group of one rank, none."""
    n, passes = group.size, 2 if collective == AR else 1
    return [Call(group.mode, collective, passes * (n - 1) * whole // n)] if n > 1 else []


def _part(s: Symbols, role: str, group: Group, whole: int) -> Part:
    """The collectives of a role, each on a tensor of ``whole`` bytes."""
    directions = TABLE.get((s.mode, role), ((), ()))
    forward, backward = ([call for each in names for call in _calls(group, each, whole)] for names in directions)
    return Part(forward, backward)


def _together(*parts: Part) -> Part:
    return Part(*([call for part in parts for call in part[i]] for i in range(2)))


def _share(rows: int, group: Group) -> int:
    """⌈rows/n⌉."""
    return -(-rows // group.size)


def _by_hidden_units(s: Symbols) -> bool:
    """Whether the embedding is split by hidden units, rather than by words as a tied one must be."""
    return s.config.model.embed_split_hidden and not s.config.model.tie_word_embeddings
