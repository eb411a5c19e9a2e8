"""Hugging Face folders of runs: parameters that a run starts from, and its last checkpoint in this format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm.checkpoint.export_folder import remove_partial
from internlm.checkpoint.hf_export import Export, check_exportable, export, hf_config
from internlm.checkpoint.hf_folder import CONFIG
from internlm.checkpoint.hf_specs import spec_of_config
from internlm.checkpoint.model_folders import load_folder, path_of
from internlm.checkpoint.run_content import RunContent
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.checkpoint.storage import MANIFEST, Storage
from internlm.config.schema.root import LoadInfo
from internlm.utils.errors import CheckpointError, DataError


def load_run_from_folder(content: RunContent, info: LoadInfo) -> str:
    """Load the model of ``content`` from a folder of Hugging Face or Meta, in any layout; collective.

    Args:
        content: Content of the run.
        info: Path and format of the folder.

    Returns:
        What was loaded, for the log.

    Raises:
        CheckpointError: On some rank, the folder cannot be read, or does not match the model. In the former case,
            parameters may have been overwritten.
    """
    folder = load_folder(
        info.ckpt_type,
        path_of(info.path),
        content.tensors(),
        content.run_info["config"],
        exchange=content.exchange,
        allow_changes=content.config.allow_model_changes,
    )
    # Main parameters still hold the initial values; the first update would write them back to the model.
    content.optimizer.copy_model_to_main_params()
    return f"a model of type {folder.config['model_type']} in the format {info.ckpt_type}"


def check_run_exportable(config: Mapping[str, Any]) -> None:
    """Check, before a run trains, that its checkpoints can be written as Hugging Face folders.

    Args:
        config: Resolved config of the run, as a nested dict.

    Raises:
        CheckpointError: The format cannot express the model, or the tokenizer cannot be read.
    """
    model = spec_of_config(config, "ckpt.enable_internevo2hf_ckpt")
    check_exportable(model)
    try:
        hf_config(model, _tokenizer(config))
    except DataError as error:
        raise CheckpointError(*error.problems) from None


def lacks_export(storage: Storage, name: str) -> bool:
    """Return whether a checkpoint of a run is there, but not its Hugging Face folder, or only an older one."""
    if f"{name}/" not in storage.names():
        return False
    try:
        return storage.written(f"{name}-hf/{CONFIG}") < storage.written(f"{name}/{MANIFEST}")
    except FileNotFoundError:
        return True
    except OSError:  # something else has its name, such as a link that the user has made
        return False


def export_of_run(storage: Storage, name: str, config: Mapping[str, Any]) -> str:
    """Write the Hugging Face folder of a checkpoint, ``NAME-hf`` beside it, and return its path.

    Such a folder of an earlier run is replaced, as the checkpoint itself was.

    Raises:
        CheckpointError: The checkpoint does not verify.
        OSError: The folder cannot be written.
    """
    target = storage.path(f"{name}-hf")
    # The run owns the folder, so no other process is at work.
    remove_partial(target)
    model = spec_of_config(config, "config")
    export(open_checkpoint(storage, name), model, target, Export(tokenizer=_tokenizer(config), replaces=True))
    return target


def _tokenizer(config: Mapping[str, Any]) -> Path | None:
    path = config["data"].get("tokenizer_path")
    return Path(path) if path else None
