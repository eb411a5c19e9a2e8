"""Ops of a decoder: attention, cross entropy, normalisation, rotary embedding and SwiGLU."""

from internlm.ops.attention import PackedSequences, attention, why_unavailable
from internlm.ops.cross_entropy import LossOptions, TokenLoss, VocabShard, cross_entropy, linear_cross_entropy
from internlm.ops.norm import layer_norm, rms_norm
from internlm.ops.rotary import RotaryScaling, apply_rotary, rotary_table, split_qkv_rotary
from internlm.ops.swiglu import swiglu

__all__ = [
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
    "swiglu",
    "why_unavailable",
]
