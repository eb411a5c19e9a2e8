"""Models of ``transformers`` with the weights of our decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from internlm.model.decoder import Decoder
from internlm.model.hf_config import to_hf_config
from internlm.model.hf_tensors import hf_tensors


def hf_model_of(model: Decoder, family: str) -> PreTrainedModel:
    """The model of ``transformers`` for ``family`` with the weights of ``model``, in its dtype."""
    keys = to_hf_config(family, model.spec)
    special = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config = CONFIG_MAPPING[keys["model_type"]](**keys, **special, attn_implementation="sdpa")
    theirs = AutoModelForCausalLM.from_config(config)
    assert type(theirs).__name__ == keys["architectures"][0]
    dtype = model.embedding.weight.dtype
    theirs = theirs.to(dtype)
    weights = dict(hf_weights(model, {name: p.detach() for name, p in model.named_parameters()}))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.spec.config.tie_word_embeddings else set())
    if dtype == torch.float64:
        _compute_in_double(theirs, model)
    return theirs


def hf_weights(model: Decoder, ours: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Tensors by our names (weights, gradients) as tensors by the names of ``transformers``."""
    ours = dict(ours)
    if model.spec.config.norm_head and "output.weight" in ours:
        ours["output.weight"] = nn.functional.normalize(ours["output.weight"], dim=-1)
    return [(row.name, row.of(ours[row.ours])) for row in hf_tensors(model.spec)]


class _DoubleNorm(nn.Module):
    def __init__(self, norm: Any, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (self.weight + self.offset)


class _DoubleRotary(nn.Module):
    def __init__(self, dim: int, base: float, local_base: float | None) -> None:
        super().__init__()
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        self.frequencies = {"full_attention": base**-exponents, "sliding_attention": (local_base or base) ** -exponents}

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str = "full_attention") -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies[layer_type]
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


def _compute_in_double(theirs: PreTrainedModel, model: Decoder) -> None:
    """``transformers`` computes norms and rotary angles in float32, whatever the type of the model."""
    c = model.spec.config
    assert (c.rope_scaling, c.use_dynamic_ntk_rope, c.rope_scaling_factor) == (None, False, 1.0)
    for name, module in list(theirs.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            theirs.set_submodule(name, _DoubleNorm(module, model.spec.family.norm_offset))
    theirs.model.rotary_emb = _DoubleRotary(c.head_size, c.rope_base, c.local_rope_base)
