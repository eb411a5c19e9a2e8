"""Folders with the weights of a model in the format of Hugging Face or Meta, loaded into a model of any layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.foreign_folders import CKPT_TYPES, find_foreign
from internlm.checkpoint.hf_folder import HFFolder, ModelFolder, shortened
from internlm.checkpoint.hf_reader import HFReader
from internlm.checkpoint.hf_specs import differences, spec_of_config, spec_of_folder
from internlm.checkpoint.llama_folder import LlamaFolder
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.logical_tensors import LogicalTensors
from internlm.checkpoint.saved_checkpoint import plain_names
from internlm.config.schema.fields import is_remote
from internlm.core.parallel.lora import is_adapter
from internlm.utils.errors import CheckpointError

#: Formats of folders by ``ckpt.load_ckpt_info.ckpt_type``.
FOLDERS: dict[str, Callable[[Path | str], ModelFolder]] = {"hf": HFFolder, "llama": LlamaFolder}


def path_of(location: str) -> Path | str:
    """Return the path of a local folder, which may begin with ``local:`` or ``~``; or an address as it is."""
    if is_remote(location):
        return location
    return Path(os.path.expanduser(location.removeprefix("local:")))


def folder_type(location: str) -> str | None:
    """Return the key of :data:`FOLDERS` of the folder at ``location``; None if it is no such folder."""
    path = path_of(location)
    if isinstance(path, str):
        outer, name = split_checkpoint(path)
        storage = open_storage(outer)
        try:
            found = find_foreign(lambda inner: plain_names(storage, f"{name}/{inner}"))
        except OSError:
            return None  # whoever opens it as a checkpoint says what is wrong
    else:
        found = find_foreign(lambda inner: os.listdir(path / inner) if (path / inner).is_dir() else [])
    return None if found is None or found.path else CKPT_TYPES.get(found.software)


def load_folder(
    folder_type: str,
    path: Path | str,
    tensors: LogicalTensors,
    config: Mapping[str, Any],
    *,
    exchange: Exchange,
    allow_changes: bool,
) -> ModelFolder:
    """Load the parameters of a model, in any layout, from a folder of Hugging Face or Meta; collective.

    Each rank reads only the slices that it holds. The ``model`` section of the config is compared with that of the
    folder, and all tensors with what the model needs, before anything is loaded. Adapters keep their initial values.

    Args:
        folder_type: Key of :data:`FOLDERS`.
        path: The folder.
        tensors: Tensors of this rank. Only those whose names begin with ``model/`` are read.
        config: Resolved config of the model, as a nested dict.
        exchange: Exchange between all ranks.
        allow_changes: Whether ``config`` may change what the model computes from the parameters.

    Raises:
        CheckpointError: On some rank, the folder cannot be read, or does not match the model. In the former case,
            parameters may have been overwritten.
    """
    wanted = {name: x for name, x in tensors.items() if name.startswith("model/") and not is_adapter(name)}
    with exchange.failing_together():
        folder = FOLDERS[folder_type](path)
        theirs, ours = spec_of_folder(folder), spec_of_config(config, "config")
        if problems := list(differences(folder.config_file, theirs.spec, ours.spec, allow_changes)):
            raise CheckpointError(*shortened(problems))
        with HFReader(folder, ours.spec) as reader:
            reader.check()
    # A second phase, so that no rank has changed anything when another one finds that the folder does not match.
    with exchange.failing_together(), reader:
        reader.read(wanted)
    return folder
