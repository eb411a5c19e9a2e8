"""Build the model of a checkpoint in one process, from the config that the checkpoint itself holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from internlm import accelerator
from internlm.checkpoint import compatibility
from internlm.checkpoint.folder_checks import reason_of
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.logical_tensors import model_tensors
from internlm.checkpoint.model_loading import newest_checkpoint
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.config import Config, resolve
from internlm.core.parallel.initialization import materialize
from internlm.model.registry import is_built_in, register_model_initializer
from internlm.train.build_model import build_model
from internlm.utils.errors import CheckpointError, Problem

#: Keys of the section ``model`` that concern training, or a part of a model.
_OF_TRAINING = ("num_chunks", "checkpoint", "cpu_offloading", "drop_rate", "compile")
#: Sections that a config must have, and that a model alone does not use.
_UNUSED = {"data": {"seq_len": 2, "micro_bsz": 1, "micro_num": 1, "total_steps": 1}, "adam": {"lr": 1.0}}


def load_model(checkpoint: str | Path, overrides: Iterable[str] = ()) -> nn.Module:
    """Build the model that ``checkpoint`` was saved from, and load its parameters, in evaluation mode.

    No config file and no process group are needed; the run that saved may have had any layout. A model of your own
    must be registered before. All bytes that are read are compared with their checksums.

    Args:
        checkpoint: Path or address of a checkpoint, or a folder whose newest one is loaded.
        overrides: Changes of the config, such as ``["model.dtype=torch.float32"]``.

    Returns:
        The whole model, on this process's GPU if there is one, otherwise on the CPU.

    Raises:
        CheckpointError: There is no committed checkpoint, it does not verify, or its config does not match its tensors.
        ConfigError: The model's type is not registered, or an override is wrong.
    """
    try:
        saved = open_checkpoint(*_opened(newest_checkpoint(str(checkpoint))))
    except OSError as error:
        problem = Problem(str(error.filename or checkpoint), reason_of(error), "Check the path and its permissions")
        raise CheckpointError(problem) from None
    config = _config(saved.state.config, overrides)
    register_model_initializer()
    # On the meta device first: a damaged config must not allocate more than the checkpoint holds.
    model = build_model(config, seed=0, deferred=is_built_in(config.model_type))
    tensors = model_tensors(model)
    problems = [
        *compatibility.missing_tensors(saved.where, saved.metadata, tensors),
        *compatibility.unexpected_tensors(saved.where, saved.metadata, tensors),
    ]
    if problems:
        raise CheckpointError(*problems)
    materialize(model, 0, accelerator.current_device())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        saved.read(model_tensors(model))
    return model.eval()


def _opened(location: str) -> tuple[Any, str]:
    folder, name = split_checkpoint(location)
    return open_storage(folder), name


def _config(saved: dict[str, Any], overrides: Iterable[str]) -> Config:
    """Return the config of the model that the config ``saved`` in a checkpoint describes, on one process."""
    section: dict[str, Any] = saved.get("model") or {}
    model = {key: value for key, value in section.items() if key not in _OF_TRAINING}
    content: dict[str, Any] = {"model": model, **_UNUSED}
    content |= {key: saved[key] for key in ("model_type", "use_fp32_norm") if key in saved}
    return resolve(content, overrides, world_size=1, device_type=accelerator.device_type()).config
