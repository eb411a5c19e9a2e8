"""Tensors of a decoder by their names in Hugging Face checkpoints.

Ours may be fused: wqkv and w13 then hold several tensors of theirs. Each row of the table is one of their tensors, with
the slice of ours that it is. Both directions of conversion read the same table.

Shapes: G kv heads, Q query heads per kv head, D head dimension, H hidden size, F intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from internlm.model.projections import GATE_UP, QKV, Part, Projection
from internlm.model.spec import DecoderSpec


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
    q, k, v = _linears(spec, QKV, "attention")
    gate, up = _linears(spec, GATE_UP, "feed_forward")
    rows = [
        ("self_attn.q_proj", q, spec.qkv_bias),
        ("self_attn.k_proj", k, spec.qkv_bias),
        ("self_attn.v_proj", v, spec.qkv_bias),
        ("self_attn.o_proj", ("attention.wo", None), spec.o_bias),
        ("mlp.gate_proj", gate, spec.mlp_bias),
        ("mlp.up_proj", up, spec.mlp_bias),
        ("mlp.down_proj", ("feed_forward.w2", None), spec.mlp_bias),
    ]
    for name, (linear, part), has_bias in rows:
        paired = spec.qk_interleaved and name.endswith(("q_proj", "k_proj"))
        yield HFTensor(f"{theirs}.{name}.weight", f"{ours}.{linear}.weight", part, False, paired)
        if has_bias:
            yield HFTensor(f"{theirs}.{name}.bias", f"{ours}.{linear}.bias", part, True, paired)
    if spec.config.qk_norm != "none":
        for kind in "qk":
            name = f"{theirs}.self_attn.{kind}_norm.weight"
            yield HFTensor(name, f"{ours}.attention.qk_norm.{kind}_weight", None, True, spec.qk_interleaved)
    for norm, name in _NORMS[spec.family.norms].items():
        yield HFTensor(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight", is_vector=True)


def _linears(spec: DecoderSpec, projection: Projection, module: str) -> Iterator[tuple[str, Part | None]]:
    """Yield, for each linear of a projection, the decoder's linear that holds it, and the part of that; None: all."""
    is_fused = projection.is_fused(spec.config)
    for name, part in projection.parts(_shape(spec, projection)[projection.axis]):
        yield (f"{module}.{projection.name}", part) if is_fused else (f"{module}.{name}", None)


def _shape(spec: DecoderSpec, projection: Projection) -> tuple[int, ...]:
    """Return the shape of the output of a projection for one token."""
    c = spec.config
    if projection is QKV:
        return (c.kv_heads, c.num_attention_heads // c.kv_heads + 2, c.head_size)
    return (2, c.intermediate_size)


def tensor_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return the global shapes of a decoder's tensors that are in a checkpoint of Hugging Face, without building it."""
    c = spec.config
    # A formula, since building the model would need the layout of the run, whose shards have other shapes.
    heads, groups = c.num_attention_heads // c.kv_heads, c.kv_heads
    of_block: dict[str, tuple[tuple[int, ...], int]] = {
        "attention.wo": ((c.hidden_size,), groups * heads * c.head_size),
        "feed_forward.w2": ((c.hidden_size,), c.intermediate_size),
    }
    for module, projection in (("attention", QKV), ("feed_forward", GATE_UP)):
        shape, axis = _shape(spec, projection), projection.axis
        of_block[f"{module}.{projection.name}"] = (shape, c.hidden_size)
        for own, part in projection.parts(shape[axis]):
            of_block[f"{module}.{own}"] = ((*shape[:axis], part.length, *shape[axis + 1 :]), c.hidden_size)
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
    yield HFTensor("tok_embeddings.weight", "embedding.weight")
    for layer in (f"layers.{index}" for index in range(spec.config.num_layers)):
        # Our names of single linears are theirs.
        for module, projection in (("attention", QKV), ("feed_forward", GATE_UP)):
            rows = zip(projection.ranges, _linears(spec, projection, f"{layer}.{module}"), strict=True)
            for name, (linear, part) in rows:
                # Values have no rotary embedding, and so no order of pairs.
                is_halved = name in ("wq", "wk") and not spec.qk_interleaved
                yield HFTensor(f"{layer}.{module}.{name}.weight", f"{linear}.weight", part, is_halved=is_halved)
        for name in ("attention.wo.weight", "feed_forward.w2.weight"):
            yield HFTensor(f"{layer}.{name}", f"{layer}.{name}")
        for name in ("attention_norm.weight", "ffn_norm.weight"):
            yield HFTensor(f"{layer}.{name}", f"{layer}.{name}", is_vector=True)
    yield HFTensor("norm.weight", "norm.weight", is_vector=True)
    if not spec.config.tie_word_embeddings:
        yield HFTensor("output.weight", "output.weight")
