"""Old spellings, normalised here and nowhere else: what leaves this file has the shape of the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from internlm.config import keys
from internlm.config.nested_dict import ABSENT, Tree, get, pop, put
from internlm.utils.errors import Problem

#: Sections that may be written as one value: the value of this key in them.
SHORT_FORMS = {
    "parallel.zero1": "size",
    "parallel.tensor": "size",
    "parallel.pipeline": "size",
    "parallel.weight": "size",
    "parallel.expert": "size",
    "parallel.expert_weight": "size",
}

#: Old names of keys that go on under another name.
RENAMED = {"model.moe_gate_k": "model.top_k"}

#: Keys that are gone, and what to do instead.
REMOVED = {
    "data.packed_length": "Remove it: it is always seq_len · micro_bsz",
    "ckpt.load_ckpt_folder": "Set ckpt.load_ckpt_info = dict(path=..., content=('all',))",
    "ckpt.load_model_only_folder": "Set ckpt.load_ckpt_info = dict(path=..., content=('model',))",
    "moe": "Set num_experts and top_k in model, and the rest in model.moe_layer_kwargs",
    "generation": "Remove it: a training config has no part in generation",
}

#: Keys without a meaning here, and why leaving them out changes nothing.
IGNORED = {"metric_dtype": "metrics are always computed in float32"}

SEQUENCE_PARALLEL = "parallel.sequence_parallel"
OLD_KEYS = frozenset({*RENAMED, *REMOVED, *IGNORED, SEQUENCE_PARALLEL})


@dataclass
class Findings:
    """What was found while normalising."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def normalise(tree: Tree, found: Findings) -> None:
    """Rewrite ``tree`` in place into today's spelling. Doing it twice changes nothing more."""
    _expand_short_forms(tree)
    _rename(tree, found)
    _refuse_removed(tree, found)
    _drop_ignored(tree, found)
    _drop_sequence_parallel(tree, found)
    _respell_values(tree)
    _drop_unset(tree)


def _expand_short_forms(tree: Tree) -> None:
    """``tensor=2`` -> ``tensor=dict(size=2)``"""
    for section, key in SHORT_FORMS.items():
        value = get(tree, section)
        if value is not None and not isinstance(value, dict):
            put(tree, section, {key: value})


def _rename(tree: Tree, found: Findings) -> None:
    for old, new in RENAMED.items():
        value = pop(tree, old)
        if value is ABSENT:
            continue
        if get(tree, new, ABSENT) is not ABSENT:
            what = f"old and new form together: {old} = {value!r} and {new} = {get(tree, new)!r}"
            found.problems.append(Problem(old, what, f"Keep {new}"))
        else:
            put(tree, new, value)


def _refuse_removed(tree: Tree, found: Findings) -> None:
    for key, todo in REMOVED.items():
        if pop(tree, key) is not ABSENT:
            found.problems.append(Problem(key, "this key is deprecated and no longer read", todo))


def _drop_ignored(tree: Tree, found: Findings) -> None:
    for key, reason in IGNORED.items():
        if pop(tree, key) is not ABSENT:
            found.warnings.append(f"{key}: ignored, {reason}")


def _drop_sequence_parallel(tree: Tree, found: Findings) -> None:
    """Every mode but mtp splits the sequence, so the mode says it all. Where no mode is given, True means msp."""
    flag = pop(tree, SEQUENCE_PARALLEL)
    mode = get(tree, "parallel.tensor.mode")
    if flag is ABSENT or flag is None:
        return
    if not isinstance(flag, bool):
        found.problems.append(
            Problem(SEQUENCE_PARALLEL, f"{flag!r} is not True or False", "Remove it: the mode says it all")
        )
    elif mode is None:
        put(tree, "parallel.tensor.mode", "msp" if flag else "mtp")
    elif flag != (mode != "mtp"):
        what = f"old and new form disagree: {flag}, but parallel.tensor.mode = {mode!r}"
        found.problems.append(Problem(SEQUENCE_PARALLEL, what, "Remove it: the mode says it all"))


def _respell_values(tree: Tree) -> None:
    for key, respell in RESPELLED.items():
        value = get(tree, key)
        if value is not None:
            put(tree, key, respell(value))
    # Stages of the ZBV schedule hold two chunks each; 1 is what a config has that didn't think of chunks.
    if get(tree, "parallel.pipeline.mode") == "ZBV" and get(tree, "model.num_chunks") == 1:
        pop(tree, "model.num_chunks")


def _drop_unset(tree: Tree) -> None:
    """None where it is no value of the key means: not set."""
    for key in keys.fields():
        if get(tree, key, ABSENT) is None and not keys.takes_none(key):
            pop(tree, key)


def _dtype_name(value: Any) -> Any:
    """``torch.bfloat16`` itself -> its name; half -> float16."""
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
    """7 and (1, 5), which is how a command line's ``7`` and ``1,5`` are read -> "7" and "1,5"."""
    batches = value if isinstance(value, (tuple, list)) else [value]
    return ",".join(map(str, batches)) if all(type(batch) is int for batch in batches) else value


RESPELLED = {
    "data.skip_batches": _batch_list,
    "parallel.pipeline.mode": _upper,
    "parallel.pipeline.partition": _list_as_tuple,
    "optimizer.param_groups": _list_as_tuple,
    "model.dtype": _dtype_name,
    "reduce_comm_dtype": _dtype_name,
    "ckpt.load_ckpt_info.content": _as_tuple,
}
