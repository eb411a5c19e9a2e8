"""Export of a checkpoint as a Hugging Face folder, which ``transformers`` and inference servers load.

Tensors are read, converted and written piece by piece, or as a whole where theirs is no run in the memory of ours, so
memory is that of one such tensor, whatever the size of the model. The folder gets its name when it is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from internlm.checkpoint.export_folder import NewFolder, new_folder
from internlm.checkpoint.exported_tensors import ExportedTensor, ExportReader
from internlm.checkpoint.hf_folder import CONFIG, COPIED, INDEX, ONE_FILE, shortened
from internlm.checkpoint.hf_specs import NamedSpec
from internlm.checkpoint.safetensors_files import header_of, write_tensors
from internlm.checkpoint.saved_checkpoint import SavedCheckpoint
from internlm.core.parallel.lora import is_adapter
from internlm.data.tokenizer import check_vocabulary, load_tokenizer
from internlm.model.hf_config import to_hf_config, unsupported_by
from internlm.model.hf_tensors import HFTensor, hf_tensors, tensor_shapes
from internlm.utils.errors import CheckpointError, Problem

#: Size limit of a file, in bytes; a larger tensor has a file of its own.
SHARD_BYTES = 5 * 10**9
_CHECKPOINT = "Pass --config with the config of the run, or choose another checkpoint"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Settings of an export."""

    dtype: torch.dtype | None = None
    """Dtype of all tensors; None: that of each tensor in the checkpoint."""
    shard_bytes: int = SHARD_BYTES
    replaces: bool = False
    """Whether a folder of the same name is replaced."""
    tokenizer: Path | None = None
    """Folder, or sentencepiece model, whose tokenizer is copied along."""


def export(checkpoint: SavedCheckpoint, model: NamedSpec, target: Path | str, settings: Export) -> dict[str, int]:
    """Write the model of a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: The checkpoint.
        model: Its decoder.
        target: Path of the folder to write, or its address in an object store; it must not exist.
        settings: Dtype, size of files, and tokenizer.

    Returns:
        The sizes of the files with tensors, in bytes, by their names.

    Raises:
        CheckpointError: The format cannot express the model, the checkpoint does not match the model or is damaged, or
            the folder exists.
        OSError: It cannot be written.
    """
    check_exportable(model)
    rows = _rows(checkpoint, model, settings.dtype)
    config = hf_config(model, settings.tokenizer)
    config["torch_dtype"] = _most_common(rows)
    with new_folder(target, settings.replaces) as folder:
        files = _write_shards(checkpoint, model, rows, settings.shard_bytes, folder)
        _copy_tokenizer(settings.tokenizer, folder)
        folder.write_json(CONFIG, config)
    return files


def check_exportable(model: NamedSpec) -> None:
    """Check that the Hugging Face format of a family can express a decoder.

    Raises:
        CheckpointError: It cannot; every setting is named.
    """
    # Before anything is read: the largest of models would otherwise be refused after minutes.
    if problems := list(unsupported_by(model.model_type, model.spec)):
        raise CheckpointError(*problems)


def hf_config(model: NamedSpec, tokenizer: Path | None) -> dict[str, Any]:
    """Return the content of ``config.json``, with the ids of special tokens if there is a tokenizer."""
    # Without a value, transformers would assume the ids of Llama's tokenizer.
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        loaded = load_tokenizer(str(tokenizer))
        check_vocabulary(loaded, model.spec.config.vocab_size)
        # A tokenizer that the model cannot hold is refused before anything is written.
        ids |= {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id}
    return to_hf_config(model.model_type, model.spec) | ids


def _copy_tokenizer(tokenizer: Path | None, folder: NewFolder) -> None:
    if tokenizer is None:
        return
    # Only known names: the folder may be that of a model, with its weights.
    if not tokenizer.is_dir():
        name = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
        folder.write(name, tokenizer.read_bytes())
        return
    for name in COPIED:
        if (tokenizer / name).is_file():
            folder.write(name, (tokenizer / name).read_bytes())


# -- tensors ----------------------------------------------------------------------------------------------------------


def _rows(checkpoint: SavedCheckpoint, model: NamedSpec, dtype: torch.dtype | None) -> list[ExportedTensor]:
    """Return the tensors to write, those of one of ours beside one another.

    Raises:
        CheckpointError: The checkpoint has not the tensors of the decoder.
    """
    stored = {
        name.removeprefix("model/"): found
        for name, found in checkpoint.metadata.state_dict_metadata.items()
        if name.startswith("model/") and isinstance(found, TensorStorageMetadata)
    }
    # Beside one another, so that each of ours is read and verified once.
    by_ours: dict[str, list[HFTensor]] = {}
    for tensor in hf_tensors(model.spec):
        by_ours.setdefault(tensor.ours, []).append(tensor)
    shapes = tensor_shapes(model.spec)
    problems = []
    for name in {**by_ours, **stored}:
        where = f"{checkpoint.where}: model/{name}"
        if name not in stored:
            problems.append(Problem(where, "is missing", _CHECKPOINT))
        elif is_adapter(name) and model.spec.config.lora is not None:
            continue  # is added to the weight of its linear
        elif name not in by_ours:
            problems.append(Problem(where, "the model has no such parameter or buffer", _CHECKPOINT))
        elif tuple(stored[name].size) != shapes[name]:
            message = f"expected shape {list(shapes[name])}, got {list(stored[name].size)}"
            problems.append(Problem(where, message, _CHECKPOINT))
        elif not stored[name].properties.dtype.is_floating_point:
            problems.append(Problem(where, f"has dtype {stored[name].properties.dtype}", _CHECKPOINT))
    if problems:
        raise CheckpointError(*shortened(problems))
    return [
        ExportedTensor(tensor, dtype or stored[name].properties.dtype, tensor.shape(shapes[name]))
        for name, tensors in by_ours.items()
        for tensor in tensors
    ]


def _most_common(rows: Sequence[ExportedTensor]) -> str:
    """Return the name of the dtype that most bytes have."""
    sizes: dict[torch.dtype, int] = {}
    for row in rows:
        sizes[row.dtype] = sizes.get(row.dtype, 0) + row.bytes
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def _shards(rows: Sequence[ExportedTensor], limit: int) -> list[list[ExportedTensor]]:
    """Return the rows of each file."""
    shards: list[list[ExportedTensor]] = []
    # As if a file were full, so that the first tensor begins one.
    size = limit
    for row in rows:
        size += row.bytes
        if size > limit:
            shards.append([])
            size = row.bytes
        shards[-1].append(row)
    return shards


def _write_shards(
    checkpoint: SavedCheckpoint, model: NamedSpec, rows: Sequence[ExportedTensor], limit: int, folder: NewFolder
) -> dict[str, int]:
    shards = _shards(rows, limit)
    # The number of files is in their names, so it is known before the first is written.
    count = len(shards)
    files = [ONE_FILE] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    tensors, sizes = ExportReader(checkpoint, model.spec.config), {}
    for file, shard in zip(files, shards, strict=True):
        header = header_of({row.hf.name: (row.dtype, row.shape) for row in shard})
        sizes[file] = len(header) + sum(row.bytes for row in shard)
        with folder.create(file) as sink:
            write_tensors(sink, header, (block for row in shard for block in tensors.blocks(row)))
    if count > 1:
        weight_map = {row.hf.name: file for file, shard in zip(files, shards, strict=True) for row in shard}
        index = {"metadata": {"total_size": sum(row.bytes for row in rows)}, "weight_map": weight_map}
        folder.write_json(INDEX, index)
    return sizes
