"""Formulas of the decoder's weight matrices and floating-point operations per token.

A matmul of [m, k] and [k, n] counts as 2·m·k·n operations (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B).
:func:`block_linears` is the only list of the decoder's weights in this package: traffic, gather buffers, FLOPs and the
balance of pipeline stages derive from it. Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, get_args

from internlm.config.schema import ModelConfig
from internlm.config.schema.model import LoraTarget
from internlm.core.parallel.sharding import Role

#: Linears of a block that may have adapters, in forward order.
TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)


class LinearShape(NamedTuple):
    """Shape [outputs, inputs] of a linear's weight, and role of the linear (:mod:`internlm.core.parallel.sharding`)."""

    role: Role
    inputs: int
    outputs: int
    shares_input: bool = False
    """Whether its input is that of the linear before it, so that it is not communicated again."""

    @property
    def numel(self) -> int:
        """Number of elements of the weight."""
        return self.inputs * self.outputs


class BlockLinear(NamedTuple):
    """Linear of a block: its weight, its adapter if it has one, and which gradients the backward pass computes."""

    target: LoraTarget
    shape: LinearShape
    adapter: tuple[LinearShape, ...]
    """Factors A, [r, I], and B, [O, r], of its adapter (Hu et al. 2021, arXiv 2106.09685); empty without one."""
    is_trained: bool
    """Whether the gradient of its weight is computed; False for all weights beside adapters."""
    needs_input_grad: bool
    """Whether the gradient of its input is computed; False up to the first adapter of the model."""

    @property
    def weights(self) -> int:
        """Number of elements of the weight and the adapter."""
        return self.shape.numel + sum(factor.numel for factor in self.adapter)

    @property
    def products(self) -> list[tuple[LinearShape, int]]:
        """Each weight with its number of matmuls: the output, the gradient of the input, and that of the weight."""
        found = [(self.shape, 1 + self.needs_input_grad + self.is_trained)]
        if self.adapter:
            down, up = self.adapter
            found += [(down, 2 + self.needs_input_grad), (up, 3)]
        return found


def linears_of_layer(model: ModelConfig, layer: int) -> list[BlockLinear]:
    """Return the linears of the block of index ``layer``, in forward order.

    Those of a projection that is not fused have its target, and each has an adapter of its own.
    """
    targets = () if model.lora is None else model.lora.targets
    # Embedding and norms are frozen beside adapters, so no gradient flows to what is before the first adapter.
    first = min(map(TARGETS.index, targets)) if targets and layer == 0 else -1
    # Columns and rows alternate: what projects to heads or features, and what projects back.
    return [
        BlockLinear(
            target=target,
            shape=shape,
            adapter=_adapter(shape, model.lora.rank) if model.lora and target in targets else (),
            is_trained=not targets,
            needs_input_grad=TARGETS.index(target) > first,
        )
        for target, (_, shapes) in zip(TARGETS, groupby(block_linears(model), attrgetter("role")), strict=True)
        for shape in shapes
    ]


def _adapter(shape: LinearShape, rank: int) -> tuple[LinearShape, ...]:
    # As in internlm.core.parallel.lora: the factor that touches the split features of the linear is split with them.
    down: Role = "row" if shape.role == "row" else "replicated"
    up: Role = "column" if shape.role == "column" else "replicated"
    return LinearShape(down, shape.inputs, rank, shape.shares_input), LinearShape(up, rank, shape.outputs)


def attention_has_grad(model: ModelConfig, layer: int) -> bool:
    """Return whether the backward pass goes through attention in ``layer``, and not only through what follows it."""
    return next(linear for linear in linears_of_layer(model, layer) if linear.target == "wo").needs_input_grad


def block_linears(model: ModelConfig) -> list[LinearShape]:
    """Return the shapes of a block's weights, in forward order.

    They are wqkv (H → G·(Q + 2)·D), wo (G·Q·D → H), w13 (H → 2·F) and w2 (F → H). Without ``enable_qkv_fusion`` the
    first is wq (H → G·Q·D), wk and wv (H → G·D), without ``mlp_layer_fusion`` the third is w1 and w3 (H → F).
    """
    width, gate = model.hidden_size, model.intermediate_size
    queries, keys = (heads * model.head_size for heads in (model.num_attention_heads, model.kv_heads))
    return [
        *_projection(width, (queries, keys, keys), model.enable_qkv_fusion),
        LinearShape("row", queries, width),
        *_projection(width, (gate, gate), model.mlp_layer_fusion),
        LinearShape("row", gate, width),
    ]


def _projection(inputs: int, outputs: tuple[int, ...], is_fused: bool) -> list[LinearShape]:
    sizes = (sum(outputs),) if is_fused else outputs
    return [LinearShape("column", inputs, size, shares_input=index > 0) for index, size in enumerate(sizes)]


def block_weights(model: ModelConfig) -> int:
    """Return the number of elements of a block's weights, without biases and norms, which are small."""
    return sum(linear.inputs * linear.outputs for linear in block_linears(model))


def vocab_weights(model: ModelConfig) -> int:
    """Return V·H, the number of elements of the embedding, which equals that of the head."""
    return model.vocab_size * model.hidden_size


def block_forward_flops(model: ModelConfig, seq_len: int, layer: int) -> float:
    """Return the forward FLOPs per token of the block of index ``layer``, for sequences of ``seq_len`` tokens."""
    weights = sum(linear.weights for linear in linears_of_layer(model, layer))
    return 2 * weights + attention_forward_flops(model, seq_len, layer)


def attention_forward_flops(model: ModelConfig, seq_len: int, layer: int) -> float:
    """Return the forward FLOPs per token of the two matmuls of attention, q·kᵀ and p·v, in one block.

    Attention is counted over all ``seq_len`` keys per query, as is usual in publications, although the causal mask
    removes half of them; in a layer with a sliding window, over the keys of the window.
    """
    keys = min(model.window(layer) or seq_len, seq_len)
    return 2 * 2 * keys * model.num_attention_heads * model.head_size


def head_forward_flops(model: ModelConfig) -> float:
    """Return the forward FLOPs per token of the head."""
    return 2 * vocab_weights(model)


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the forward FLOPs per token of the whole model."""
    blocks = sum(block_forward_flops(model, seq_len, layer) for layer in range(model.num_layers))
    return blocks + head_forward_flops(model)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the forward and backward FLOPs per token of the whole model, without recomputation.

    Each matmul of the forward pass takes two in the backward pass, one for the gradient of each operand. Beside
    adapters, the weights have no gradient, and neither has what is before the first adapter.
    """
    total = (2 if model.lora else 3) * head_forward_flops(model)
    for layer in range(model.num_layers):
        for linear in linears_of_layer(model, layer):
            total += 2 * sum(shape.numel * count for shape, count in linear.products)
        passes = 3 if attention_has_grad(model, layer) else 1
        total += passes * attention_forward_flops(model, seq_len, layer)
    return total


def hardware_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs per token that the hardware executes, including recomputation.

    They are :func:`model_flops_per_token` plus the forward FLOPs that activation checkpointing repeats.
    """
    # The head is never recomputed: its loss and gradients are computed together.
    layers = range(model.num_layers)
    recomputed = sum(block_forward_flops(model, seq_len, layer) for layer in layers if model.recomputes(layer))
    if model.checkpoint == "selective":
        again = (layer for layer in layers if attention_has_grad(model, layer))
        recomputed = sum(attention_forward_flops(model, seq_len, layer) for layer in again)
    return model_flops_per_token(model, seq_len) + recomputed
