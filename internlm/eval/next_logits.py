"""Logits of the next token of each sequence of a batch: by a key-value cache, over all ranks that share the model.

All ranks of a model take the same steps. The stages of a pipeline run one after the other, and its last stage sends the
tokens that it chose to all others.

Shapes: B sequences, T tokens of a packed row, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.accelerator import to_device, to_host
from internlm.core.context.group import Group
from internlm.core.parallel.collectives import all_gather, all_reduce
from internlm.core.parallel.fully_sharded import is_fully_sharded
from internlm.core.parallel.ledger import LEDGER
from internlm.core.parallel.linear import ParallelLinear
from internlm.model.decoder import Decoder
from internlm.model.kv_cache import KVCache
from internlm.ops.cpu.packed_weights import PackedWeights

#: Most sequences of which a step needs no packed weights.
_FEW = 2
#: Function that chooses the next token of each sequence from logits [B, V].
Choose = Callable[[Tensor], list[int]]


class BatchRun(Protocol):
    """Protocol for the generation of a batch, token by token."""

    def step(self, tokens: Sequence[int] | None, choose: Choose) -> list[int]:
        """Append ``tokens``, one per sequence, and return the tokens that ``choose`` selects next, on every rank.

        Args:
            tokens: Tokens that the last step returned; None in the first step, which runs the prompts.
            choose: Called with the logits of all sequences, on the ranks that have them.
        """

    kept_share: float
    """Largest share of the sequences for which :meth:`keep` pays."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the sequences with the indices ``rows``, which the next step then has in this order."""


class WholeSequences:
    """Generation with a user's own model, which has no cache: each token takes a pass over its whole sequence."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.model, self.device = model, device
        self.sequences = [list(prompt) for prompt in prompts]

    def step(self, tokens: Sequence[int] | None, choose: Choose) -> list[int]:
        """Append ``tokens``, one per sequence, and return the tokens that ``choose`` selects next."""
        for sequence, token in zip(self.sequences, tokens or (), strict=tokens is not None):
            sequence.append(token)
        logits = [self.model(to_device(torch.tensor([ids]), self.device))[0, -1] for ids in self.sequences]
        return choose(torch.stack(logits))

    kept_share = 1.0

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the sequences with the indices ``rows``."""
        self.sequences = [self.sequences[row] for row in rows]


class Precomputed:
    """Tensors computed once from the parameters of a decoder: a normalised head and packed weights.

    Args:
        model: Decoder, or this rank's part of one.
        steps: Number of steps of all batches.
        batch: Number of sequences that run together.
    """

    def __init__(self, model: Decoder, steps: int, batch: int) -> None:
        self.normalised_head: Tensor | None = None
        linears = [module for module in model.modules() if isinstance(module, ParallelLinear)]
        # Where a communicator or fully_shard gathers weights, a rank has no memory for whole copies.
        if is_fully_sharded(model) or any(linear.communicator.splits_weight for linear in linears):
            linears = []
        weights: dict[ParallelLinear, Tensor] = {linear: linear.weight for linear in linears}
        if linears and model.stage_layers.has_head and (head := model.output.normalised_weight()) is not None:
            self.normalised_head = weights[model.output] = head
        self.weights = PackedWeights(weights.values(), steps if batch > _FEW else 0)


class _VirtualStage(NamedTuple):
    """Chunk of the model, in the order of the layers."""

    rank: int  # stage of the pipeline
    chunk: int  # of this stage


