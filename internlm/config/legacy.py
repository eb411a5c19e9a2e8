"""Normalisation of old config keys and values to the current ones. No other file handles old spellings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from internlm.config import keys
from internlm.config.foreign import (
    FOREIGN_KEYS,
    LOAD_INFO,
    OLD_LOAD_KEYS,
    Findings,
    drop_foreign_keys,
)
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


def _same(value: Any) -> Any:
    return value


def _inverse(value: Any) -> Any:
    return not value if isinstance(value, bool) else value


class NewName(NamedTuple):
    """Current name of a renamed key, and the function that converts a value of the old key."""

    key: str
    convert: Callable[[Any], Any] = _same


#: Map from the old name of a renamed key to its current name.
RENAMED = {
    "model.moe_gate_k": NewName("model.top_k"),
    "model.adapt_hf": NewName("model.qk_interleaved", _inverse),
    "data.gradient_accumulation": NewName("data.micro_num"),
    "hf": NewName("model.hf"),
    "hybrid_zero_optimizer.zero_overlap_communication": NewName("hybrid_zero_optimizer.overlap_sync_grad"),
}

SEQUENCE_PARALLEL = "parallel.sequence_parallel"
OLD_KEYS = frozenset({*RENAMED, *OLD_LOAD_KEYS, *FOREIGN_KEYS, SEQUENCE_PARALLEL})


def normalise(config: NestedDict, findings: Findings) -> None:
    """Replace old spellings in ``config`` in place, and record what was found in ``findings``. Idempotent."""
    # Expand short forms first: the other steps read keys within the expanded sections.
    _expand_short_forms(config)
    _rename(config, findings)
    drop_foreign_keys(config, findings)
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
        if value is ABSENT or value is None:
            continue
        current, value = get(config, new.key), new.convert(value)
        if current is None:
            put(config, new.key, value)
        elif current == value:
            findings.ignore(old, f"the old name of {new.key}")
        else:
            message = f"contradicts its new name: it means {new.key} = {value!r}, but {new.key} = {current!r}"
            findings.problems.append(Problem(old, message, f"Remove {old}"))


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
        message = f"{flag} contradicts {mode_key} = {mode!r}"
        findings.problems.append(Problem(SEQUENCE_PARALLEL, message, f"Remove it: {mode_key} implies its value"))


def _respell_values(config: NestedDict) -> None:
    for key, respell in RESPELLED.items():
        value = get(config, key)
        if value is not None:
            put(config, key, respell(value))
    # ZBV has two chunks per stage. Configs written for 1F1B often set num_chunks = 1, which is not valid for ZBV.
    if get(config, "parallel.pipeline.mode") == "ZBV" and get(config, "model.num_chunks") == 1:
        pop(config, "model.num_chunks")


def _drop_unset(config: NestedDict) -> None:
    """Remove keys that are not set: None where the schema does not accept it, and False where it is the default 0."""
    for key, field in keys.fields().items():
        value = get(config, key, ABSENT)
        off = value is False and not keys.takes(key, bool) and not field.default
        # A path of None unsets the whole section, but an override may still give a path.
        if off or (value is None and not keys.takes_none(key) and key != f"{LOAD_INFO}.path"):
            pop(config, key)


#: Short names of dtypes, as other programs and command lines spell them.
DTYPES = {
    "bf16": "torch.bfloat16",
    "fp16": "torch.float16",
    "half": "torch.float16",
    "fp32": "torch.float32",
    "float": "torch.float32",
    "fp64": "torch.float64",
    "double": "torch.float64",
}


def _dtype_name(value: Any) -> Any:
    """Convert a ``torch.dtype``, or a name such as ``"bf16"`` or ``"torch.half"``, to the name in the schema."""
    # Compared by name, so that this package does not import torch.
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        value = str(value)
    if not isinstance(value, str):
        return value
    name = value.lower().removeprefix("torch.")
    return DTYPES.get(name, f"torch.{name}" if name in ("bfloat16", "float16", "float32", "float64", "tf32") else value)


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _batch_list(value: Any) -> Any:
    """Convert batch numbers, such as ``7`` or ``(1, 5)``, to a string."""
    batches = value if isinstance(value, (tuple, list)) else [value]
    return ",".join(map(str, batches)) if all(type(batch) is int for batch in batches) else value


def _unset_if_zero(value: Any) -> Any:
    return None if value == 0 else value


def _interval(value: Any) -> Any:
    """Convert an infinite interval to 0, which means the last step only."""
    return 0 if value == math.inf else value


#: Keys whose value 0 asks for the default, although it is not in the range of the key.
UNSET_BY_ZERO = (
    "data.valid_micro_num",
    "hybrid_zero_optimizer.all_gather_size",
    "hybrid_zero_optimizer.reduce_bucket_size",
    "model.num_experts",
    "model.sliding_window",
    "model.top_k",
)

#: Map from a key to the function that converts old spellings of its value.
RESPELLED: dict[str, Callable[[Any], Any]] = {
    "data.skip_batches": _batch_list,
    "parallel.pipeline.mode": _upper,
    "model.dtype": _dtype_name,
    "optimizer.ns_dtype": _dtype_name,
    "reduce_comm_dtype": _dtype_name,
    "ckpt.load_ckpt_info.content": _as_tuple,
    "ckpt.checkpoint_every": _interval,
    **dict.fromkeys(UNSET_BY_ZERO, _unset_if_zero),
}
