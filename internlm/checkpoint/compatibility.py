"""Compatibility checks between a checkpoint and the run that loads it, made before any state is changed.

Each function yields one :class:`Problem` per difference, so that all differences are reported together.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.utils.dtype import torch_dtype
from internlm.utils.errors import Problem

#: Fields of the ``model`` section that determine the shape or the meaning of parameters.
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_kv_attention_heads", "head_dim", "vocab_size",
    "mlp_ratio", "multiple_of", "norm_type", "no_bias", "qkv_bias", "o_bias", "mlp_bias", "qk_interleaved",
    "tie_word_embeddings",
)  # fmt: skip

#: Fields of the ``data`` section that determine the samples of a row.
ROWS = ("seq_len", "micro_bsz", "use_packed_dataset", "pack_sample_into_one")

FROM_WEIGHTS = "To load only the weights, set ckpt.auto_resume=False and load content=('model',)"
WITHOUT_SAMPLER = "or set ckpt.auto_resume=False and load content=('model', 'optimizer')"


# -- configs


def other_architecture(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each field of the architecture that differs between two resolved configs.

    Args:
        folder: Checkpoint folder, for the error.
        saved: Config of the checkpoint.
        now: Config of the run.
    """
    fields = [("model_type", saved.get("model_type"), now.get("model_type"))]
    fields += [(f"model.{key}", saved.get("model", {}).get(key), now.get("model", {}).get(key)) for key in ARCHITECTURE]
    for key, then, wanted in fields:
        if then != wanted:
            yield Problem(key, f"{wanted!r}, but {folder} was saved with {then!r}", "Use the config of the checkpoint")


def other_dtype(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem if the ``model.dtype`` of the run differs from that of the checkpoint.

    The dtype determines the optimizer state: only half-precision runs save main parameters.
    """
    then, wanted = saved["model"]["dtype"], now["model"]["dtype"]
    if torch_dtype(then) != torch_dtype(wanted):
        message = f"{wanted!r}, but {folder} was saved with {then!r}"
        yield Problem("model.dtype", message, f"Restore the saved value. {FROM_WEIGHTS}")


def other_samples(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each difference between checkpoint and run that changes the rows of the training data.

    The rows are determined by the dataset, the seed and the config keys in :data:`ROWS`.
    """
    if saved.get("data") != now.get("data"):
        fingerprints = f"fingerprint {saved.get('data')} then, {now.get('data')} now"
        message = f"the data changed after {folder} was saved ({fingerprints})"
        yield Problem("data.train_folder", message, f"Restore the old data, {WITHOUT_SAMPLER}")
    then, wanted = saved["config"]["data"], now["config"]["data"]
    fields = [(f"data.{key}", then[key], wanted[key]) for key in ROWS]
    for name, old, new in [("--seed", saved.get("seed"), now.get("seed")), *fields]:
        if old != new:
            message = f"{new!r}, but {folder} was saved with {old!r}; this changes the samples of each row"
            yield Problem(name, message, f"Restore the saved value, {WITHOUT_SAMPLER}")


# -- tensors and files


def missing_tensors(folder: str, metadata: Metadata, wanted: LogicalTensors) -> Iterator[Problem]:
    """Yield a problem for each requested tensor that the checkpoint lacks or stores with a different shape."""
    for name, tensor in wanted.items():
        found = metadata.state_dict_metadata.get(name)
        todo = FROM_WEIGHTS if name.startswith("optimizer/") else "Use the config of the checkpoint"
        if not isinstance(found, TensorStorageMetadata):
            yield Problem(f"{folder}: {name}", "is missing", todo)
        elif found.size != tensor.global_shape:
            shapes = f"expected shape {list(tensor.global_shape)}, got {list(found.size)}"
            yield Problem(f"{folder}: {name}", shapes, "Use the config of the checkpoint")


def unexpected_tensors(folder: str, metadata: Metadata, wanted: Container[str]) -> Iterator[Problem]:
    """Yield a problem for each parameter or buffer of the checkpoint that does not exist in the model on any rank."""
    for name in metadata.state_dict_metadata:
        # Optimizer state, which frozen parameters do not have, is checked by other_states.
        if name.startswith("model/") and name not in wanted:
            message = "the model has no such parameter or buffer"
            yield Problem(f"{folder}: {name}", message, "Use the config of the checkpoint")


def other_states(folder: str, metadata: Metadata, wanted: Container[str]) -> Iterator[Problem]:
    """Yield a problem for each optimizer state, such as a moment, that the checkpoint contains and this run lacks.

    Only parameters that this run trains are checked. If a state were ignored, the remaining moments would be loaded
    into an optimizer that uses them differently: Lion's momentum and AdamW's first moment have the same name.
    """
    states: dict[str, set[str]] = {}
    for name in metadata.state_dict_metadata:
        section, _, rest = name.partition("/")
        if section == "optimizer":
            state, _, parameter = rest.partition("/")
            states.setdefault(state, set()).add(parameter)
    trained = {name for state, names in states.items() for name in names if f"optimizer/{state}/{name}" in wanted}
    for state, names in states.items():
        if left := sorted(name for name in names & trained if f"optimizer/{state}/{name}" not in wanted):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            message = f"saved for {left[0]!r}{more}, but this run has no such state"
            todo = f"Restore the saved values of optimizer and use_fp32_norm. {FROM_WEIGHTS}"
            yield Problem(f"{folder}: optimizer/{state}", message, todo)
