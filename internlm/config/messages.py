"""Translation of pydantic's validation errors into problems, one per key, in plain words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from internlm.config import keys
from internlm.utils.errors import Problem, did_you_mean

UNKNOWN = "extra_forbidden"
MISSING = "missing"
BAD_NAME = "invalid_key"
UNKNOWN_CHOICE = "literal_error"
BAD_PATH = "value_error"

#: Map from pydantic's error types for out-of-range values of an accepted type to the text of the message.
OUT_OF_RANGE = {
    "finite_number": "not a finite number",
    **dict.fromkeys(
        ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short"), "out of range"
    ),
}

#: Map from names that other programs use to the keys of this one.
SYNONYMS = {
    **dict.fromkeys(("batch_size", "micro_batch_size"), ("data.micro_bsz", "data.micro_num")),
    **dict.fromkeys(("global_batch_size", "train_batch_size"), ("data.micro_bsz", "data.micro_num")),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulation_steps"), ("data.micro_num",)),
    **dict.fromkeys(("seq_length", "max_seq_len", "sequence_length"), ("data.seq_len",)),
    **dict.fromkeys(("max_steps", "num_steps", "train_steps", "train_iters"), ("data.total_steps",)),
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "num_train_epochs"), ("data.total_steps",)),
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers"), ("model.num_layers",)),
    **dict.fromkeys(("num_heads", "n_head", "n_heads"), ("model.num_attention_heads",)),
    **dict.fromkeys(("num_kv_heads", "n_kv_heads", "num_key_value_heads"), ("model.num_kv_attention_heads",)),
    **dict.fromkeys(("hidden_dim", "dim", "d_model", "n_embd", "embed_dim"), ("model.hidden_size",)),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "intermediate_size"), ("model.mlp_ratio",)),
    "rope_theta": ("model.rope_base",),
    "learning_rate": ("adam.lr",),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_iters"), ("lr_scheduler.warmup_ratio",)),
    **dict.fromkeys(("min_lr", "lr_min"), ("lr_scheduler.eta_min",)),
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), ("parallel.tensor.size",)),
    **dict.fromkeys(("pp", "pp_size", "pipeline_parallel_size"), ("parallel.pipeline.size",)),
    **dict.fromkeys(
        ("grad_clip", "clip_grad", "max_grad_norm", "gradient_clipping"), ("hybrid_zero_optimizer.clip_grad_norm",)
    ),
}

#: Names of settings that are arguments of the command line, not config keys.
OPTIONS = frozenset({"seed", "launcher", "port", "backend", "profiling"})

_TYPE_NAMES = {
    bool: "a bool",
    int: "an integer",
    float: "a float",
    str: "a string",
    dict: "a dict",
    type(None): "None",
}


def schema_problems(error: ValidationError) -> tuple[list[Problem], set[str]]:
    """Convert pydantic's ``ValidationError`` to problems, and also return the set of invalid keys."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_key(detail), []).append(detail)
    # ``num_layer = 4`` is both an unknown key and a missing num_layers: one message is enough.
    implied = _implied_by_typos(by_key)
    return [_problem(key, details) for key, details in by_key.items() if key not in implied], set(by_key)


def _key(detail: Any) -> str:
    """Return the dotted key of ``detail``, an entry of ``ValidationError.errors()``.

    For an unknown key, join all names in ``detail["loc"]``; otherwise, join the longest prefix that is a known key.
    """
    # pydantic's location also holds indices of lists and tags of unions, which are not part of a key.
    location = [name for name in detail["loc"] if isinstance(name, str)]
    if detail["type"] in (UNKNOWN, BAD_NAME):
        return ".".join(map(str, location))
    while len(location) > 1 and ".".join(map(str, location)) not in keys.fields():
        location = location[:-1]
    return ".".join(map(str, location))


