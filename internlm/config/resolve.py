"""Values that follow from other values, where they are not given.

From a config file, or a dict, and overrides to one validated, frozen :class:`Config`.

1. *Load* the file.
2. *Normalise* old spellings, apply the overrides, normalise again.
3. *Validate* each key against the schema.
4. *Derive* what is not given.
5. *Check* the rules across keys.

Whatever is wrong in 2 to 5 is told together, and a key that failed silences the rules that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from internlm.config import nested_dict
from internlm.config.dump import values
from internlm.config.keys import section_of
from internlm.config.legacy import Findings, normalise
from internlm.config.load import apply_overrides, load_file
from internlm.config.messages import schema_problems
from internlm.config.nested_dict import Tree
from internlm.config.rules import ALL_RULES
from internlm.config.schema import Config
from internlm.config.schema.fields import Section
from internlm.config.support import DEVICE_TYPE, Facts, doubts, without_effect
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.logger import get_logger

ZERO = "hybrid_zero_optimizer"
OVERLAPS = (f"{ZERO}.overlap_sync_grad", f"{ZERO}.overlap_sync_param")


@dataclass(frozen=True)
class Derivation:
    """``target`` is ``value(config, facts)`` where it is not given; None leaves it as it is."""

    target: str
    reads: tuple[str, ...]
    value: Callable[[Config, Facts], Any]


def _head_dim(config: Config, facts: Facts) -> int | None:
    width, rest = divmod(config.model.hidden_size, config.model.num_attention_heads)
    return None if rest else width


def _dtype(config: Config, facts: Facts) -> str:
    return "torch.bfloat16" if facts.device_type == "cuda" else "torch.float32"


def _bucket_size(config: Config, facts: Facts) -> int:
    """An overlap needs several buckets; without one, the fewer the better."""
    zero = config.hybrid_zero_optimizer
    return zero.reduce_bucket_size or (16 if zero.overlap_sync_grad or zero.overlap_sync_param else 512) * 2**20


DERIVATIONS = (
    Derivation("data.valid_micro_num", ("data.micro_num",), lambda config, _: config.data.micro_num),
    Derivation(
        "model.num_kv_attention_heads",
        ("model.num_attention_heads",),
        lambda config, _: config.model.num_attention_heads,
    ),
    Derivation("model.head_dim", ("model.hidden_size", "model.num_attention_heads"), _head_dim),
    Derivation(
        "model.num_chunks", ("parallel.pipeline.mode",), lambda c, _: 2 if c.parallel.pipeline.mode == "ZBV" else None
    ),
    Derivation("model.dtype", (DEVICE_TYPE,), _dtype),
    Derivation(f"{ZERO}.reduce_bucket_size", OVERLAPS, _bucket_size),
    Derivation(f"{ZERO}.all_gather_size", (*OVERLAPS, f"{ZERO}.reduce_bucket_size"), _bucket_size),
    Derivation("lr_scheduler.total_steps", ("data.total_steps",), lambda config, _: config.data.total_steps),
    Derivation("beta2_scheduler.init_beta2", ("adam.adam_beta2",), lambda config, _: config.adam.adam_beta2),
    Derivation("beta2_scheduler.c", ("adam.adam_beta2_c",), lambda config, _: float(config.adam.adam_beta2_c)),
)


@dataclass(frozen=True)
class Resolved:
    """A config, where each of its values came from, and what is worth a warning."""

    config: Config
    sources: dict[str, str]  # dotted key -> "file", "override", "derived" or "default"
    warnings: list[str]


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    world_size: int | None = None,
    device_type: str | None = None,
) -> Config:
    """As :func:`resolve`, for the config alone; warnings are logged."""
    resolved = resolve(source, overrides, world_size, device_type)
    for warning in resolved.warnings:
        get_logger().warning(warning)
    return resolved.config


def resolve(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    world_size: int | None = None,
    device_type: str | None = None,
) -> Resolved:
    """Resolve the config file or dict ``source`` with ``overrides``: ``"key=value"`` each, a later over an earlier one.

    Without ``world_size`` (processes) or ``device_type`` (``"cpu"`` or ``"cuda"``), what depends on it is neither
    checked nor derived. Raises :class:`ConfigError` with everything that is wrong.
    """
    raw = load_file(source) if isinstance(source, (str, Path)) else nested_dict.plain(source)
    found = Findings()
    normalise(raw, found)
    overridden = apply_overrides(raw, overrides, found.problems)
    normalise(raw, found)
    problems, failed = _validate(raw)
    facts = Facts(world_size, device_type)
    unusable = failed | facts.unknown()
    derived = _derive(raw, facts, unusable)
    problems += _check(raw, facts, unusable)
    if found.problems or problems:
        raise ConfigError(*found.problems, *problems)
    config = Config.model_validate(raw)
    sources = _sources(config, set(nested_dict.leaves(raw)) - derived, overridden, derived)
    return Resolved(config, sources, found.warnings + without_effect(config) + doubts(config))


def _validate(raw: Tree) -> tuple[list[Problem], set[str]]:
    try:
        Config.model_validate(raw)
    except ValidationError as error:
        return schema_problems(error)
    return [], set()


def _derive(raw: Tree, facts: Facts, unusable: set[str]) -> set[str]:
    """Fill ``raw`` with what follows from it; the keys filled. A target that can't be told becomes unusable."""
    config, filled = _partial(Config, raw), set()
    for derivation in DERIVATIONS:
        if nested_dict.get(raw, derivation.target) is not None:
            continue
        if any(nested_dict.within(key, unusable) for key in derivation.reads):
            unusable.add(derivation.target)
        elif (value := derivation.value(config, facts)) is not None:
            nested_dict.put(raw, derivation.target, value)
            filled.add(derivation.target)
    return filled


def _check(raw: Tree, facts: Facts, unusable: set[str]) -> list[Problem]:
    config = _partial(Config, raw)
    ready = (rule for rule in ALL_RULES if not any(nested_dict.within(key, unusable) for key in rule.reads))
    return [problem for rule in ready for problem in rule.check(config, facts)]


def _partial(section: type[Section], given: Any) -> Any:
    """A section of what is there, unvalidated: only keys that did not fail may be read from it."""
    given = given if isinstance(given, Mapping) else {}
    known = {name: given[name] for name in section.model_fields if name in given}
    for name, field in section.model_fields.items():
        if (inner := section_of(field.annotation)) and (field.is_required() or known.get(name) is not None):
            known[name] = _partial(inner, known.get(name))
    return section.model_construct(**known)


def _sources(config: Config, given: set[str], overridden: set[str], derived: set[str]) -> dict[str, str]:
    # A dict in which any name is allowed is one value of the config, but several leaves of the file.
    in_file = {key for leaf in given for key in nested_dict.with_sections(leaf)}
    overridden_leaves = [leaf for leaf in given if nested_dict.within(leaf, overridden)]
    replaced = {key for leaf in overridden_leaves for key in nested_dict.with_sections(leaf)}

    def source(key: str) -> str:
        if key in derived:
            return "derived"
        if key in replaced:
            return "override"
        return "file" if key in in_file else "default"

    return {key: source(key) for key, _ in values(config)}
