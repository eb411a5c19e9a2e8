"""Formula of the floating-point operations that one rank executes in a step.

Symbols: :mod:`internlm.costs.symbols`.
"""

from __future__ import annotations

from internlm.costs.flops import block_weights, vocab_weights
from internlm.costs.symbols import Symbols


def product_flops(s: Symbols) -> float:
    """Return the FLOPs of all matrix products of a rank in one step, without attention and the optimizer.

    They are 6·W·K over the t ranks that share K tokens, for W elements of weights, plus 2·W·K for recomputed blocks. A
    rank that holds padding, or copies of kv heads, executes a few more.
    """
    model, tokens = s.config.model, s.T * s.config.data.micro_num
    recomputed = sum(map(s.recomputed, s.chunks))
    weights = (3 * s.layers + recomputed) * block_weights(model)
    weights += 3 * vocab_weights(model) * s.stage_layers.has_head
    return 2 * tokens * weights / s.t.size
