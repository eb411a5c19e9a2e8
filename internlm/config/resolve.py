"""Resolve a config file (or a dict) and overrides into one validated, frozen :class:`Config`.

1. *Load* the file.
2. *Normalise* old spellings, apply the overrides, normalise again, and choose the layout for the world size.
3. *Validate* each key against the schema.
4. *Derive* defaults that follow from other values.
5. *Check* the rules across keys.

All problems found in phases 2 to 5 are reported together, unless the config needs a feature that does not exist: then
only this is reported. Rules that read an invalid key are skipped, so that one mistake gives one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from internlm.config import nested_dict
from internlm.config.families import FAMILIES, is_replaced
from internlm.config.foreign import Findings, drop_unset_checkpoints
from internlm.config.keys import section_of, values
from internlm.config.legacy import normalise
from internlm.config.load import apply_overrides, execute_file, from_mapping, variables_of
from internlm.config.messages import schema_problems
from internlm.config.mixture import split_weights
from internlm.config.nested_dict import NestedDict
from internlm.config.rules import ALL_RULES, RunInfo
from internlm.config.rules.data_rules import MICRO_NUM_READS, micro_num_of
from internlm.config.rules.rule import DEVICE_TYPE
from internlm.config.schema import Config
from internlm.config.schema.fields import Section
from internlm.config.schema.parallel import ElasticLayout
from internlm.config.support import unsupported, warnings_about
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.logger import get_logger

ZERO = "hybrid_zero_optimizer"
OVERLAPS = (f"{ZERO}.overlap_sync_grad", f"{ZERO}.overlap_sync_param")


@dataclass(frozen=True)
class Derivation:
    """Default of the key ``target``, computed from other keys and properties of the run.

    If ``target`` is not given, it is set to the result of ``value(config, run)``; None leaves it unset. ``reads`` names
    the keys and the :class:`RunInfo` fields that ``value`` reads. If ``only_with`` names a key, it must be given.
    """

    target: str
    reads: tuple[str, ...]
    value: Callable[[Config, RunInfo], Any]
    only_with: str | None = None


def _head_dim(config: Config, run: RunInfo) -> int | None:
    width, rest = divmod(config.model.hidden_size, config.model.num_attention_heads)
    return None if rest else width


def _dtype(config: Config, run: RunInfo) -> str:
    # bfloat16 on CPUs ranges from ten times faster than float32 to hundreds of times slower.
    return "torch.bfloat16" if run.device_type == "cuda" else "torch.float32"


def _saves(config: Config, run: RunInfo) -> bool | None:
    return True if config.ckpt.save_ckpt_folder and config.ckpt.checkpoint_every is not None else None


def _bucket_size(config: Config, run: RunInfo) -> int:
    """Return the given bucket size in elements, or the default: 16 Mi with overlap, 512 Mi without.

    Overlap needs several buckets; without it, fewer collectives are faster.
    """
    zero = config.hybrid_zero_optimizer
    return zero.reduce_bucket_size or (16 if zero.overlap_sync_grad or zero.overlap_sync_param else 512) * 2**20


DERIVATIONS = (
    Derivation("data.micro_num", MICRO_NUM_READS, micro_num_of, only_with="data.global_batch"),
    Derivation("data.valid_micro_num", ("data.micro_num",), lambda c, _: c.data.micro_num),
    Derivation(
        "model.num_kv_attention_heads", ("model.num_attention_heads",), lambda c, _: c.model.num_attention_heads
    ),
    Derivation("model.head_dim", ("model.hidden_size", "model.num_attention_heads"), _head_dim),
    Derivation(
        "model.num_chunks", ("parallel.pipeline.mode",), lambda c, _: 2 if c.parallel.pipeline.mode == "ZBV" else None
    ),
    Derivation("model.dtype", (DEVICE_TYPE,), _dtype),
    Derivation("ckpt.enable_save_ckpt", ("ckpt.save_ckpt_folder", "ckpt.checkpoint_every"), _saves),
    Derivation(f"{ZERO}.reduce_bucket_size", OVERLAPS, _bucket_size),
    Derivation(f"{ZERO}.all_gather_size", (*OVERLAPS, f"{ZERO}.reduce_bucket_size"), _bucket_size),
    Derivation("lr_scheduler.total_steps", ("data.total_steps",), lambda c, _: c.data.total_steps),
    Derivation("beta2_scheduler.init_beta2", ("adam.adam_beta2",), lambda c, _: c.adam.adam_beta2),
    Derivation("beta2_scheduler.c", ("adam.adam_beta2_c",), lambda c, _: float(c.adam.adam_beta2_c)),
)


@dataclass(frozen=True)
class Resolved:
    """Result of :func:`resolve`: the config, the source of each value, and warnings."""

    config: Config
    sources: dict[str, str]  # dotted key -> "file", "override", "derived" or "default"
    warnings: list[str]


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    world_size: int | None = None,
    device_type: str | None = None,
) -> Config:
    """Resolve a config, log its warnings, and return the config.

    See :func:`resolve` for the arguments and errors.
    """
    resolved = resolve(source, overrides, world_size, device_type)
    for warning in resolved.warnings:
        get_logger().warning(warning)
    return resolved.config


Config.resolver = load_config


def resolve(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    world_size: int | None = None,
    device_type: str | None = None,
) -> Resolved:
    """Resolve a config file or dict into a validated config.

    Args:
        source: Path of a Python config file, which is executed, or a dict of config keys and UPPER_CASE variables.
        overrides: Strings ``"key=value"``. If a key occurs more than once, the last value applies.
        world_size: Number of processes. None: skip the checks that depend on it.
        device_type: ``"cpu"`` or ``"cuda"``. None: skip the derivations and checks that depend on it.

    Returns:
        The config, the source of each value, and warnings about dubious settings.

    Raises:
        ConfigError: The config is invalid; every problem is listed.
    """
    names = execute_file(source) if isinstance(source, (str, Path)) else source
    raw = from_mapping(names)
    findings = Findings()
    # Normalise the file first, so that its keys have the names that overrides are applied to; then again, since
    # overrides may use old spellings too.
    normalise(raw, findings)
    overridden = apply_overrides(raw, overrides, findings.problems)
    normalise(raw, findings)
    drop_unset_checkpoints(raw, findings)
    split_weights(raw)
    _choose_layout(raw, world_size, overridden)
    derived = _complete_family(raw)
    problems, failed = _validate(raw)
    run = RunInfo(world_size, device_type)
    unusable = failed | run.unknown()
    derived |= _derive(raw, run, unusable)
    problems += _check(raw, run, unusable)
    if findings.missing or findings.problems or problems:
        # A config for a feature that does not exist cannot be mended key by key: name the feature alone.
        missing = [*findings.missing, *unsupported(lambda key: nested_dict.get(raw, key), failed)]
        raise ConfigError(*(missing or [*findings.problems, *problems]))
    # Validate again: derived values were filled in after the first validation.
    config = Config.model_validate(raw)
    config._variables = variables_of(names)
    sources = _sources(config, set(nested_dict.leaves(raw)) - derived, overridden, derived)
    return Resolved(config, sources, warnings_about(config, findings.ignored, derived))


def _choose_layout(raw: NestedDict, world_size: int | None, overridden: set[str]) -> None:
    """Set the keys of the first entry of ``parallel.elastic`` for ``world_size``, except ``overridden`` keys."""
    entries = nested_dict.get(raw, "parallel.elastic")
    try:
        layouts: list[ElasticLayout] = [ElasticLayout.model_validate(given) for given in entries or ()]
    except (ValidationError, TypeError):
        return  # the schema is checked next
    # The command line wins: it is what someone has just typed.
    for entry in layouts:
        if world_size in entry.worlds:
            for key, value in entry.layout.items():
                if not nested_dict.within(f"parallel.{key}", overridden):
                    nested_dict.put(raw, f"parallel.{key}", value)
            return


def _complete_family(raw: NestedDict) -> set[str]:
    """Set the keys of ``model`` that are not given to the defaults of the model's family; return them."""
    name, model = raw.get("model_type", Config.model_fields["model_type"].default), raw.get("model")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(model, dict) or is_replaced(name):
        return set()
    missing = family.missing(model)
    model.update(missing)
    return {f"model.{key}" for key in missing}


