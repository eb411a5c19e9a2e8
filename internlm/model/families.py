"""Model families: each is a row of a table, all are the one decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from internlm.config.schema import ModelConfig
from internlm.model.decoder import Decoder, DecoderSpec


@dataclass(frozen=True)
class Family:
    """What sets a family apart, where the config does not say otherwise."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_interleaved: bool = False


FAMILIES = {
    "INTERNLM": Family(qkv_bias=True, o_bias=True),  # arXiv 2403.17297, section 2: the first generation
    "INTERNLM2": Family(),  # arXiv 2403.17297: grouped queries, fused wqkv, no biases
    "INTERNLM2_PUBLIC": Family(),
    "LLAMA2": Family(),  # arXiv 2307.09288
}


def build_family(family: Family) -> Callable[[ModelConfig], Decoder]:
    """A function that builds a decoder of that family from the config's ``model`` section."""
    return partial(_build, family)


def _build(family: Family, model: ModelConfig) -> Decoder:
    return Decoder(spec_of(family, model))


def spec_of(family: Family, model: ModelConfig) -> DecoderSpec:
    """The decoder that ``model`` describes, in a family."""

    def bias(key: str) -> bool:
        asked: bool | None = getattr(model, key)
        return False if model.no_bias else getattr(family, key) if asked is None else asked

    return DecoderSpec(
        config=model,
        qkv_bias=bias("qkv_bias"),
        o_bias=bias("o_bias"),
        mlp_bias=bias("mlp_bias"),
        qk_interleaved=family.qk_interleaved if model.qk_interleaved is None else model.qk_interleaved,
    )
