"""Compatibility checks between a checkpoint and the run that loads it, made before any state is changed.

Each function yields one :class:`Problem` per difference, so that all differences are reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.config.families import FAMILIES, Family
from internlm.config.nested_dict import ABSENT
from internlm.config.schema.model import Dtype
from internlm.core.parallel.lora import is_adapter
from internlm.data.fingerprint import file_changes, same_data
from internlm.model.projections import GATE_UP, QKV
from internlm.model.registry import is_built_in, model_initializer
from internlm.utils.dtype import torch_dtype
from internlm.utils.errors import Problem

#: Fields of the ``model`` section that determine the shapes and the names of parameters.
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_kv_attention_heads", "head_dim", "vocab_size",
    "mlp_ratio", "multiple_of", "norm_type", "no_bias", "qkv_bias", "o_bias", "mlp_bias", "tie_word_embeddings",
    "qk_norm", "hf", "lora", "num_experts", "num_shared_experts",
)  # fmt: skip


def _always(model: Mapping[str, Any]) -> bool:
    return True


def _with_experts(model: Mapping[str, Any]) -> bool:
    return model.get("num_experts", 1) != 1


#: Fields of the ``model`` section that change what the model computes from the same parameters in evaluation, with a
#: function of the section: whether the field has an effect.
MATHEMATICS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "layer_norm_epsilon": _always,
    "apply_post_layer_norm": _always,
    "norm_head": _always,
    "activation": _always,
    "attention_scale": _always,
    "qk_interleaved": _always,
    "rope_base": _always,
    "rope_scaling_factor": _always,
    "use_dynamic_ntk_rope": _always,
    "rope_scaling": _always,
    "local_rope_base": lambda model: bool(model.get("use_sliding_window")),
    "max_position_embeddings": lambda model: bool(model.get("use_dynamic_ntk_rope")),
    "use_sliding_window": _always,
    "sliding_window": lambda model: bool(model.get("use_sliding_window")),
    "global_layers": lambda model: bool(model.get("use_sliding_window")),
    "top_k": _with_experts,
    "moe_type": _with_experts,
    "moe_layer_kwargs": _with_experts,
}

#: Fields of the ``data`` section that determine the samples of a row.
ROWS = (
    "seq_len",
    "micro_bsz",
    "use_packed_dataset",
    "pack_sample_into_one",
    "pack",
    "weights",
    "max_epochs",
    "weight_changes",
)
#: Further fields of the ``data`` section that determine random samples.
OF_RANDOM_DATA = ("fixed_random_dataset_seqlen",)
#: Further fields of the ``data`` section that determine the documents of streamed data. The number of shards, which may
#: follow from the batch, is compared when the rows are resumed.
OF_STREAMS = ("shuffle_buffer", "content_name", "min_length", "subset", "train_split")

FROM_WEIGHTS = "To load only the weights, set ckpt.auto_resume=False and load content=('model',)"
WITH_ANOTHER_MODEL = "or set ckpt.allow_model_changes=True to load the weights into the changed model"
WITH_OTHER_DATA = "or set ckpt.allow_data_changes=True to read on from the saved row of the changed data"


# -- configs


def with_family_defaults(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two resolved configs such that equal models have equal keys: an unset key and its default are the same.

    Between built-in families of equal structure, the defaults of the family are filled in, and ``model_type`` and
    ``model.no_bias``, which act through these keys alone, are left out. Configs of a user's own model are returned as
    they are.
    """
    name = now.get("model_type")
    then, wanted = (_built_in_family(of) for of in (saved.get("model_type", name), name))
    if then is None or wanted is None or then.structure != wanted.structure:
        return dict(saved), dict(now)
    return _with_defaults(saved, then), _with_defaults(now, wanted)


def _built_in_family(name: Any) -> Family | None:
    """Return the family of a model type; None if it is not built in, or a user's own type has taken its name."""
    if not isinstance(name, str) or (name in model_initializer and not is_built_in(name)):
        return None
    return FAMILIES.get(name)


