"""Build the model of a checkpoint or a Hugging Face folder in one process, from the config that this itself holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from internlm import accelerator
from internlm.checkpoint import compatibility
from internlm.checkpoint.folder_checks import reason_of
from internlm.checkpoint.hf_reader import HFReader
from internlm.checkpoint.hf_specs import spec_of_folder
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.logical_tensors import model_tensors
from internlm.checkpoint.model_folders import FOLDERS, folder_type, path_of
from internlm.checkpoint.model_loading import newest_checkpoint
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.config import Config, resolve
from internlm.core.parallel.initialization import materialize
from internlm.core.parallel.lora import is_adapter
from internlm.model.decoder import Decoder
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
    must be registered before. All bytes of a checkpoint that are read are compared with their checksums. No initial
    values are drawn, except those of a model of your own and of new adapters.

    Args:
        checkpoint: Path or address of a checkpoint, or a folder whose newest one is loaded; or a folder of Hugging Face
            with ``config.json`` and safetensors files, or of Meta with ``params.json``.
        overrides: Changes of the config, such as ``["model.dtype=torch.float32"]``.

    Returns:
        The whole model, on this process's GPU if there is one, otherwise on the CPU.

    Raises:
        CheckpointError: There is no such checkpoint or folder, it does not verify, or its config does not match its
            tensors.
        ConfigError: The model's type is not registered, or an override is wrong.
    """
    register_model_initializer()
    try:
        location = newest_checkpoint(str(checkpoint))
        found = folder_type(location)
        model = _of_checkpoint(location, overrides) if found is None else _of_folder(found, location, overrides)
    except OSError as error:
        problem = Problem(str(error.filename or checkpoint), reason_of(error), "Check the path and its permissions")
        raise CheckpointError(problem) from None
    return model.eval()


def _of_checkpoint(location: str, overrides: Iterable[str]) -> nn.Module:
    folder, name = split_checkpoint(location)
    saved = open_checkpoint(open_storage(folder), name)
    config = _config(saved.state.config, overrides)
    # On the meta device first: a damaged config must not allocate more than the checkpoint holds.
    model = build_model(config, seed=0, deferred=is_built_in(config.model_type))
    tensors = saved.as_stored(model_tensors(model))
    problems = [
        *compatibility.missing_tensors(saved.where, saved.metadata, tensors),
        *compatibility.unexpected_tensors(saved.where, saved.metadata, tensors),
    ]
    if problems:
        raise CheckpointError(*problems)
    # Each tensor of the model is in the checkpoint, as was just found, so none keeps the undefined values.
    materialize(model, 0, accelerator.current_device(), draws=lambda name: False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        saved.read(saved.as_stored(model_tensors(model)))
    return model


def _of_folder(folder_type: str, location: str, overrides: Iterable[str]) -> nn.Module:
    folder = FOLDERS[folder_type](path_of(location))
    named = spec_of_folder(folder)
    with HFReader(folder, named.spec) as reader:
        reader.check()
        given = {key: value for key, value in named.keys.items() if value is not None}
        section = {"dtype": str(reader.main_dtype), **given}
    config = _config({"model_type": named.model_type, "model": section}, overrides)
    model = build_model(config, seed=0, deferred=is_built_in(config.model_type))
    if not isinstance(model, Decoder):
        message = (
            f"a model of your own is registered as {config.model_type!r}, and its tensors are not those of {location}"
        )
        raise CheckpointError(Problem("model_type", message, "Register it under another name"))
    with HFReader(folder, model.spec) as reader:
        reader.check()
        materialize(model, 0, accelerator.current_device(), draws=is_adapter)
        reader.read({name: tensor for name, tensor in model_tensors(model).items() if not is_adapter(name)})
    return model


def _config(saved: dict[str, Any], overrides: Iterable[str]) -> Config:
    """Return the config of the model that the config ``saved`` in a checkpoint describes, on one process."""
    section: dict[str, Any] = saved.get("model") or {}
    model = {key: value for key, value in section.items() if key not in _OF_TRAINING}
    content: dict[str, Any] = {"model": model, **_UNUSED}
    content |= {key: saved[key] for key in ("model_type", "use_fp32_norm") if key in saved}
    return resolve(content, overrides, world_size=1, device_type=accelerator.device_type()).config
