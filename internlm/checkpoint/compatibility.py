"""What a checkpoint holds against what is asked of it, before anything is changed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from internlm.checkpoint.logical import Logical
from internlm.utils.dtype import torch_dtype
from internlm.utils.errors import Problem

#: Fields of the ``model`` section that shape the parameters or what they mean.
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_kv_attention_heads", "head_dim", "vocab_size",
    "mlp_ratio", "multiple_of", "norm_type", "no_bias", "qkv_bias", "o_bias", "mlp_bias", "qk_interleaved",
    "tie_word_embeddings",
)  # fmt: skip

#: Fields of the ``data`` section that say which samples a row holds.
ROWS = ("seq_len", "micro_bsz", "use_packed_dataset", "pack_sample_into_one")

FROM_WEIGHTS = "To start from the weights alone, set ckpt.auto_resume=False and load content=('model',)"
WITHOUT_SAMPLER = "Or set ckpt.auto_resume=False and load content=('model', 'optimizer')"


def other_architecture(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each field of the architecture in which two resolved configs differ."""
    fields = [("model_type", saved.get("model_type"), now.get("model_type"))]
    fields += [(f"model.{key}", saved.get("model", {}).get(key), now.get("model", {}).get(key)) for key in ARCHITECTURE]
    for key, then, wanted in fields:
        if then != wanted:
            yield Problem(key, f"{wanted!r}, but {folder} was saved with {then!r}", "Use the config of the checkpoint")


def other_dtype(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem where the parameters' type differs, on which it depends what optimizer state there is."""
    then, wanted = saved["model"]["dtype"], now["model"]["dtype"]
    if torch_dtype(then) != torch_dtype(wanted):
        what = f"{wanted!r}, but {folder} was saved with {then!r}"
        yield Problem("model.dtype", what, f"Set it back. {FROM_WEIGHTS}")


def other_samples(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each fact in which the next samples would not be those that follow the saved position."""
    if saved.get("data") != now.get("data"):
        what = (
            f"its data changed since {folder} was saved (fingerprint {saved.get('data')} then, {now.get('data')} now)"
        )
        yield Problem("data.train_folder", what, f"Put the old data back. {WITHOUT_SAMPLER}")
    then, wanted = saved["config"]["data"], now["config"]["data"]
    fields = [(f"data.{key}", then[key], wanted[key]) for key in ROWS]
    for name, old, new in [("--seed", saved.get("seed"), now.get("seed")), *fields]:
        if old != new:
            what = f"{new!r}, but {folder} was saved with {old!r}, and its position counts rows made with that"
            yield Problem(name, what, f"Set it back. {WITHOUT_SAMPLER}")


def damaged_files(folder: Path, metadata: Metadata) -> Iterator[Problem]:
    """A problem for each file that is shorter than what lies in it, or gone."""
    ends: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            yield Problem(str(path), f"{size} bytes, its index says {end}", "Choose an older checkpoint")


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


def unexpected_tensors(folder: str, metadata: Metadata, wanted: Container[str]) -> Iterator[Problem]:
    """A problem for each parameter of the checkpoint that the model lacks, on all ranks."""
    for name in metadata.state_dict_metadata:
        if name.startswith("model/") and name not in wanted:
            yield Problem(f"{folder}: {name}", "the model has no such parameter", "Use the config of the checkpoint")


def other_states(folder: str, metadata: Metadata, wanted: Container[str]) -> Iterator[Problem]:
    """A problem for each kind of state that the optimizer had, and has no longer, for parameters that it still trains:
    what is left of it would mean something else now."""
    states: dict[str, set[str]] = {}
    for name in metadata.state_dict_metadata:
        what, _, rest = name.partition("/")
        if what == "optimizer":
            state, _, parameter = rest.partition("/")
            states.setdefault(state, set()).add(parameter)
    trained = {each for state, held in states.items() for each in held if f"optimizer/{state}/{each}" in wanted}
    for state, held in states.items():
        if left := sorted(each for each in held & trained if f"optimizer/{state}/{each}" not in wanted):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            what = f"is there for {left[0]!r}{more}, for which there is no such state now"
            todo = f"Set optimizer and use_fp32_norm as they were. {FROM_WEIGHTS}"
            yield Problem(f"{folder}: optimizer/{state}", what, todo)


def _todo(name: str) -> str:
    return FROM_WEIGHTS if name.startswith("optimizer/") else "Use the config of the checkpoint"
