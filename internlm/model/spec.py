"""What a decoder is made of, with nothing left open."""

from __future__ import annotations

import math
from dataclasses import dataclass

from internlm.config.schema import ModelConfig


@dataclass(frozen=True)
class DecoderSpec:
    """The config's ``model`` section, and the choices that its family made."""

    config: ModelConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_interleaved: bool

    @property
    def output_scale(self) -> float:
        """Factor on the deviation of projections that write into the residual stream (GPT-2, section 2.3)."""
        return 1 / math.sqrt(2 * self.config.num_layers) if self.config.use_scaled_init else 1.0

    @property
    def attention_backend(self) -> str:
        """The attention kernel asked for; ``use_flash_attn=False`` rules only the flash kernels out."""
        asked = self.config.attention_backend
        return "sdpa" if asked == "auto" and not self.config.use_flash_attn else asked

    def recomputes(self, number: int) -> bool:
        """Whether the layer of that number in the whole model is computed again in backward: a fraction of them, from
        the first on every so many, so that each stage of a pipeline has its share."""
        layers, recomputed = self.config.num_layers, self.config.recomputed_layers
        return number * recomputed % layers < recomputed

    @property
    def recomputes_attention(self) -> bool:
        """Whether of every layer the attention between its linears is computed again in backward."""
        return self.config.checkpoint == "selective"
