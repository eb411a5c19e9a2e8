"""What the optimizer sends: of flat buffers, and the norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.solver.optimizer.flat_group import padded
from internlm.train.traffic.calls import AG, AR, RS, Call, calls_of
from internlm.train.traffic.model import Linear, block_linears, by_hidden_units, share
from internlm.train.traffic.symbols import Symbols

#: The first and the last stage.
ENDS = Group(ParallelMode.PIPELINE, size=2)


class Kind(NamedTuple):
    """What parameters of one flat buffer have in common."""

    decays: bool
    is_split: bool = False
    is_partial: bool = False  # every rank over which weights are split has a part of the sum
    is_at_both_ends: bool = False  # of the pipeline


def optimizer(s: Symbols) -> list[Call]:
    """Every flat buffer of B elements, padding included: its gradients, then the norm, then its parameters.

    1. reduce-scatter over z of B·g; all-reduce over r of (B/z)·g; where every rank has a part of the sum (vectors under
       msp and fsp: over t, under isp: over w) all-reduce of (B/z)·g; the same over the first and the last stage of the
       pipeline, where both hold a tied embedding
    2. all-reduce over z of 16; over the group by which weights are split, of 8; over p of 8
    3. all-gather over z of B·e
    """
    calls = calls_of(s.z, AR, 16) + calls_of(s.split, AR, 8) + calls_of(s.p, AR, 8)
    for kind, elements in flat_buffers(s).items():
        shard = elements // s.z.size * s.g
        calls += calls_of(s.z, RS, elements * s.g) + calls_of(s.r, AR, shard) + calls_of(s.z, AG, elements * s.e)
        calls += calls_of(s.split, AR, shard) if kind.is_partial else []
        calls += calls_of(ENDS, AR, shard) if kind.is_at_both_ends else []
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
    for weight in block_linears(s) * s.layers:
        yield matrix, _elements(s, weight)
        if weight.bias and weight.role == "column" and s.mode != "isp":
            yield split_vector, weight.outputs // n
        elif weight.bias:
            yield vector, weight.outputs
    yield vector, (2 * s.layers + s.part.has_head) * s.H * (2 if model.norm_type == "layernorm" else 1)
    yield from ((matrix._replace(is_at_both_ends=is_copy), elements) for is_copy, elements in _tables(s))


def _tables(s: Symbols) -> Iterator[tuple[bool, int]]:
    """Elements on this rank of the embedding and of the head, where the stage has them; a tied one is one table, of
    which a stage that has either of the two alone holds a copy."""
    part, by_words = s.part, share(s.V, s.split) * s.H
    if s.config.model.tie_word_embeddings:
        if part.has_embedding or part.has_head:
            yield part.has_embedding != part.has_head, by_words
        return
    if part.has_embedding:
        yield False, s.V * s.H // s.t.size if s.mode != "isp" and by_hidden_units(s) else by_words
    if part.has_head:
        yield False, by_words


def _elements(s: Symbols, weight: Linear) -> int:
    """Of a block's weight: isp splits its rows and pads them, the other modes split evenly."""
    if s.mode == "isp":
        return share(weight.outputs, s.w) * weight.inputs
    return weight.outputs * weight.inputs // s.t.size
