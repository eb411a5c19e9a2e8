"""Specification of a decoder: a family, and the config's ``model`` section completed with the family's defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from internlm.config.families import Family
from internlm.config.schema import ModelConfig
from internlm.config.schema.model import AttentionBackend, LoraTarget, RopeScalingConfig
from internlm.core.parallel import ParallelLinear
from internlm.core.parallel.lora import AdaptedLinear, Adapter, group_of
from internlm.core.parallel.placement import FusedTensor, Init
from internlm.model.projections import Projection
from internlm.ops import ContextScaling, Llama3Scaling, RotaryScaling, YarnScaling


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Specification of a decoder: structure of its family, and sizes and kernels of its config."""

    config: ModelConfig
    family: Family

    @property
    def qkv_bias(self) -> bool:
        """Whether the query/key/value projection has a bias."""
        return self._has_bias(self.config.qkv_bias)

    @property
    def o_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self._has_bias(self.config.o_bias)

    @property
    def mlp_bias(self) -> bool:
        """Whether the feed-forward projections have biases."""
        return self._has_bias(self.config.mlp_bias)

    def _has_bias(self, configured: bool | None) -> bool:
        return bool(configured) and not self.config.no_bias

    @property
    def qk_interleaved(self) -> bool:
        """Whether rotary embedding rotates neighbouring elements as pairs."""
        return bool(self.config.qk_interleaved)

    def output_std(self, std: float, layer: int) -> float:
        """Return the initial deviation of a projection of ``layer`` that writes into the residual stream.

        It is divided by √(2·layers) (GPT-2, section 2.3), or in some families by √(2·l) in layer l, counted from 1.
        """
        if not self.config.use_scaled_init:
            return std
        layers = layer + 1 if self.family.scales_init_by_layer else self.config.num_layers
        return std / math.sqrt(2 * layers)

    def linear(self, target: LoraTarget, *arguments: Any, **keywords: Any) -> ParallelLinear:
        """Create a linear of a block, with an adapter if ``model.lora`` names it."""
        lora = self.config.lora
        if lora is None or target not in lora.targets:
            return ParallelLinear(*arguments, **keywords)
        return AdaptedLinear(Adapter(lora.rank, lora.alpha / lora.rank), *arguments, **keywords)

    def add_projection(
        self,
        module: nn.Module,
        projection: Projection,
        shape: tuple[int, ...],
        init: Init,
        bias: bool,
        split_axis: int = 0,
    ) -> None:
        """Set the attribute of ``module`` that is named as ``projection`` to a linear or a group of linears.

        Args:
            module: Module whose hidden states are projected. It also gets the linears of the group.
            projection: The projection.
            shape: Shape of its output for one token.
            init: Distribution of the initial values of its weight.
            bias: Whether it has a bias.
            split_axis: Axis of ``shape`` along which mtp, msp and fsp split it.
        """
        name, axis, width = projection.name, projection.axis, self.config.hidden_size
        if projection.is_fused(self.config):
            setattr(module, name, self.linear(name, width, shape, init, bias, split_axis=split_axis))
            return
        linears = []
        for own, part in projection.parts(shape[axis]):
            own_shape = (*shape[:axis], part.length, *shape[axis + 1 :])
            own_init = replace(init, fused=FusedTensor(name, axis, part.start, shape[axis]))
            linears.append(self.linear(name, width, own_shape, own_init, bias, split_axis=split_axis))
            module.add_module(own, linears[-1])
        setattr(module, name, group_of(linears, axis))

    @property
    def rotary(self) -> RotaryScaling:
        """Base and scaling of the rotary frequencies in layers that attend to all tokens."""
        c = self.config
        return RotaryScaling(
            base=c.rope_base,
            factor=c.rope_scaling_factor,
            dynamic_ntk=c.use_dynamic_ntk_rope,
            max_position=c.max_position_embeddings,
            context=_context_scaling(c.rope_scaling),
        )

    @property
    def local_rotary(self) -> RotaryScaling:
        """Base of the rotary frequencies in layers with a sliding window; they see no context that needs scaling."""
        return RotaryScaling(base=self.config.local_rope_base or self.config.rope_base)

    @property
    def attention_backend(self) -> AttentionBackend:
        """Attention kernel to use; ``use_flash_attn=False`` excludes the flash kernels."""
        backend = self.config.attention_backend
        return "sdpa" if backend == "auto" and not self.config.use_flash_attn else backend

    @property
    def recomputes_attention(self) -> bool:
        """Whether the backward pass recomputes the attention between wqkv and wo (arXiv 2205.05198, section 5)."""
        return self.config.checkpoint == "selective"

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return math.sqrt(self.config.hidden_size) if self.family.scales_embedding else 1.0

    @property
    def normalises_input(self) -> bool:
        """Whether the input of each sub-layer is normalised."""
        return not self.config.apply_post_layer_norm and self.family.norms in ("input", "both")

    @property
    def normalises_output(self) -> bool:
        """Whether the output of each sub-layer is normalised, before it is added to the residual stream."""
        return not self.config.apply_post_layer_norm and self.family.norms in ("output", "both")

    @property
    def normalises_sums(self) -> bool:
        """Whether each sum of the residual stream and the output of a sub-layer is normalised (post-norm)."""
        return self.config.apply_post_layer_norm


def _context_scaling(scaling: RopeScalingConfig | None) -> ContextScaling | None:
    if scaling is None:
        return None
    if scaling.type == "llama3":
        return Llama3Scaling(
            factor=scaling.factor,
            original_max_position=scaling.original_max_position,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
        )
    return YarnScaling(
        factor=scaling.factor,
        original_max_position=scaling.original_max_position,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        attention_factor=scaling.attention_factor,
    )


def spec_of(family: Family, model: ModelConfig) -> DecoderSpec:
    """Return the decoder spec of config section ``model``, with the defaults of ``family`` for unset keys."""
    return DecoderSpec(config=family.complete(model), family=family)
