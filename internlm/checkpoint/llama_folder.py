"""Folder of Meta's releases of Llama: ``params.json``, and the shards of a tensor-parallel model in pickled files.

The files are loaded by torch's restricted unpickler, which calls nothing that they name, and are mapped into memory.
"""

from __future__ import annotations

import re
import reprlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.hf_folder import LARGEST_CONFIG, read_json, shortened
from internlm.checkpoint.safetensors_files import DOWNLOAD, DTYPES, quoted, runs_of_box
from internlm.model.hf_tensors import llama_tensors
from internlm.utils.errors import CheckpointError, Problem

PARAMS = "params.json"
#: Size limit of the pickle in a file, which lists its tensors, in bytes.
_LARGEST_PICKLE = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Axis that the files split, by the module of a tensor; others are whole in each file.
_AXES = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


@dataclass(frozen=True)
class ShardedTensor:
    """Tensor of several files."""

    dtype: str
    """Name of the dtype in safetensors files, or torch's for others."""
    shape: tuple[int, ...]
    shards: tuple[Tensor, ...]
    axis: int


class LlamaFolder:
    """Folder with ``params.json`` and ``consolidated.00.pth``, ``consolidated.01.pth`` and so on.

    Args:
        path: The folder.

    Raises:
        CheckpointError: It is no such folder, a file is damaged, or the files do not fit one another.
    """

    head = "output.weight"
    table = staticmethod(llama_tensors)

    def __init__(self, path: Path) -> None:
        self.path, self.config_file = path, path / PARAMS
        if not path.is_dir():
            message = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(Problem(str(path), message, f"Pass a folder with {PARAMS} and consolidated.*.pth"))
        params = read_json(self.config_file, LARGEST_CONFIG)
        # Exact names: what lies beside them, such as a copy, is no shard.
        files = sorted(file for file in path.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", file.name))
        expected = [f"consolidated.{index:02}.pth" for index in range(len(files))]
        if not files or [file.name for file in files] != expected:
            found = ", ".join(file.name for file in files) or "none"
            raise CheckpointError(Problem(str(path), f"expected consolidated.00.pth and so on, got {found}", DOWNLOAD))
        loaded = [_load(file) for file in files]
        self.tensors: Mapping[str, Any] = dict(self._joined(files, loaded, params))
        self.config = self._config(params)

    def _joined(
        self, files: Sequence[Path], loaded: Sequence[dict[str, Tensor]], params: Mapping[str, Any]
    ) -> Iterator[tuple[str, ShardedTensor]]:
        # Each file is a rank of a tensor-parallel model, so all have the same tensors.
        problems = [
            Problem(f"{file}: {quoted(name)}", f"is not in every one of the {len(files)} files", DOWNLOAD)
            for file, tensors in zip(files, loaded, strict=True)
            for name in tensors
            if any(name not in others for others in loaded)
        ]
        if problems:
            raise CheckpointError(*shortened(problems))
        for name, first in loaded[0].items():
            axis = self._axis(name, first, params)
            shards = tuple(tensors[name] for tensors in loaded) if axis is not None else (first,)
            if any((shard.shape, shard.dtype) != (first.shape, first.dtype) for shard in shards):
                message = f"has shapes {', '.join(str(list(shard.shape)) for shard in shards)} in the files"
                raise CheckpointError(Problem(f"{self.path}: {quoted(name)}", message, DOWNLOAD))
            shape = list(first.shape)
            if axis is not None:
                shape[axis] *= len(shards)
            dtype = _NAMES.get(first.dtype, str(first.dtype))
            yield name, ShardedTensor(dtype, tuple(shape), shards, axis or 0)

    @staticmethod
    def _axis(name: str, first: Tensor, params: Mapping[str, Any]) -> int | None:
        module = name.removesuffix(".weight").rpartition(".")[2]
        # Norms and the table of rotary frequencies are whole in each file.
        if first.dim() != 2:
            return None
        # Llama 3 splits the embedding by vocabulary entries, older releases split it over the hidden dimension.
        return int(first.shape[1] != params.get("dim")) if module == "tok_embeddings" else _AXES.get(module)

    def _config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the params with the keys of a Hugging Face config; sizes that they leave out are those of tensors."""
        # Older releases leave it to the tokenizer, as -1.
        vocabulary = self._size("tok_embeddings.weight")
        if params.get("vocab_size") not in (None, -1, vocabulary):
            message = (
                f"vocab_size: expected {vocabulary}, as the embedding has, got {reprlib.repr(params['vocab_size'])}"
            )
            raise CheckpointError(Problem(str(self.config_file), message, DOWNLOAD))
        config = {
            "model_type": "llama",
            "hidden_size": params.get("dim"),
            "num_hidden_layers": params.get("n_layers"),
            "num_attention_heads": params.get("n_heads"),
            "num_key_value_heads": params.get("n_kv_heads"),
            "rms_norm_eps": params.get("norm_eps"),
            "rope_theta": params.get("rope_theta", 10000.0),
            "vocab_size": vocabulary,
            "intermediate_size": self._size("layers.0.feed_forward.w1.weight"),
            "tie_word_embeddings": self.head not in self.tensors,
        }
        if params.get("use_scaled_rope"):
            # The releases of Llama 3.1 name no values but the factor of some (arXiv 2407.21783).
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": params.get("rope_scaling_factor", 8.0),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        return config

    def _size(self, name: str) -> int:
        stored = self.tensors.get(name)
        if stored is None or len(stored.shape) != 2:
            raise CheckpointError(Problem(f"{self.path}: {name}", "is missing, or is no matrix", DOWNLOAD))
        return stored.shape[0]

    def read_box(self, stored: ShardedTensor, shape: Sequence[int], offsets: Sequence[int], target: Tensor) -> None:
        """Read a box of a tensor, as :class:`~internlm.checkpoint.hf_folder.TensorFolder` says."""
        # Small, since boxes are; the mapped files themselves count as the cache of the system.
        box, filled = torch.empty(target.shape, dtype=stored.shards[0].dtype), 0
        flat = box.view(-1)
        for first, count in runs_of_box(shape, offsets, target.shape):
            flat[filled : filled + count] = _range(stored, first, count)
            filled += count
        target.copy_(box)

    def close(self) -> None:
        """Do nothing: the files stay mapped as long as the tensors are referred to."""


def _range(stored: ShardedTensor, first: int, count: int) -> Tensor:
    """Return ``count`` elements of the flattened tensor from ``first`` on."""
    columns = stored.shape[-1]
    if len(stored.shards) == 1:
        return stored.shards[0].reshape(-1)[first : first + count]
    if stored.axis == 0:
        size = stored.shards[0].numel()
        pieces = []
        for index, shard in enumerate(stored.shards):
            start, stop = max(first - index * size, 0), min(first + count - index * size, size)
            if start < stop:
                pieces.append(shard.reshape(-1)[start:stop])
        return torch.cat(pieces)
    # Whole rows of all files, of which the columns beside one another are taken.
    top, bottom = first // columns, -(-(first + count) // columns)
    rows = torch.cat([shard[top:bottom] for shard in stored.shards], dim=1)
    return rows.reshape(-1)[first - top * columns :][:count]


def _load(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped into memory.

    Raises:
        CheckpointError: It is no archive of tensors as ``torch.save`` writes it.
    """
    try:
        # First: the unpickler itself has no bounds.
        _check_archive(file)
        # Storages stay on the host, wherever they were saved from.
        content = torch.load(file, map_location=lambda storage, _: storage, weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError(f"expected a dict of tensors, got {type(content).__name__}")
        for name, tensor in content.items():
            if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided):
                raise ValueError(f"expected a tensor as {reprlib.repr(name)}, got {type(tensor).__name__}")
            # A view with strides of 0 could have any shape.
            if not tensor.is_contiguous() or tensor.nbytes > file.stat().st_size:
                raise ValueError(f"{quoted(name)} is not stored as a whole")
    except Exception as error:  # unpickling what is not trusted raises nearly anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(Problem(str(file), f"cannot be loaded ({reason[0][:300]})", DOWNLOAD)) from None
    return content


def _check_archive(file: Path) -> None:
    """Check that nothing in an archive is compressed, which could be of any size, and that its pickle is small."""
    if not file.is_file():
        raise ValueError("expected a regular file")
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            is_pickle = entry.filename.endswith(".pkl")
            if entry.compress_type != zipfile.ZIP_STORED or (is_pickle and entry.file_size > _LARGEST_PICKLE):
                raise ValueError(f"{quoted(entry.filename)} is compressed or too large")
