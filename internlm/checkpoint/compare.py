"""What a checkpoint holds against what is asked of it, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from internlm.checkpoint.logical import Logical
from internlm.utils.errors import Problem

#: Fields of the ``model`` section that shape the parameters or what they mean.
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_kv_attention_heads", "head_dim", "vocab_size",
    "mlp_ratio", "multiple_of", "norm_type", "no_bias", "qkv_bias", "o_bias", "mlp_bias", "qk_interleaved", "rope_base",
    "tie_word_embeddings",
)  # fmt: skip


def other_architecture(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each field of the architecture in which two resolved configs differ."""
    fields = [("model_type", saved.get("model_type"), now.get("model_type"))]
    fields += [(f"model.{key}", saved.get("model", {}).get(key), now.get("model", {}).get(key)) for key in ARCHITECTURE]
    for key, then, wanted in fields:
        if then != wanted:
            yield Problem(key, f"{wanted!r}, but {folder} was saved with {then!r}", "Use the config of the checkpoint")


def missing_tensors(folder: str, metadata: Metadata, wanted: Logical) -> Iterator[Problem]:
    """A problem for each wanted tensor that the checkpoint lacks or has in another shape."""
    there = metadata.state_dict_metadata
    for name, tensor in wanted.items():
        found = there.get(name)
        if not isinstance(found, TensorStorageMetadata):
            yield Problem(f"{folder}: {name}", "is missing", _todo(name))
        elif found.size != tensor.global_shape:
            shapes = f"has shape {list(found.size)}, the model wants {list(tensor.global_shape)}"
            yield Problem(f"{folder}: {name}", shapes, "Use the config of the checkpoint")


def unexpected_tensors(folder: str, metadata: Metadata, wanted: Logical) -> Iterator[Problem]:
    """A problem for each parameter of the checkpoint that the model lacks."""
    for name in metadata.state_dict_metadata:
        if name.startswith("model/") and name not in wanted:
            yield Problem(f"{folder}: {name}", "the model has no such parameter", "Use the config of the checkpoint")


def _todo(name: str) -> str:
    if name.startswith("optimizer/"):
        return "To start from the weights alone, set ckpt.load_ckpt_info.content=('model',)"
    return "Use the config of the checkpoint"
