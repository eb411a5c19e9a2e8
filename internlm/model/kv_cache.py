"""Cache of keys and values, with which a decoder runs only the new tokens of sequences that grow.

The first forward pass with a cache takes the prompts as one packed row; each later one takes one token per sequence. A
layer stores keys after the rotary embedding: under dynamic NTK scaling they keep the base of the length that their
sequence had when they were added, as in ``transformers``.

Shapes: B sequences, T new tokens, N query heads, G key/value heads of this rank, S slots, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from internlm.accelerator import HOST, to_device
from internlm.config.schema.model import AttentionBackend
from internlm.ops import PackedSequences, attention
from internlm.ops.cached_attention import cached_attention

#: Slots that a layer allocates beyond the prompts at first.
_SPARE = 256


class KVCache:
    """Keys and values of a batch of sequences of unequal lengths, by layer, and the positions of the next tokens.

    Call :meth:`advance` after each forward pass, when all chunks of the model have run.

    Args:
        prompts: Number of tokens of each prompt, at least 1.
        new_tokens: Largest number of tokens by which a sequence grows.
        device: Device of the model.
    """

    def __init__(self, prompts: Sequence[int], new_tokens: int, device: torch.device | str = HOST) -> None:
        self.device = torch.device(device)
        self.lengths = list(prompts)  # of each sequence, including the tokens of the next forward pass
        self.most = max(prompts) + new_tokens
        self.is_prefill = True
        self.normalised_head: Tensor | None = None
        """Weight of the head with rows of length 1, or None; kept, since it would be computed for each token."""
        self._layers: dict[int, LayerCache] = {}
        self._slots: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        bounds = [0, *accumulate(prompts)]
        self.sequences = PackedSequences.from_cu_seqlens(torch.tensor(bounds), self.device)
        self.last = to_device(torch.tensor(bounds[1:]) - 1, self.device)  # index of the last new token of a sequence
        counts = torch.tensor(self.lengths)
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self._owner = to_device(owner, self.device)  # sequence of each new token
        self.positions = to_device(torch.arange(bounds[-1]) - torch.tensor(bounds)[owner], self.device)  # [T]

    def advance(self) -> None:
        """Prepare for the next token of each sequence, once all layers have stored the current ones."""
        if self.is_prefill:
            batch = len(self.lengths)
            self.sequences = PackedSequences.uniform(batch, 1, self.device)
            self.positions = self.positions[self.last]
            self.last = self._owner = torch.arange(batch, device=self.device)
            self.is_prefill = False
        self.positions = self.positions + 1  # not in place: rotary tables and slots may refer to the old ones
        self.lengths = [length + 1 for length in self.lengths]
        self._slots.clear()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the sequences with the indices ``rows``, in this order, and forget the others; not before the prompts.

        Each layer copies their keys and values.
        """
        assert not self.is_prefill
        index = to_device(torch.tensor(rows), self.device)
        self.lengths = [self.lengths[row] for row in rows]
        self.sequences = PackedSequences.uniform(len(rows), 1, self.device)
        self.positions = self.positions[index]
        self.last = self._owner = torch.arange(len(rows), device=self.device)
        self._slots.clear()
        for layer in self._layers.values():
            layer.keep(index)

    def layer(self, index: int) -> LayerCache:
        """Return the cache of the layer with ``index`` in the whole model."""
        if index not in self._layers:
            self._layers[index] = LayerCache(self)
        return self._layers[index]

    def common_slot(self, count: int) -> int | None:
        """Return the slot of the new tokens in a layer of ``count`` slots; None if sequences differ, or for prompts."""
        if self.is_prefill or min(self.lengths) < max(self.lengths):
            return None
        return (self.lengths[0] - 1) % count

    def slots(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return which new tokens a layer of ``count`` slots stores: their indices, sequences and slots, each [n].

        A sequence longer than ``count`` keeps its last tokens: that at position p has slot p modulo ``count``.
        """
        if count not in self._slots:
            tokens = torch.arange(len(self.positions), device=self.device)
            if self.is_prefill and max(self.lengths) > count:  # otherwise a token would share its slot with a later one
                ends = to_device(torch.tensor(self.lengths), self.device)[self._owner]
                tokens = tokens[self.positions >= ends - count]
            self._slots[count] = tokens, self._owner[tokens], self.positions[tokens] % count
        return self._slots[count]


class LayerCache:
    """Keys and values of one layer, of this rank's heads; a ring buffer if the layer has a sliding window.

    Memory has the dtype of the keys. It is doubled whenever the sequences outgrow it.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.keys: Tensor | None = None  # [B, G, S, D]
        self.values: Tensor | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None, backend: AttentionBackend
    ) -> Tensor:
        """Store the new keys and values, and compute the attention of the new tokens over all tokens before them.

        Args:
            q: Rotated queries of the new tokens, [T, N, D].
            k: Rotated keys, [T, G, D].
            v: Values, [T, G, D].
            scale: Factor of q · kᵀ; by default D ** -0.5.
            window: Number of most recent tokens that each token attends to. None: all.
            backend: Kernel of the first forward pass, over the prompts.

        Returns:
            Attention output, [T, N, D].
        """
        cache = self.cache
        count = cache.most if window is None else min(window, cache.most)
        keys, values = self._store(k, v, count)
        if cache.is_prefill:
            return attention(q, k, v, cache.sequences, scale=scale, window=window, backend=backend)
        # A full ring buffer holds the keys of exactly the window; softmax does not depend on their order.
        filled = [min(length, count) for length in cache.lengths]
        return cached_attention(q, keys, values, filled, scale=scale)

    def keep(self, index: Tensor) -> None:
        """Copy the keys and values of the sequences at ``index``, and forget the others."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[index], self.values[index]

    def _store(self, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            shape = (len(self.cache.lengths), k.shape[1], 0, k.shape[2])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        used, have = min(max(self.cache.lengths), count), self.keys.shape[2]
        if used > have:
            size = min(count, max(used + _SPARE, 2 * have))
            self.keys, self.values = (_grown(x, size) for x in (self.keys, self.values))
        if (slot := self.cache.common_slot(count)) is not None:
            self.keys.select(2, slot).copy_(k)  # a fifth of the time of an assignment by indices
            self.values.select(2, slot).copy_(v)
            return self.keys, self.values
        tokens, owners, slots = self.cache.slots(count)
        if len(tokens) < len(k):
            k, v = k[tokens], v[tokens]
        self.keys[owners, :, slots] = k
        self.values[owners, :, slots] = v
        return self.keys, self.values


def _grown(x: Tensor, slots: int) -> Tensor:
    """Return a copy of ``x`` [B, G, S, D] with more slots."""
    # Zeros: a masked slot has weight 0, but 0 · NaN is NaN.
    grown = x.new_zeros(*x.shape[:2], slots, x.shape[3])
    grown[:, :, : x.shape[2]] = x
    return grown
