"""Load the parameters of a checkpoint, or of a model of Hugging Face or Meta, into a model of any layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from internlm.checkpoint import compatibility
from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.logical_tensors import model_tensors
from internlm.checkpoint.model_folders import folder_type, load_folder, path_of
from internlm.checkpoint.run_state import RunState
from internlm.checkpoint.saved_checkpoint import OF_ONE_CHECKPOINT, find_checkpoints, open_checkpoint
from internlm.utils.errors import CheckpointError, Problem


def load_parameters(
    model: nn.Module, source: str, config: Mapping[str, Any], exchange: Exchange, allow_changes: bool = False
) -> int | None:
    """Load this rank's parameters and buffers of ``model`` from what ``source`` holds; collective.

    Args:
        model: Model of this rank, with a placement for each parameter.
        source: Path or address of a checkpoint, or path of a folder of Hugging Face or Meta.
        config: Resolved config of the model, as a nested dict.
        exchange: Exchange between all ranks.
        allow_changes: Whether ``config`` may change what the model computes from the parameters.

    Returns:
        Step of the checkpoint; None for a folder of Hugging Face or Meta.

    Raises:
        CheckpointError: On some rank, ``source`` is no such checkpoint or folder, does not verify, or does not match.
    """
    # Rank 0 decides for all, which would otherwise call different collectives.
    found = exchange.broadcast(folder_type(source))
    if found is None:
        return load_model(model, source, config, exchange, allow_changes).train_state.step
    tensors = model_tensors(model)
    load_folder(found, path_of(source), tensors, config, exchange=exchange, allow_changes=allow_changes)
    return None


def load_model(
    model: nn.Module, source: str, config: Mapping[str, Any], exchange: Exchange, allow_changes: bool = False
) -> RunState:
    """Load this rank's parameters and buffers of ``model``; every piece that is read is verified. Collective.

    Args:
        model: Model of this rank, with a placement for each parameter.
        source: Path or address of the checkpoint.
        config: Resolved config of the model, as a nested dict.
        exchange: Exchange between all ranks.
        allow_changes: Whether ``config`` may change what the model computes from the parameters.

    Returns:
        Content of the checkpoint's state file.

    Raises:
        CheckpointError: On some rank, ``source`` is not a committed checkpoint, does not verify, or does not match.
    """
    tensors = model_tensors(model)
    # A pipeline stage has only the tensors of its own layers.
    known = {name for names in exchange.all_gather([*tensors]) for name in names}
    with exchange.failing_together():
        location, name = split_checkpoint(source)
        checkpoint = open_checkpoint(open_storage(location), name)
        where, saved = checkpoint.where, checkpoint.state
        tensors = checkpoint.as_stored(compatibility.without_new_adapters(tensors, saved.config))
        known = checkpoint.names_as_stored(known)
        problems = [*compatibility.other_architecture(where, saved.config, config)]
        if not allow_changes:
            problems += compatibility.other_mathematics(where, saved.config, config)
        if not problems:  # with another architecture, nearly every tensor would differ
            problems += compatibility.missing_tensors(where, checkpoint.metadata, tensors)
            problems += compatibility.unexpected_tensors(where, checkpoint.metadata, known)
        if problems:
            raise CheckpointError(*problems)
    with exchange.failing_together():
        checkpoint.read(tensors)
    return saved


def newest_checkpoint(location: str) -> str:
    """Return ``location`` if it is a checkpoint, otherwise the newest committed checkpoint in this folder.

    Raises:
        CheckpointError: The folder has checkpoints, but none is committed.
        OSError: The folder cannot be read.
    """
    storage = open_storage(location)
    # A folder without any may be a checkpoint that cannot be recognised: opening it says what is wrong.
    found = [] if OF_ONE_CHECKPOINT & {*storage.names()} else find_checkpoints(storage)
    if not found:
        return location
    committed = [entry.name for entry in found if entry.is_committed]
    if not committed:
        raise CheckpointError(Problem(storage.location, "holds no committed checkpoint", "Choose another folder"))
    return f"{location.rstrip('/')}/{committed[0]}"