def _with_defaults(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    model = config["model"]
    defaults = {key: value for key, value in family.missing(model).items() if key in model}
    if model.get("no_bias"):
        defaults |= {key: False for key in model if key.endswith("_bias")}
    rest = {key: value for key, value in config.items() if key != "model_type"}
    return {**rest, "model": {key: value for key, value in {**model, **defaults}.items() if key != "no_bias"}}


def _described(config: Mapping[str, Any], key: str, value: Any) -> str:
    """Format the value of a key of ``model`` with its origin, if this is not the key itself."""
    if config["model"].get(key) == value:
        return repr(value)
    is_overridden = key.endswith("_bias") and config["model"].get("no_bias")
    default = f"the default of {config.get('model_type', 'the model type')}"
    return f"{value!r} ({'model.no_bias=True' if is_overridden else default})"


def other_architecture(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each field of the architecture that differs between two resolved configs.

    A field that is missing in ``saved``, which another version wrote, is no difference.

    Args:
        folder: Checkpoint folder, for the error.
        saved: Config of the checkpoint.
        now: Config of the run.
    """
    then, wanted = with_family_defaults(saved, now)
    todo = "Use the config of the checkpoint"
    if "model_type" in then and then["model_type"] != wanted.get("model_type"):
        message = f"{wanted.get('model_type')!r}, but {folder} was saved with {then['model_type']!r}"
        yield Problem("model_type", message, todo)
    for key in ARCHITECTURE:
        old, new = then["model"].get(key, ABSENT), wanted["model"].get(key)
        if key == "lora" and old is None:
            continue  # adapters are added to the saved model, and start with their initial values
        if old not in (ABSENT, new):
            message = f"{_described(now, key, new)}, but {folder} was saved with {_described(saved, key, old)}"
            yield Problem(f"model.{key}", message, todo)
    yield from _other_adapters(folder, then["model"], wanted["model"])


def _other_adapters(folder: str, then: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each projection with adapters that is fused in one of two models and not in the other."""
    for projection in (QKV, GATE_UP) if then.get("lora") else ():
        old, new = (model.get(projection.key, True) for model in (then, wanted))
        if old != new and projection.name in then["lora"]["targets"]:
            message = f"{new!r}, but {folder} was saved with {old!r}, by which {projection.name} has other adapters"
            yield Problem(f"model.{projection.key}", message, "Use the config of the checkpoint")


def other_mathematics(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each setting by which the model of the run computes something else than that of a checkpoint.

    A setting that is missing in ``saved``, which another version wrote, is no difference.

    Args:
        folder: Checkpoint folder, for the error.
        saved: Config of the checkpoint.
        now: Config of the run.
    """
    then, wanted = (config["model"] for config in with_family_defaults(saved, now))
    for key in MATHEMATICS:
        old, new = then.get(key, ABSENT), wanted.get(key)
        if old not in (ABSENT, new) and has_effect(key, then, wanted):
            values = f"{_described(now, key, new)}, but {folder} was saved with {_described(saved, key, old)}"
            message = f"{values}; this changes what the model computes"
            yield Problem(f"model.{key}", message, f"Restore the saved value, {WITH_ANOTHER_MODEL}")


def has_effect(key: str, *models: Mapping[str, Any]) -> bool:
    """Return whether a field has an effect in one of the ``model`` sections; fields not in MATHEMATICS always have."""
    return key not in MATHEMATICS or any(MATHEMATICS[key](model) for model in models)


def other_dtype(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem if the ``model.dtype`` of the run differs from that of the checkpoint.

    The dtype determines the optimizer state: only half-precision runs save main parameters.
    """
    wanted = now["model"]["dtype"]
    then = saved["model"].get("dtype", wanted)
    if then != wanted and _stored_as(then) != _stored_as(wanted):
        message = f"{wanted!r}, but {folder} was saved with {then!r}"
        yield Problem("model.dtype", message, f"Restore the saved value. {FROM_WEIGHTS}")


def _stored_as(dtype: Any) -> torch.dtype | None:
    """Return the dtype of tensors in a checkpoint for a value of ``model.dtype``, None for an unknown one."""
    return torch_dtype(dtype) if dtype in get_args(Dtype) else None


def other_samples(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each difference between checkpoint and run that changes the rows of the training data.

    The rows are determined by the dataset, the seed and the config keys in :data:`ROWS`.
    """
    then, wanted = saved["config"]["data"], now["config"]["data"]
    is_random = "train_folder" in then and then["train_folder"] is wanted.get("train_folder") is None
    is_streamed = wanted.get("type") == "streaming"
    keys = (*ROWS, *(OF_RANDOM_DATA if is_random else OF_STREAMS if is_streamed else ()))
    fields = [(f"data.{key}", then[key], wanted[key]) for key in keys if key in then]
    changed = [row for row in [("--seed", saved.get("seed"), now.get("seed")), *fields] if row[1] != row[2]]
    # The fingerprint of random data follows from settings; other_architecture compares the vocabulary.
    old_size, size = (info["config"]["model"].get("vocab_size") for info in (saved, now))
    is_explained = is_random and (changed or (old_size is not None and old_size != size))
    old_data, data = (str(info.get("data")) for info in (saved, now))
    if not same_data(old_data, data) and not is_explained:
        changes = file_changes(str(saved.get("data_files")), str(now.get("data_files")))
        shortest = ("data.min_length", then.get("min_length"), wanted.get("min_length"))
        if not is_streamed and changes is not None and not any(changes) and shortest[1] != shortest[2]:
            changed.append(shortest)  # The fingerprint covers which samples are dropped.
        else:
            found = str(changes or "") or f"fingerprint {old_data} then, {data} now"
            message = f"the data changed after {folder} was saved ({found})"
            yield Problem("data.train_folder", message, f"Restore the old data, {WITH_OTHER_DATA}")
    for name, old, new in changed:
        message = f"{new!r}, but {folder} was saved with {old!r}; this changes the samples of each row"
        yield Problem(name, message, f"Restore the saved value, {WITH_OTHER_DATA}")


# -- tensors and files


def without_new_adapters(tensors: LogicalTensors, saved: Mapping[str, Any]) -> LogicalTensors:
    """Return ``tensors`` without the adapters of a run that starts from a checkpoint without any (``model.lora``)."""
    if saved["model"].get("lora") is not None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}


def adapters_without_state(where: str, tensors: Iterable[str], saved: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem if optimizer state is requested of adapters that the checkpoint does not have."""
    requested = any(is_adapter(name) and name.startswith("optimizer/") for name in tensors)
    if requested and saved["model"].get("lora") is None:
        message = "model.lora is set, but the checkpoint has no adapters, and so no optimizer state of them"
        yield Problem(where, message, FROM_WEIGHTS)


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