def _implied_by_typos(by_key: dict[str, list[Any]]) -> set[str]:
    """Return the missing keys that are present under another name; only the other name is reported."""
    missing = [key for key, details in by_key.items() if details[0]["type"] == MISSING]
    unknown = [key for key, details in by_key.items() if details[0]["type"] == UNKNOWN]
    candidates = {typo: [key for key in missing if _section(key) == _section(typo)] for typo in unknown}
    typos = {key for typo in unknown for key in difflib.get_close_matches(typo, candidates[typo], n=1, cutoff=0.8)}
    return typos | {key for name in unknown for key in SYNONYMS.get(name.rpartition(".")[2], ()) if key in missing}


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _is_other_text(detail: Any) -> bool:
    """Return whether the value is a string that is not one of the accepted choices."""
    return detail["type"] == UNKNOWN_CHOICE and isinstance(detail["input"], str)


def _problem(key: str, details: Iterable[Any]) -> Problem:
    # A key that accepts several types has one error per type. Report the most specific one. Order: a string that is not
    # an accepted choice, a number out of range, a value of another type.
    detail = min(details, key=lambda d: (not _is_other_text(d), d["type"] not in OUT_OF_RANGE))
    value = detail["input"]
    if detail["type"] in (UNKNOWN, BAD_NAME):
        return Problem(key, "unknown key", _where_it_belongs(key))
    if detail["type"] == MISSING:
        return Problem(key, f"missing ({keys.meaning(key)})", f"Set it to {_wanted(key)}")
    short = keys.format_value(key, value)
    if detail["type"] == BAD_PATH:
        return Problem(key, f"{short}: {detail['ctx']['error']}", "Correct the path")
    if _is_other_text(detail):
        return Problem(key, f"{short} is unknown", f"Set it to {keys.expected(key)}")
    if detail["type"] in OUT_OF_RANGE:
        return Problem(key, f"{short} is {OUT_OF_RANGE[detail['type']]}", f"Set it to {keys.expected(key)}")
    return Problem(key, f"{short} is {_type_name(value)}", f"Set it to {_wanted(key)}")


def _wanted(key: str) -> str:
    """Describe the values that ``key`` accepts; for a section, name its required keys."""
    required = [name for name in keys.children(key) if keys.fields()[f"{key}.{name}"].is_required()]
    return keys.expected(key) + (f" with {', '.join(required)}" if required else "")


def _where_it_belongs(key: str) -> str:
    """Suggest another section for the unknown ``key``, or a similar name in its own section.

    For a top-level name, also explain how to name a variable that is not a config key.
    """
    section, _, name = key.rpartition(".")
    todo = belongs_elsewhere(key)
    if section:
        return todo or did_you_mean(name, keys.children(section))
    todo = f"{todo}." if todo else did_you_mean(name, keys.children(""), known_at_top_level())
    return f"{todo} Write names of your own in UPPER_CASE or with a leading underscore"


def known_at_top_level() -> str:
    """List the sections of the config, then its other keys."""
    by_kind: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted(keys.children("")):
        by_kind[keys.is_section(name)].append(name)
    return f"Known sections: {', '.join(by_kind[True])}. Known keys: {', '.join(by_kind[False])}."


def belongs_elsewhere(key: str) -> str:
    """Suggest other keys for the unknown ``key``, such as ``data.seq_len`` for ``model.seq_len``.

    Returns:
        The suggestion, with the meaning of the keys. Empty if no section has a key of this name or meaning, or if
        several do and ``key`` resembles another key of its own section, which makes a typo likely.
    """
    section, _, name = key.rpartition(".")
    if name in SYNONYMS:
        return _instead(SYNONYMS[name])
    if name in OPTIONS:
        return f"Pass --{name} on the command line instead"
    namesakes = [known for known in keys.fields() if known.rpartition(".")[2] == name and not keys.is_of_list(known)]
    # ``type`` and ``size`` exist in many sections: a typo within this one is more likely.
    if len(namesakes) > 1 and difflib.get_close_matches(name, keys.children(section)):
        return ""
    return _instead(namesakes) if namesakes else ""


def _instead(others: Sequence[str]) -> str:
    meanings = [keys.meaning(others[0])] if len(others) == 1 else [f"{key}: {keys.meaning(key)}" for key in others]
    return f"Set {' or '.join(others)} instead ({'; '.join(meanings)})"


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), f"of type {type(value).__name__}")
