"""The Llama decoder of ``transformers``, with the weights of one of our decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from internlm.config.schema import ModelConfig
from internlm.model.decoder import Decoder


def llama_names(config: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names (weights, gradients) as tensors by Llama's.

    wqkv: [G, Q + 2, D, ...], in each kv group the query heads, the key head, the value head. w13: [2, F, H].
    """
    named = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["output.weight"],
    }
    for number in range(config.num_layers):
        mine, theirs = f"layers.{number}", f"model.layers.{number}"
        for kind in ("weight", "bias"):
            if (qkv := ours.get(f"{mine}.attention.wqkv.{kind}")) is not None:
                for part, heads in {"q": qkv[:, :-2], "k": qkv[:, -2:-1], "v": qkv[:, -1:]}.items():
                    named[f"{theirs}.self_attn.{part}_proj.{kind}"] = heads.flatten(0, 2)
            if (out := ours.get(f"{mine}.attention.wo.{kind}")) is not None:
                named[f"{theirs}.self_attn.o_proj.{kind}"] = out
            if (w13 := ours.get(f"{mine}.feed_forward.w13.{kind}")) is not None:
                named[f"{theirs}.mlp.gate_proj.{kind}"], named[f"{theirs}.mlp.up_proj.{kind}"] = w13
                named[f"{theirs}.mlp.down_proj.{kind}"] = ours[f"{mine}.feed_forward.w2.{kind}"]
        named[f"{theirs}.input_layernorm.weight"] = ours[f"{mine}.attention_norm.weight"]
        named[f"{theirs}.post_attention_layernorm.weight"] = ours[f"{mine}.ffn_norm.weight"]
    return named


def llama_of(model: Decoder) -> LlamaForCausalLM:
    """Llama with the weights of ``model``, in its type."""
    c = model.spec.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_size,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.layer_norm_epsilon,
        attention_bias=model.spec.qkv_bias,
        mlp_bias=model.spec.mlp_bias,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": c.rope_base, **_scaling(c)},
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config).to(model.embedding.weight.dtype)
    if model.embedding.weight.dtype == torch.float64:
        _compute_in_double(llama, c)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    llama.load_state_dict(llama_names(c, weights))
    return llama


def _scaling(c: ModelConfig) -> dict[str, Any]:
    if c.use_dynamic_ntk_rope:
        return {"rope_type": "dynamic", "factor": c.rope_scaling_factor}
    return {"rope_type": "linear", "factor": c.rope_scaling_factor}


def _compute_in_double(llama: LlamaForCausalLM, c: ModelConfig) -> None:
    """Llama computes norms and rotary angles in float32, whatever the type of the model."""
    norms = [name for name, module in llama.named_modules() if type(module).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 2 * c.num_layers + 1
    for name in norms:
        llama.set_submodule(name, nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon, dtype=torch.float64))
    llama.model.rotary_emb = _DoubleRotary(c)


class _DoubleRotary(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        assert not c.use_dynamic_ntk_rope
        exponents = torch.arange(0, c.head_size, 2, dtype=torch.float64) / c.head_size
        self.frequencies = c.rope_base**-exponents / c.rope_scaling_factor

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()
