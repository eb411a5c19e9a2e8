"""Normalisation of old config keys and values to the current ones. No other file handles old spellings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from internlm.config import keys
from internlm.config.nested_dict import ABSENT, NestedDict, get, pop, put
from internlm.utils.errors import Problem

#: Map from a section that may be written as a single value to the key that takes this value: ``tensor=2`` means
#: ``tensor=dict(size=2)``.
SHORT_FORMS = {
    "parallel.zero1": "size",
    "parallel.tensor": "size",
    "parallel.pipeline": "size",
    "parallel.weight": "size",
    "parallel.expert": "size",
    "parallel.expert_weight": "size",
}

#: Map from the old name of a renamed key to its current name.
RENAMED = {"model.moe_gate_k": "model.top_k"}

#: Map from a removed key to the advice in the error message.
REMOVED = {
    "data.packed_length": "Remove it: it is always seq_len · micro_bsz",
    "ckpt.load_ckpt_folder": "Set ckpt.load_ckpt_info = dict(path=..., content=('all',))",
    "ckpt.load_model_only_folder": "Set ckpt.load_ckpt_info = dict(path=..., content=('model',))",
    "moe": "Set model.num_experts and model.top_k, and other settings in model.moe_layer_kwargs",
    "generation": "Remove it: a training config has no generation settings",
}

#: Map from an ignored key to the reason why ignoring it does not change the results.
# An error for these keys would reject existing configs without need.
IGNORED = {"metric_dtype": "metrics are always computed in float32"}

SEQUENCE_PARALLEL = "parallel.sequence_parallel"
OLD_KEYS = frozenset({*RENAMED, *REMOVED, *IGNORED, SEQUENCE_PARALLEL})


@dataclass
class Findings:
    """Problems and warnings that :func:`normalise` found."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def normalise(config: NestedDict, findings: Findings) -> None:
    """Replace old spellings in ``config`` in place, and append problems and warnings to ``findings``. Idempotent."""
    # Expand short forms first: the other steps read keys within the expanded sections.
    _expand_short_forms(config)
    _rename(config, findings)
    _refuse_removed(config, findings)
    _drop_ignored(config, findings)
    _drop_sequence_parallel(config, findings)
    _respell_values(config)
    _drop_unset(config)


def _expand_short_forms(config: NestedDict) -> None:
    for section, key in SHORT_FORMS.items():
        value = get(config, section)
        if value is not None and not isinstance(value, dict):
            put(config, section, {key: value})


def _rename(config: NestedDict, findings: Findings) -> None:
    for old, new in RENAMED.items():
        value = pop(config, old)
        if value is ABSENT:
            continue
        if get(config, new, ABSENT) is not ABSENT:
            what = f"given together with its new name: {old} = {value!r}, {new} = {get(config, new)!r}"
            findings.problems.append(Problem(old, what, f"Remove {old}"))
        else:
            put(config, new, value)


def _refuse_removed(config: NestedDict, findings: Findings) -> None:
    for key, todo in REMOVED.items():
        if pop(config, key) is not ABSENT:
            findings.problems.append(Problem(key, "this key is deprecated and no longer read", todo))


def _drop_ignored(config: NestedDict, findings: Findings) -> None:
    for key, reason in IGNORED.items():
        if pop(config, key) is not ABSENT:
            findings.warnings.append(f"{key}: ignored, {reason}")


def _drop_sequence_parallel(config: NestedDict, findings: Findings) -> None:
    """Remove ``parallel.sequence_parallel``, whose value the tensor-parallel mode implies.

    All modes but mtp split sequences. If no mode is given, True sets msp and False sets mtp.
    """
    flag = pop(config, SEQUENCE_PARALLEL)
    mode_key = "parallel.tensor.mode"
    mode = get(config, mode_key)
    if flag is ABSENT or flag is None:
        return
    if not isinstance(flag, bool):
        findings.problems.append(
            Problem(SEQUENCE_PARALLEL, f"expected True or False, got {flag!r}", f"Remove it, and set {mode_key}")
        )
    # The default mode is mtp, which does not split sequences.
    elif mode is None:
        put(config, mode_key, "msp" if flag else "mtp")
    elif flag != (mode != "mtp"):
        what = f"{flag} contradicts {mode_key} = {mode!r}"
        findings.problems.append(Problem(SEQUENCE_PARALLEL, what, f"Remove it: {mode_key} implies its value"))


def _respell_values(config: NestedDict) -> None:
    for key, respell in RESPELLED.items():
        value = get(config, key)
        if value is not None:
            put(config, key, respell(value))
    # ZBV has two chunks per stage. Configs written for 1F1B often set num_chunks = 1, which is not valid for ZBV.
    if get(config, "parallel.pipeline.mode") == "ZBV" and get(config, "model.num_chunks") == 1:
        pop(config, "model.num_chunks")


def _drop_unset(config: NestedDict) -> None:
    """Remove every key that is None although the schema does not accept None for it; such a key counts as not set."""
    for key in keys.fields():
        if get(config, key, ABSENT) is None and not keys.takes_none(key):
            pop(config, key)


def _dtype_name(value: Any) -> Any:
    """Convert a ``torch.dtype`` to its name, and the name ``"torch.half"`` to ``"torch.float16"``."""
    # Compared by name, so that this package does not import torch.
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        value = str(value)
    return "torch.float16" if value == "torch.half" else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return _list_as_tuple(value)


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _batch_list(value: Any) -> Any:
    """Convert batch numbers to a string, since ``--set`` parses ``7`` as an int and ``1,5`` as a tuple."""
    batches = value if isinstance(value, (tuple, list)) else [value]
    return ",".join(map(str, batches)) if all(type(batch) is int for batch in batches) else value


#: Map from a key to the function that converts old spellings of its value.
RESPELLED = {
    "data.skip_batches": _batch_list,
    "parallel.pipeline.mode": _upper,
    "parallel.pipeline.partition": _list_as_tuple,
    "optimizer.param_groups": _list_as_tuple,
    "model.dtype": _dtype_name,
    "reduce_comm_dtype": _dtype_name,
    "ckpt.load_ckpt_info.content": _as_tuple,
}
