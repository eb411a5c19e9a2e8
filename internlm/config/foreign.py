"""Keys of users' configs that have no field in the schema.

Some are ignored, with a warning if their value asks for something; others ask for a feature that does not exist.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from internlm.config.families import FAMILIES
from internlm.config.nested_dict import ABSENT, NestedDict, get, pop, put
from internlm.utils.errors import Problem


@dataclass
class Findings:
    """Findings of the normalisation of a config."""

    problems: list[Problem] = field(default_factory=list)
    missing: list[Problem] = field(default_factory=list)
    """Requests for features that do not exist, which are reported before, and instead of, all other problems."""
    ignored: list[str] = field(default_factory=list)
    """Keys that were dropped, each with the reason; together they become one warning."""

    def ignore(self, key: str, reason: str) -> None:
        """Record that ``key`` was dropped."""
        self.ignored.append(f"{key} ({reason})")


@dataclass(frozen=True)
class Ignored:
    """Key that is dropped; ``reason`` says why this changes nothing.

    ``asks_nothing(value)`` is True for values that need no warning.
    """

    key: str
    reason: str
    asks_nothing: Callable[[Any], bool] = operator.not_


@dataclass(frozen=True)
class Missing:
    """Key that asks for a feature that is not available.

    ``asks_nothing(value)`` is True for values that do not need ``feature``; ``todo`` says what to do instead.
    """

    key: str
    feature: str
    todo: str
    asks_nothing: Callable[[Any], bool] = operator.not_


def _is(*values: Any) -> Callable[[Any], bool]:
    """Return a function that checks for None and ``values``."""
    return lambda value: value is None or value in values


MULTIMODAL = "training on images"
NO_IMAGES = "images are not read"
SELECTIVE = "Remove it, and set model.checkpoint = 'selective'"

IGNORED = (
    Ignored("metric_dtype", "metrics are always computed in float32"),
    Ignored("generation", "settings of text generation, which training does not read"),
    Ignored("moe", "settings of expert layers, which a dense model does not have"),
    Ignored("data.packed_length", "always data.seq_len · data.micro_bsz"),
    Ignored("data.image_size", NO_IMAGES),
    Ignored("data.patch_size", NO_IMAGES),
    Ignored("model.image_token_id", NO_IMAGES),
    Ignored("hybrid_zero_optimizer.use_apex_adam", "the update rules are built in"),
    Ignored("ckpt.load_optimizer", "ckpt.load_ckpt_info.content says what is loaded", _is(True)),
    Ignored("ckpt.snapshot_ckpt_folder", "snapshots are saved in ckpt.save_ckpt_folder, too"),
    Ignored("parallel.weight.early_reduce_scatter_release", "buffers are always released as early as possible"),
    Ignored("parallel.expert_weight.early_reduce_scatter_release", "buffers are always released as early as possible"),
)

MISSING = (
    Missing("data.is_multimodal", MULTIMODAL, "Set it to False"),
    Missing("model.vit_cfg", MULTIMODAL, "Remove it"),
    Missing("model.vision_proj_cfg", MULTIMODAL, "Remove it"),
    Missing("model.moe_use_residual", "a dense layer beside the experts", "Set it to False"),
    Missing("model.attn_drop_rate", "dropout on attention weights", "Set it to 0; model.drop_rate drops layer outputs"),
    Missing("model.use_swiglu", "a feed-forward layer without gate", "Set it to True", _is(True)),
    Missing("model.init_type", "initial values from another distribution", "Set it to 'normal'", _is("normal")),
    Missing("selective_checkpoint", "selective recompute under this name", SELECTIVE),
    Missing("model.selective_checkpoint", "selective recompute under this name", SELECTIVE),
    Missing("selective_checkpoint_offload", "offloading of selected activations", "Set it to False"),
)

UNIT_OFFSET, WINDOW_LAYERS = "model.add_unit_offset", "model.max_window_layers"
FOREIGN_KEYS = frozenset((*(row.key for row in (*IGNORED, *MISSING)), UNIT_OFFSET, WINDOW_LAYERS))


def drop_foreign_keys(config: NestedDict, findings: Findings) -> None:
    """Remove all foreign keys from ``config`` in place; record those that ask for something in ``findings``."""
    requested: dict[str, Problem] = {}
    _drop_unit_offset(config, findings)
    _replace_window_layers(config, findings)
    for missing in MISSING:
        value = pop(config, missing.key)
        if value is not ABSENT and not missing.asks_nothing(value):
            message = f"{_short(value)} asks for {missing.feature}, which is not available in this version"
            # One problem per feature: a config of such a model has several of its keys.
            requested.setdefault(missing.feature, Problem(missing.key, message, missing.todo))
    findings.missing += requested.values()
    for ignored in IGNORED:
        value = pop(config, ignored.key)
        if value is not ABSENT and not ignored.asks_nothing(value):
            findings.ignore(ignored.key, ignored.reason)


def _drop_unit_offset(config: NestedDict, findings: Findings) -> None:
    """Remove ``model.add_unit_offset``, which must be what the family does anyway."""
    given = pop(config, UNIT_OFFSET)
    family = FAMILIES.get(str(get(config, "model_type")))
    adds = family is not None and family.norm_offset == 1.0
    if given is not ABSENT and bool(given) != adds:
        with_offset = ", ".join(name for name, row in FAMILIES.items() if row.norm_offset)
        message = f"{given!r}, but norms scale by 1 + weight in {with_offset} and in no other family"
        findings.problems.append(Problem(UNIT_OFFSET, message, "Remove it, or change model_type"))


def _replace_window_layers(config: NestedDict, findings: Findings) -> None:
    """Replace ``model.max_window_layers``, the number of first layers that attend to all tokens."""
    layers, total = pop(config, WINDOW_LAYERS), get(config, "model.num_layers")
    family, given = FAMILIES.get(str(get(config, "model_type"))), get(config, "model.use_sliding_window")
    has_windows = family and family.keys.get("use_sliding_window") if given in (ABSENT, None) else given
    if layers in (ABSENT, None) or has_windows is not True:  # without windows the number has no meaning
        return
    if type(layers) is not int or layers < 0:
        message, todo = f"expected a number of layers, got {_short(layers)}", "Set model.global_layers instead"
        findings.problems.append(Problem(WINDOW_LAYERS, message, todo))
    elif get(config, "model.global_layers") not in (ABSENT, None):
        message = "is given beside model.global_layers, which is another way to name the layers without a window"
        findings.problems.append(Problem(WINDOW_LAYERS, message, "Remove one of the two"))
    else:
        # It is often more than the number of layers, which means all of them.
        put(config, "model.global_layers", tuple(range(min(layers, total) if type(total) is int else 0)))


def _short(value: Any) -> str:
    return "{...}" if isinstance(value, dict) else repr(value)


# -- checkpoints to load ----------------------------------------------------------------------------------------------
LOAD_INFO = "ckpt.load_ckpt_info"

#: Map from a key that named a checkpoint to load to the advice in the error message.
OLD_LOAD_KEYS = {
    "ckpt.load_ckpt_folder": f"Set {LOAD_INFO} = dict(path=..., content=('all',))",
    "ckpt.load_model_only_folder": f"Set {LOAD_INFO} = dict(path=..., content=('model',))",
}

#: Last component of the path that published configs have in place of a checkpoint.
PLACEHOLDER = "xxxx"


def drop_unset_checkpoints(config: NestedDict, findings: Findings) -> None:
    """Remove ``ckpt.load_ckpt_info`` if it has no checkpoint, then the old keys of a checkpoint to load.

    The old keys are ignored if ``ckpt.load_ckpt_info`` or a resumed run replaces them; otherwise they are a problem.
    Overrides must have been applied, since they may set the path or ``ckpt.auto_resume``.
    """
    _drop_unset_load_info(config, findings)
    resumes = get(config, "ckpt.auto_resume") is not False
    for key, todo in OLD_LOAD_KEYS.items():
        folder = pop(config, key)
        if folder is ABSENT or not folder:
            continue
        if get(config, LOAD_INFO) is not None:
            findings.ignore(key, f"{LOAD_INFO} says what is loaded")
        elif is_placeholder(folder):
            findings.ignore(key, "its path is a placeholder")
        elif resumes and _normal(folder) == _normal(get(config, "ckpt.save_ckpt_folder")):
            findings.ignore(key, "a run continues from ckpt.save_ckpt_folder, since ckpt.auto_resume is True")
        else:
            findings.problems.append(Problem(key, "this key is deprecated and no longer read", todo))


def _drop_unset_load_info(config: NestedDict, findings: Findings) -> None:
    """Remove ``ckpt.load_ckpt_info`` if its path is None or a placeholder."""
    info = get(config, LOAD_INFO)
    if not isinstance(info, dict) or "path" not in info:
        return
    if is_placeholder(info["path"]):
        findings.ignore(LOAD_INFO, f"its path {info['path']!r} is a placeholder")
    elif info["path"] is not None:
        return
    pop(config, LOAD_INFO)


def is_placeholder(path: Any) -> bool:
    """Return whether the last component of ``path`` is ``xxxx``."""
    return isinstance(path, str) and _normal(path).rpartition("/")[2] == PLACEHOLDER


def _normal(path: Any) -> Any:
    return path.removeprefix("local:").rstrip("/") if isinstance(path, str) else path
