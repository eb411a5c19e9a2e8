"""Rules about the shape of the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from internlm.config.rules.rule import Rule, at
from internlm.config.schema import Config
from internlm.config.support import Facts
from internlm.utils.errors import Problem


def heads_divide_hidden_size(config: Config, facts: Facts) -> Iterator[Problem]:
    """``head_dim`` is derived from the two unless it is given."""
    model = config.model
    if model.head_dim is None:
        what = f"{model.hidden_size} is not divisible by num_attention_heads = {model.num_attention_heads}"
        yield Problem("model.hidden_size", what, "Change one of them, or set model.head_dim")


def head_dim_is_even(config: Config, facts: Facts) -> Iterator[Problem]:
    """Rotary embedding turns pairs."""
    if (config.model.head_dim or 0) % 2:
        yield Problem(
            "model.head_dim", f"{config.model.head_dim} is odd, and rotary embedding turns pairs", "Make it even"
        )


def kv_heads_divide_heads(config: Config, facts: Facts) -> Iterator[Problem]:
    """Each key/value head serves equally many query heads."""
    heads, kv_heads = config.model.num_attention_heads, config.model.kv_heads
    if heads % kv_heads:
        what = f"{kv_heads} does not divide num_attention_heads = {heads}"
        yield Problem("model.num_kv_attention_heads", what, f"Use one of {listed(divisors(heads))}")


def experts_suffice(config: Config, facts: Facts) -> Iterator[Problem]:
    """A token can't go to more experts than there are."""
    experts, top_k = config.model.num_experts, config.model.top_k
    if experts > 1 and top_k > experts:
        yield Problem("model.top_k", f"{top_k} is more than num_experts = {experts}", f"Use at most {experts}")


def layers_to_offload_exist(config: Config, facts: Facts) -> Iterator[Problem]:
    """A chunk of a pipeline may have fewer, of which then all are."""
    offloaded, layers = config.model.cpu_offloading, config.model.num_layers
    if offloaded > layers:
        what = f"{offloaded} is more than num_layers = {layers}"
        yield Problem("model.cpu_offloading", what, f"Use at most {layers}")


def compiled_blocks_are_recomputed_as_a_whole(config: Config, facts: Facts) -> Iterator[Problem]:
    """What a compiled block keeps for backward is the compiler's choice."""
    if (config.model.compile, config.model.checkpoint) == (True, "selective"):
        what = "'selective' says what is kept within a layer, which in a compiled one the compiler decides"
        yield Problem("model.checkpoint", what, "Use True, False or a fraction, or set model.compile to False")


def divisors(number: int) -> list[int]:
    """Divisors of ``number``, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(numbers: Iterable[int]) -> str:
    """Numbers, as a person lists them."""
    return ", ".join(map(str, numbers))


RULES = (
    Rule(at("model", "hidden_size", "num_attention_heads", "head_dim"), heads_divide_hidden_size),
    Rule(at("model", "head_dim"), head_dim_is_even),
    Rule(at("model", "num_attention_heads", "num_kv_attention_heads"), kv_heads_divide_heads),
    Rule(at("model", "num_experts", "top_k"), experts_suffice),
    Rule(at("model", "cpu_offloading", "num_layers"), layers_to_offload_exist),
    Rule(at("model", "compile", "checkpoint"), compiled_blocks_are_recomputed_as_a_whole),
)
