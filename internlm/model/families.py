"""Model families: default values for decoder settings that the config leaves unset."""

from __future__ import annotations

from dataclasses import dataclass

from internlm.config.schema import ModelConfig
from internlm.model.decoder import Decoder, DecoderSpec


@dataclass(frozen=True)
class Family:
    """Defaults of a model family for keys that the config does not set."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_interleaved: bool = False


FAMILIES = {
    "INTERNLM": Family(qkv_bias=True, o_bias=True),  # arXiv 2403.17297, section 2: the first generation
    "INTERNLM2": Family(),  # arXiv 2403.17297: grouped queries, fused wqkv, no biases
    "INTERNLM2_PUBLIC": Family(),
    "LLAMA": Family(),  # as users call LLAMA2
    "LLAMA2": Family(),  # arXiv 2307.09288
}


@dataclass(frozen=True)
class FamilyBuilder:
    """Builder that creates decoders of one family from the config's ``model`` section."""

    family: Family

    def __call__(self, model: ModelConfig) -> Decoder:
        """Build a decoder from the config section ``model``."""
        return Decoder(spec_of(self.family, model))


def spec_of(family: Family, model: ModelConfig) -> DecoderSpec:
    """Return the decoder spec of config section ``model``, with the defaults of ``family`` for unset keys."""

    def bias(key: str) -> bool:
        if model.no_bias:  # overrides qkv_bias, o_bias and mlp_bias
            return False
        configured: bool | None = getattr(model, key)
        return getattr(family, key) if configured is None else configured

    return DecoderSpec(
        config=model,
        qkv_bias=bias("qkv_bias"),
        o_bias=bias("o_bias"),
        mlp_bias=bias("mlp_bias"),
        qk_interleaved=family.qk_interleaved if model.qk_interleaved is None else model.qk_interleaved,
    )
