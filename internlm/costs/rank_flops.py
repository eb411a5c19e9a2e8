"""Formula of the floating-point operations that one rank executes in a step.

Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from internlm.costs.flops import LinearShape, linears_of_layer, vocab_weights
from internlm.costs.symbols import Symbols


def product_flops(s: Symbols) -> float:
    """Return the FLOPs of all matrix products of a rank in one step, without attention and the optimizer.

    They are 6·W·K over the t ranks that share K tokens, for W elements of weights, plus 2·W·K for recomputed blocks. A
    rank that holds padding, or copies of kv heads, executes a few more. Beside adapters a weight takes 4·W·K, as it has
    no gradient, and less in the first layer.
    """
    model, tokens = s.config.model, s.T * s.config.data.micro_num
    weights = (2 if model.lora else 3) * vocab_weights(model) * s.stage_layers.has_head
    for layer in (layer for chunk in s.chunks for layer in s.stage_layers.chunks[chunk]):
        products = [product for linear in linears_of_layer(model, layer) for product in linear.products]
        weights += sum((count + model.recomputes(layer)) * _own_share(s, shape) for shape, count in products)
    return 2 * tokens * weights / s.t.size


def _own_share(s: Symbols, shape: LinearShape) -> int:
    """Return the elements of a weight, t times for a factor of an adapter that all ranks of mtp apply to all tokens."""
    return shape.numel * (s.t.size if s.mode == "mtp" and shape.role == "replicated" else 1)
