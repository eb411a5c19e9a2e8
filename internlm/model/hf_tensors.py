"""Tensors of a decoder by their names in Hugging Face checkpoints.

Ours are fused: wqkv and w13 hold several tensors of theirs. Each row of the table is one of their tensors, with the
slice of ours that it is. Both directions of conversion read the same table.

Shapes: G kv heads, Q query heads per kv head, D head dimension, H hidden size, F intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from internlm.model.spec import DecoderSpec


class Part(NamedTuple):
    """Range of a tensor along an axis."""

    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class HFTensor:
    """Tensor of a Hugging Face checkpoint, and where its elements are in a decoder."""

    name: str
    ours: str
    """Logical name of the tensor of the decoder."""
    part: Part | None = None
    """Range of the decoder's tensor; None: all of it."""
    is_vector: bool = False
    is_interleaved: bool = False
    """Whether the decoder pairs neighbouring elements of a head for rotary embedding; theirs pair its two halves."""
    is_halved: bool = False
    """Whether the decoder pairs the two halves of a head; theirs pair neighbouring elements."""

    def of(self, ours: Tensor) -> Tensor:
        """Return the tensor from that of the decoder."""
        own = ours if self.part is None else ours.narrow(*self.part)
        if self.reorders:
            own = self._pairs(own)
        return own.reshape(-1) if self.is_vector else own.reshape(-1, own.shape[-1])

    @property
    def reorders(self) -> bool:
        """Whether the elements of a head have another order in the decoder."""
        return self.is_interleaved or self.is_halved

    def _pairs(self, own: Tensor) -> Tensor:
        """Return a view of heads of the decoder with the two axes of their split, [2, D/2] or [D/2, 2]."""
        # Even elements before odd ones, or the reverse: the transpose of the split is the other order.
        split = (-1, 2) if self.is_interleaved else (2, -1)
        return own.unflatten(self._head_axis, split).transpose(self._head_axis - 1, self._head_axis)

    @property
    def _head_axis(self) -> int:
        return -1 if self.is_vector else -2

    def part_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part that it is of the decoder's tensor of ``shape``."""
        sizes = list(shape)
        if self.part is not None:
            sizes[self.part.axis] = self.part.length
        return tuple(sizes)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return its shape in the checkpoint, for the decoder's tensor of ``shape``."""
        sizes = self.part_shape(shape)
        return (math.prod(sizes),) if self.is_vector else (math.prod(sizes[:-1]), sizes[-1])

    def head_axis(self, dims: int) -> int:
        """Return the axis of a head's elements in the decoder's tensor of ``dims`` axes."""
        return dims + self._head_axis

    def split_of_head(self, size: int) -> tuple[int, int]:
        """Return the two sizes of a head of ``size`` elements of theirs, which are transposed in the decoder."""
        return (2, size // 2) if self.is_interleaved else (size // 2, 2)

    def place(self, theirs: Tensor, ours: Tensor) -> None:
        """Copy the tensor to its place in that of the decoder.

        Raises:
            ValueError: It has another shape.
        """
        own = ours if self.part is None else ours.narrow(*self.part)
        expected = self.of(ours).shape
        if theirs.shape != expected:
            raise ValueError(f"expected shape {list(expected)}, got {list(theirs.shape)}")
        # Copied through views, so that a tensor of ours is never assembled twice.
        if self.reorders:
            pairs = self._pairs(own)
            pairs.copy_(theirs.view(pairs.shape))
        else:
            own.copy_(theirs.view(own.shape))


#: Names of the norms of a block in families that normalise only the input of each layer, only its output, or both.
_NORMS = {
    "input": {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "output": {"attention_out_norm": "post_attention_layernorm", "ffn_out_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
    },
}


def hf_tensors(spec: DecoderSpec) -> Iterator[HFTensor]:
    """Yield the tensors of a checkpoint of a decoder, in the order of the layers."""
    yield HFTensor("model.embed_tokens.weight", "embedding.weight")
    for layer in range(spec.config.num_layers):
        yield from _block_tensors(spec, f"layers.{layer}", f"model.layers.{layer}")
    yield HFTensor("model.norm.weight", "norm.weight", is_vector=True)
    # A tied head is the embedding, and is not saved twice.
    if not spec.config.tie_word_embeddings:
        yield HFTensor("lm_head.weight", "output.weight")


def _block_tensors(spec: DecoderSpec, ours: str, theirs: str) -> Iterator[HFTensor]:
    heads = spec.config.num_attention_heads // spec.config.kv_heads
    fused: dict[str, dict[str, Part | None]] = {
        "attention.wqkv": {
            "self_attn.q_proj": Part(1, 0, heads),
            "self_attn.k_proj": Part(1, heads, 1),
            "self_attn.v_proj": Part(1, heads + 1, 1),
        },
        "attention.wo": {"self_attn.o_proj": None},
        "feed_forward.w13": {"mlp.gate_proj": Part(0, 0, 1), "mlp.up_proj": Part(0, 1, 1)},
        "feed_forward.w2": {"mlp.down_proj": None},
    }
    has_bias = {
        "attention.wqkv": spec.qkv_bias,
        "attention.wo": spec.o_bias,
        "feed_forward.w13": spec.mlp_bias,
        "feed_forward.w2": spec.mlp_bias,
    }
    for linear, parts in fused.items():
        for name, part in parts.items():
            paired = spec.qk_interleaved and name.endswith(("q_proj", "k_proj"))
            yield HFTensor(f"{theirs}.{name}.weight", f"{ours}.{linear}.weight", part, False, paired)
            if has_bias[linear]:
                yield HFTensor(f"{theirs}.{name}.bias", f"{ours}.{linear}.bias", part, True, paired)
    if spec.config.qk_norm != "none":
        for kind in "qk":
            name = f"{theirs}.self_attn.{kind}_norm.weight"
            yield HFTensor(name, f"{ours}.attention.qk_norm.{kind}_weight", None, True, spec.qk_interleaved)
    for norm, name in _NORMS[spec.family.norms].items():
        yield HFTensor(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight", is_vector=True)


def tensor_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return the global shapes of a decoder's tensors that are in a checkpoint of Hugging Face, without building it."""
    c = spec.config
    # A formula, since building the model would need the layout of the run, whose shards have other shapes.
    heads, groups = c.num_attention_heads // c.kv_heads, c.kv_heads
    of_block = {
        "attention.wqkv": ((groups, heads + 2, c.head_size), c.hidden_size),
        "attention.wo": ((c.hidden_size,), groups * heads * c.head_size),
        "feed_forward.w13": ((2, c.intermediate_size), c.hidden_size),
        "feed_forward.w2": ((c.hidden_size,), c.intermediate_size),
    }
    per_head = c.qk_norm == "head"
    qk_norms = {
        "q_weight": (c.head_size,) if per_head else (groups, heads, c.head_size),
        "k_weight": (c.head_size,) if per_head else (groups, 1, c.head_size),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(row.ours for row in hf_tensors(spec)):
        module, _, parameter = name.rpartition(".")
        features, width = of_block.get(module.split(".", 2)[-1], ((), 0))
        if module in ("embedding", "output"):
            shapes[name] = (c.vocab_size, c.hidden_size)
        elif features:
            shapes[name] = features if parameter == "bias" else (*features, width)
        else:
            shapes[name] = qk_norms.get(parameter, (c.hidden_size,))
    return shapes


def llama_tensors(spec: DecoderSpec) -> Iterator[HFTensor]:
    """Yield the tensors of a decoder by their names in Meta's releases of Llama, in the order of the layers.

    The releases pair neighbouring elements of a head for rotary embedding, and have no biases.
    """
    heads = spec.config.num_attention_heads // spec.config.kv_heads
    # Values have no rotary embedding, and so no order of pairs.
    is_halved = not spec.qk_interleaved
    yield HFTensor("tok_embeddings.weight", "embedding.weight")
    for layer in (f"layers.{index}" for index in range(spec.config.num_layers)):
        wqkv, w13 = f"{layer}.attention.wqkv.weight", f"{layer}.feed_forward.w13.weight"
        yield HFTensor(f"{layer}.attention.wq.weight", wqkv, Part(1, 0, heads), is_halved=is_halved)
        yield HFTensor(f"{layer}.attention.wk.weight", wqkv, Part(1, heads, 1), is_halved=is_halved)
        yield HFTensor(f"{layer}.attention.wv.weight", wqkv, Part(1, heads + 1, 1))
        yield HFTensor(f"{layer}.feed_forward.w1.weight", w13, Part(0, 0, 1))
        yield HFTensor(f"{layer}.feed_forward.w3.weight", w13, Part(0, 1, 1))
        for name in ("attention.wo.weight", "feed_forward.w2.weight"):
            yield HFTensor(f"{layer}.{name}", f"{layer}.{name}")
        for name in ("attention_norm.weight", "ffn_norm.weight"):
            yield HFTensor(f"{layer}.{name}", f"{layer}.{name}", is_vector=True)
    yield HFTensor("norm.weight", "norm.weight", is_vector=True)
    if not spec.config.tie_word_embeddings:
        yield HFTensor("output.weight", "output.weight")
