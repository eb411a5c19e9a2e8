"""Subcommands of ``internlm convert``: models as Hugging Face folders, and back."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from internlm.checkpoint.hf_export import Export, export
from internlm.checkpoint.hf_import import import_folder
from internlm.checkpoint.hf_specs import spec_of_config
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.cli.ckpt_output import reports_storage_errors
from internlm.config import masked_dict, resolve


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
    target = Path(os.path.abspath(a.target.expanduser()))
    files = export(checkpoint, model, target, settings)
    size = sum(file.stat().st_size for file in files)
    print(f"{target}: {len(files)} {'file' if len(files) == 1 else 'files'} with tensors, {size} bytes")


@reports_storage_errors
def from_hf(arguments: argparse.Namespace) -> None:
    """Write the model of a Hugging Face folder as a checkpoint, and print its model section.

    Raises:
        UserError: The folder cannot be used, or the checkpoint cannot be written.
    """
    target = Path(os.path.abspath(arguments.target.expanduser()))
    print(import_folder(arguments.source.expanduser(), target), end="")
    print(f"{target}: written", file=sys.stderr)


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()
