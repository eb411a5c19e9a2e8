"""Ops of a decoder: attention, cross entropy, normalisation, rotary embedding and gated activations."""

from internlm.ops.attention import PackedSequences, attention, why_unavailable
from internlm.ops.cross_entropy import LossOptions, TokenLoss, VocabShard, cross_entropy, linear_cross_entropy
from internlm.ops.gated import gated
from internlm.ops.norm import layer_norm, rms_norm
from internlm.ops.rope_scaling import ContextScaling, Llama3Scaling, YarnScaling
from internlm.ops.rotary import RotaryScaling, apply_rotary, rotary_table, split_qkv_rotary

__all__ = [
    "ContextScaling",
    "Llama3Scaling",
    "YarnScaling",
    "LossOptions",
    "PackedSequences",
    "RotaryScaling",
    "TokenLoss",
    "VocabShard",
    "apply_rotary",
    "attention",
    "cross_entropy",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_table",
    "split_qkv_rotary",
    "gated",
    "why_unavailable",
]
