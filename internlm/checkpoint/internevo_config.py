"""Decoders of checkpoints of InternEvo's earlier versions: from a config, or the section that is saved with them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

from internlm.checkpoint.hf_specs import NamedSpec, spec_of_config
from internlm.checkpoint.internevo_files import CONFIG_NEEDED, MODEL_CONFIG, InternEvoFiles
from internlm.checkpoint.pickled_files import load_dict
from internlm.config import check_runnable, masked_dict, resolve
from internlm.model.hf_config import feed_forward_keys
from internlm.utils.errors import CheckpointError, ConfigError, Problem

#: Families whose fused projection has all queries, then all keys, then all values; others have them by kv head.
_STACKED = ("INTERNLM", "BAICHUAN2")


def spec_of_files(files: InternEvoFiles, config: Path | None, model_type: str | None, trust: bool) -> NamedSpec:
    """Return the decoder of a checkpoint, with the keys of the ``model`` section that its config has given.

    Args:
        files: Files of the checkpoint.
        config: Config of the run; None: the ``model`` section that the checkpoint holds.
        model_type: Model type; None: that of ``config``, or what the names of the tensors say.
        trust: Whether the file of the section is unpickled, if it needs more than plain values.

    Raises:
        CheckpointError: There is no config, or InternEvo has no such model.
        ConfigError: The config is invalid.
    """
    file = config or files.path / MODEL_CONFIG
    if config is not None:
        resolved = resolve(config)
    else:
        section = _section(files, trust)
        model_type = model_type or _model_type(files)
        # Only the section of the model matters, and nothing of it depends on the others.
        others = {"data": {"seq_len": 2, "micro_bsz": 1, "total_steps": 1}, "adam": {"lr": 1e-4}}
        try:
            resolved = resolve({"model_type": model_type, "model": section, **others})
            check_runnable(resolved.config)
        except ConfigError as error:
            # A key of a saved section can be changed in a config alone.
            found = [
                replace(problem, where=f"{file}: {problem.where}", todo=CONFIG_NEEDED) for problem in error.problems
            ]
            raise CheckpointError(*found) from None
    given = masked_dict(resolved.config)
    # What was given is printed, rather than all keys with their defaults.
    in_file = {
        name.split(".")[1]
        for name, source in resolved.sources.items()
        if source == "file" and name.startswith("model.")
    }
    keys = {key: value for key, value in given["model"].items() if key in in_file}
    if "mlp_ratio" not in keys and (width := _feed_forward_width(files)):
        # InternEvo's default is another one.
        keys |= feed_forward_keys(given["model"]["hidden_size"], width)
    model = spec_of_config({"model_type": given["model_type"], "model": {**given["model"], **keys}}, str(file))
    _check_names(model, file)
    return model._replace(keys=keys)


def _section(files: InternEvoFiles, trust: bool) -> dict[str, Any]:
    file = files.path / MODEL_CONFIG
    if not file.exists():
        raise CheckpointError(Problem(str(file), "is missing, so that the model's sizes are unknown", CONFIG_NEEDED))
    # What it is in the files: a dict with attributes.
    classes = ("internlm.core.context.parallel_context.Config", "internlm.core.context.Config")
    return load_dict(file, trust, dict.fromkeys(classes, OrderedDict))


def _model_type(files: InternEvoFiles) -> str:
    """Return the model type of a checkpoint that only its names show."""
    if files.is_first_generation:
        return "INTERNLM"
    if any(name.endswith("attention.wqkv.weight") for name in files.tensors):
        return "INTERNLM2"
    message = "the names of its tensors are those of several model types, such as LLAMA2 and QWEN2"
    raise CheckpointError(
        Problem(str(files.path), message, "Pass --model-type, or --config with the config of the run")
    )


def _feed_forward_width(files: InternEvoFiles) -> int:
    found = files.tensors.get("layers.0.feed_forward.w1.weight")
    return sum(tensor.shape[0] for tensor in found.tensors) if found is not None else 0


def is_stacked(model_type: str) -> bool:
    """Return whether a fused projection of a model has all queries, then all keys, then all values, in InternEvo."""
    return model_type in _STACKED


def _check_names(model: NamedSpec, file: Path) -> None:
    """Check that the names of the decoder's tensors in InternEvo are known."""
    c, family = model.spec.config, model.spec.family
    for key, value, is_known in (
        ("model_type", model.model_type, family.norms == "input"),
        ("model.qk_norm", c.qk_norm, c.qk_norm == "none"),
        ("model.norm_type", c.norm_type, c.norm_type == "rmsnorm"),
        ("model.apply_post_layer_norm", c.apply_post_layer_norm, not c.apply_post_layer_norm),
    ):
        if not is_known:
            raise CheckpointError(
                Problem(f"{file}: {key}", f"{value!r} has no known names in InternEvo", CONFIG_NEEDED)
            )
