"""Folder of Meta's releases of Llama: ``params.json``, and the shards of a tensor-parallel model in pickled files.

The files are loaded by torch's restricted unpickler, which calls nothing that they name, and are mapped into memory.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from internlm.checkpoint.folder_files import LocalFolder
from internlm.checkpoint.hf_folder import LARGEST_CONFIG, read_json, shortened
from internlm.checkpoint.pickled_files import load_tensors
from internlm.checkpoint.safetensors_files import DOWNLOAD, quoted
from internlm.checkpoint.sharded_tensors import ShardedTensor
from internlm.config.schema.fields import is_remote
from internlm.model.hf_tensors import llama_tensors
from internlm.utils.errors import CheckpointError, Problem

PARAMS = "params.json"
#: Axis that the files split, by the module of a tensor; others are whole in each file.
_AXES = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


class LlamaFolder:
    """Folder with ``params.json`` and ``consolidated.00.pth``, ``consolidated.01.pth`` and so on.

    Args:
        path: The folder.

    Raises:
        CheckpointError: It is no such folder, a file is damaged, or the files do not fit one another.
    """

    head, todo = "output.weight", f"Use a model section that matches its {PARAMS}"
    table = staticmethod(llama_tensors)

    def __init__(self, path: Path | str) -> None:
        if isinstance(path, str) and is_remote(path):
            message = "is in an object store, where releases of Meta cannot be read"
            raise CheckpointError(Problem(path, message, "Copy the folder to a file system"))
        path = Path(path)
        files = LocalFolder(path)
        self.path, self.config_file = str(path), files.path(PARAMS)
        if not path.is_dir():
            message = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(Problem(str(path), message, f"Pass a folder with {PARAMS} and consolidated.*.pth"))
        params = read_json(files, PARAMS, LARGEST_CONFIG)
        # Exact names: what lies beside them, such as a copy, is no shard.
        shards = sorted(file for file in path.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", file.name))
        expected = [f"consolidated.{index:02}.pth" for index in range(len(shards))]
        if not shards or [file.name for file in shards] != expected:
            found = ", ".join(file.name for file in shards) or "none"
            raise CheckpointError(Problem(str(path), f"expected consolidated.00.pth and so on, got {found}", DOWNLOAD))
        loaded = [load_tensors(file) for file in shards]
        self.tensors: Mapping[str, Any] = dict(self._joined(shards, loaded, params))
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
            yield name, ShardedTensor(tuple(shape), shards, axis or 0)

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
            raise CheckpointError(Problem(self.config_file, message, DOWNLOAD))
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
        stored.read_box(shape, offsets, target)

    def close(self) -> None:
        """Do nothing: the files stay mapped as long as the tensors are referred to."""