def _validate(raw: NestedDict) -> tuple[list[Problem], set[str]]:
    """Validate each key against the schema; return the problems and the set of invalid keys."""
    try:
        Config.model_validate(raw)
    except ValidationError as error:
        return schema_problems(error)
    return [], set()


def _derive(raw: NestedDict, run: RunInfo, unusable: set[str]) -> set[str]:
    """Set derived values in ``raw`` and return their keys; if a key cannot be derived, add it to ``unusable``."""
    config, derived = _partial(Config, raw), set()
    for derivation in DERIVATIONS:
        # A key with value None counts as not given.
        if nested_dict.get(raw, derivation.target) is not None:
            continue
        if derivation.only_with and nested_dict.get(raw, derivation.only_with) is None:
            continue
        if any(nested_dict.within(key, unusable) for key in derivation.reads):
            unusable.add(derivation.target)
        elif (value := derivation.value(config, run)) is not None:
            nested_dict.put(raw, derivation.target, value)
            derived.add(derivation.target)
            # Later derivations read the value: valid_micro_num, for example, that of micro_num.
            config = _partial(Config, raw)
    return derived


def _check(raw: NestedDict, run: RunInfo, unusable: set[str]) -> list[Problem]:
    config = _partial(Config, raw)
    # A rule that reads an invalid key could raise, or report the same mistake again.
    # Nor may it read a list or section in which a key is invalid.
    holding = {section for key in unusable for section in nested_dict.with_sections(key)}
    ready = (
        rule for rule in ALL_RULES if not any(key in holding or nested_dict.within(key, unusable) for key in rule.reads)
    )
    return [problem for rule in ready for problem in rule.check(config, run)]


def _partial(section: type[Section], given: Any) -> Any:
    """Build a section from ``given`` without validation; only keys that passed validation may be read from it."""
    given = given if isinstance(given, Mapping) else {}
    known = {name: given[name] for name in section.model_fields if name in given}
    for name, field in section.model_fields.items():
        if (inner := section_of(field.annotation)) and (field.is_required() or known.get(name) is not None):
            known[name] = _partial(inner, known.get(name))
    # Invalid values may be of any type here; rules and derivations that read them are skipped.
    return section.model_construct(**known)


def _sources(config: Config, given: set[str], overridden: set[str], derived: set[str]) -> dict[str, str]:
    # A dict that may have any names is one value of the config, but has several leaves in the file.
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
