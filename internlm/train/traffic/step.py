"""What a step sends: scalars, micro-batches, optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from internlm.config import Config
from internlm.core.parallel.ledger import Traffic
from internlm.train.traffic import fully_sharded
from internlm.train.traffic.calls import AR, SEND, Call, Passes, calls_of, count_calls, together
from internlm.train.traffic.model import block, embedding, head, loss, positions, to_tokens
from internlm.train.traffic.symbols import Symbols
from internlm.train.traffic.update import optimizer


def expected_traffic(
    config: Config,
    world_size: int,
    tokens: Sequence[int] | None = None,
    *,
    types: int = 1,
    device_type: str = "cpu",
    forward_only: bool = False,
    stage: int = 0,
    zero_rank: int = 0,
) -> Traffic:
    """What the ledger of each rank of pipeline stage ``stage`` must hold after one training step of a decoder of ours:
    scalars, micro-batches, optimizer. With ``forward_only``, after one validation step. ``zero_rank``: its place among
    those that share the optimizer's state, which matters where they do so by whole parameters.

    ``tokens``: of each micro-batch of this rank, how many take part in the loss: on the CPU those whose label is not
    ignored, elsewhere all. Without it, all of ``micro_num`` micro-batches. ``types``: number of data-set types.

    ``config`` is resolved; the step is none that is skipped for its gradient norm. Raises KeyError for a model that is
    not ours.
    """
    s = Symbols.of(config, world_size, stage)
    calls = scalars(s, types)
    for count in tokens if tokens is not None else [s.T] * config.data.micro_num:
        passes = micro_batch(s, count, device_type)
        calls += passes.forward if forward_only else passes.forward + passes.backward
    return count_calls(calls if forward_only else calls + optimizer(s, zero_rank))


def scalars(s: Symbols, types: int) -> list[Call]:
    """All-reduces of a step: over d the number of valid tokens, 8; over d, then over p, loss, hits and tokens by type,
    3·types·8."""
    sums = 3 * types * 8
    return calls_of(s.d, AR, 8) + calls_of(s.d, AR, sums) + calls_of(s.p, AR, sums)


def micro_batch(s: Symbols, tokens: int, device_type: str) -> Passes:
    """One micro-batch, of which so many tokens take part in the loss: all chunks of the stage, and the parameters that
    are shared."""
    shared = [fully_sharded.units(s)] if s.shares_parameters else []
    return together(*shared, *(chunk(s, number, tokens, device_type) for number in s.chunks))


def chunk(s: Symbols, number: int, tokens: int, device_type: str) -> Passes:
    """A chunk: positions, blocks, what it sends to others; the first also the embedding, the last head and loss.
    Backward runs blocks that are recomputed forward once more, the last product and all that is sent by it included;
    where attention alone is recomputed, it sends heads to tokens once more. Where gradients of weights are put off, the
    same is sent later."""
    layers, each = len(s.part.chunks[number]), block(s)
    again = each.forward * s.recomputed(number)
    if s.spec.recomputes_attention:
        again = to_tokens(s).forward * layers
    blocks = Passes(each.forward * layers, each.backward * layers + again)
    parts = [positions(s), blocks, sends(s, number)]
    if s.part.is_first(number):
        parts.append(embedding(s))
    if s.part.is_last(number):
        parts += head(s), Passes(loss(s, tokens, device_type), [])
    return together(*parts)


def sends(s: Symbols, number: int) -> Passes:
    """S·H·e: hidden units to the chunk after, their gradient to the one before, unless that is on the same rank."""

    def to(virtual: int) -> list[Call]:
        goes = 0 <= virtual < s.cut.virtual_stages and s.cut.rank_of(virtual) != s.stage
        return [Call(s.p.mode, SEND, s.S * s.H * s.e)] if goes else []

    here = s.cut.virtual(s.stage, number)
    return Passes(to(here + 1), to(here - 1))