class CachedDecoder:
    """Generation with a decoder and its cache of keys and values.

    Args:
        model: Decoder, or this rank's part of one whose communicators are attached.
        prompts: Token ids of each prompt.
        new_tokens: Largest number of steps.
        device: Device of the model.
        precomputed: What was computed from the parameters.
    """

    #: A copy of half of the cache takes the time of a few steps, and happens at most log2(sequences) times.
    kept_share = 0.5

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        device: torch.device,
        precomputed: Precomputed,
    ) -> None:
        self.model, self.device, self.batch = model, device, len(prompts)
        self.packed_weights = precomputed.weights
        # Modes that split a row over ranks need equal parts, of the prompts and of one token per sequence.
        padding = _padding(prompts, model.communicator.token_multiple)
        self.padding = [0] * len(padding)  # next token of each sequence of padding
        rows = [*prompts, *padding]
        self.row = to_device(torch.tensor([token for row in rows for token in row]), device)  # [T]
        self.cache = KVCache([len(row) for row in rows], new_tokens, device)
        self.cache.normalised_head = precomputed.normalised_head
        self.stages = _virtual_stages(model, device)

    def step(self, tokens: Sequence[int] | None, choose: Choose) -> list[int]:
        """Run the prompts, or one more token per sequence, and return the tokens that ``choose`` selects next."""
        model, group = self.model, self.model.pipeline
        row = self.row if tokens is None else to_device(torch.tensor([*tokens, *self.padding]), self.device)
        ids = model.communicator.input_tokens(row)
        x: Tensor | None = None
        for index, stage in enumerate(self.stages):
            if stage.rank != group.rank:
                continue
            # A rank may have several chunks in a row, as in the middle of a V-shaped pipeline.
            before = self.stages[index - 1].rank if index else group.rank
            if before != group.rank:
                x = _receive(model, ids, before, group)
            with self.packed_weights.in_use():
                x = model(ids, hidden=x, chunk=stage.chunk, cache=self.cache)
            if index + 1 < len(self.stages) and self.stages[index + 1].rank != group.rank:
                _send(x, self.stages[index + 1].rank, group)
        self.cache.advance()
        if group.size == 1:
            assert x is not None
            return choose(x[: self.batch])
        # A sum, to which only the last stage contributes: a broadcast from any rank.
        chosen = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        if self.stages[-1].rank == group.rank:
            assert x is not None
            chosen = to_device(torch.tensor(choose(x[: self.batch])), self.device)
        chosen_ids: list[int] = to_host(all_reduce(chosen, group), "tokens of the last stage").tolist()
        return chosen_ids

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the sequences with the indices ``rows``."""
        count = -len(rows) % self.model.communicator.token_multiple
        # Any other sequence serves as padding: there were enough to make the multiple before.
        others = [row for row in range(len(self.cache.lengths)) if row not in {*rows}]
        self.cache.keep([*rows, *others[:count]])
        self.padding, self.batch = [0] * count, len(rows)


def _padding(prompts: Sequence[Sequence[int]], multiple: int) -> list[list[int]]:
    """Return prompts of padding, after which the numbers of sequences and of tokens are divisible by ``multiple``."""
    tokens, count = sum(map(len, prompts)), -len(prompts) % multiple
    if not count and tokens % multiple:
        count = multiple
    if not count:
        return []
    longer = -(tokens + count) % multiple
    return [[0]] * (count - 1) + [[0] * (1 + longer)]


# -- pipeline ---------------------------------------------------------------------------------------------------------
def _virtual_stages(model: Decoder, device: torch.device) -> list[_VirtualStage]:
    """Return the chunks of all stages in the order of the layers; collective over the pipeline."""
    group, starts = model.pipeline, [chunk.start for chunk in model.stage_layers.chunks]
    if group.size == 1:
        return [_VirtualStage(group.rank, chunk) for chunk in sorted(range(len(starts)), key=starts.__getitem__)]
    all_starts = to_host(all_gather(to_device(torch.tensor(starts), device), group), "layers of the stages").tolist()
    order = sorted(range(len(all_starts)), key=all_starts.__getitem__)
    return [_VirtualStage(*divmod(index, len(starts))) for index in order]


def _receive(model: Decoder, ids: Tensor, source: int, group: Group) -> Tensor:
    shape, dtype = model.hidden_like({"input_ids": ids})
    x = torch.empty(shape, dtype=dtype, device=ids.device)
    dist.recv(x, group=group.handle, group_src=source)
    return x


def _send(x: Tensor, target: int, group: Group) -> None:
    LEDGER.record(group.mode, "send", x.nbytes, x)
    dist.send(x.contiguous(), group=group.handle, group_dst=target)
