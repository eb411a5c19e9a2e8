"""Subcommands of ``internlm convert``: models as folders of other software, and back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from internlm.checkpoint.export_folder import check_new
from internlm.checkpoint.hf_export import Export, export
from internlm.checkpoint.hf_folder import HFFolder, ModelFolder
from internlm.checkpoint.hf_import import import_folder, import_model
from internlm.checkpoint.hf_specs import spec_of_config
from internlm.checkpoint.internevo_config import is_stacked, spec_of_files
from internlm.checkpoint.internevo_files import read_files
from internlm.checkpoint.internevo_folder import InternEvoFolder
from internlm.checkpoint.llama_folder import LlamaFolder
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.model_folders import path_of
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.cli.ckpt_output import reports_storage_errors
from internlm.config import masked_dict, resolve
from internlm.utils.errors import Problem, UserError

#: Number of files that are listed.
_MOST_NAMES = 8


@reports_storage_errors
def to_hf(arguments: argparse.Namespace) -> None:
    """Write the model of a checkpoint as a Hugging Face folder.

    Raises:
        UserError: The checkpoint or the config cannot be used, or the folder cannot be written.
    """
    a = arguments
    outer, name = split_checkpoint(a.checkpoint)
    checkpoint = open_checkpoint(open_storage(outer), name)
    if a.config:
        model = spec_of_config(masked_dict(resolve(a.config).config), a.config)
    else:
        model = spec_of_config(checkpoint.state.config, checkpoint.where)
    settings = Export(
        dtype=getattr(torch, a.dtype) if a.dtype else None, shard_bytes=a.shard_size, tokenizer=_expanded(a.tokenizer)
    )
    target = _absolute(a.target)
    files = export(checkpoint, model, target, settings)
    count = f"{len(files)} {'file' if len(files) == 1 else 'files'}"
    print(f"{target}: {count} with tensors, {sum(files.values())} bytes")


@reports_storage_errors
def from_internevo(arguments: argparse.Namespace) -> None:
    """Write the model of a checkpoint of InternEvo's earlier versions as one of this version; print its model section.

    Raises:
        UserError: The checkpoint or the config cannot be used, or the new checkpoint cannot be written.
    """
    a = arguments
    if a.config and a.model_type:
        raise UserError(Problem("--model-type", "cannot be combined with --config, which says it", "Remove it"))
    source, target = path_of(a.source), _absolute(a.target)
    if isinstance(source, str):
        message = "is in an object store, where pickled files cannot be read"
        raise UserError(Problem(source, message, "Copy the folder to a file system"))
    check_new(target)
    files = read_files(source, a.trust)
    model = spec_of_files(files, _expanded(a.config), a.model_type, a.trust)
    folder = InternEvoFolder(files, model.spec, is_stacked(model.model_type))
    print(import_model(folder, model, target), end="")
    if files.left_behind:
        names = ", ".join(files.left_behind[:_MOST_NAMES])
        more = f" and {len(files.left_behind) - _MOST_NAMES} more" if len(files.left_behind) > _MOST_NAMES else ""
        print(f"left behind, with the optimizer state and the position in the data: {names}{more}", file=sys.stderr)
    print(f"{target}: written", file=sys.stderr)


@reports_storage_errors
def from_llama(arguments: argparse.Namespace) -> None:
    """Write the model of a release of Meta as a checkpoint, and print its model section.

    Raises:
        UserError: The folder cannot be used, or the checkpoint cannot be written.
    """
    _import(arguments, LlamaFolder)


@reports_storage_errors
def from_hf(arguments: argparse.Namespace) -> None:
    """Write the model of a Hugging Face folder as a checkpoint, and print its model section.

    Raises:
        UserError: The folder cannot be used, or the checkpoint cannot be written.
    """
    _import(arguments, HFFolder)


def _import(arguments: argparse.Namespace, opened: Callable[[Path | str], ModelFolder]) -> None:
    target = _absolute(arguments.target)
    print(import_folder(path_of(arguments.source), target, opened), end="")
    print(f"{target}: written", file=sys.stderr)


def _absolute(target: str) -> Path | str:
    path = path_of(target)
    return path if isinstance(path, str) else Path(os.path.abspath(path))


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()
