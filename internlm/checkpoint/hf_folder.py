"""Hugging Face model folder: its config, and the tensors of its safetensors files. Nothing in it is trusted."""

from __future__ import annotations

import fnmatch
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from internlm.checkpoint.folder_checks import reason_of, todo_at
from internlm.checkpoint.folder_files import FolderFiles, files_of
from internlm.checkpoint.hf_names import LLAMA, NAMINGS
from internlm.checkpoint.safetensors_files import DOWNLOAD, OpenTensors, StoredTensor, quoted, read_header
from internlm.model.hf_tensors import HFTensor, hf_tensors
from internlm.model.spec import DecoderSpec
from internlm.utils.errors import CheckpointError, Problem

CONFIG, INDEX, ONE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
#: Files of a tokenizer, and of settings of generation, which are copied along.
COPIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
#: Size limits in bytes.
LARGEST_CONFIG, _LARGEST_INDEX = 1 << 20, 1 << 26
MATCH_CONFIG = "Use a model section that matches its config.json"
#: Number of problems that an error lists.
MOST_PROBLEMS = 8


class TensorFolder(Protocol):
    """Folder with the weights of a model, in a format of other software."""

    path: str
    """Path or address of the folder, for errors."""
    tensors: Mapping[str, Any]
    """Tensors by name, with a ``shape``, and a ``dtype`` named as in safetensors files."""
    head: str
    """Name of the output head."""
    todo: str
    """What to do where the tensors are not those of the model, for errors."""

    def table(self, spec: DecoderSpec) -> Iterator[HFTensor]:
        """Yield the tensors that a decoder needs."""

    def read_box(self, stored: Any, shape: Sequence[int], offsets: Sequence[int], target: Tensor) -> None:
        """Read a box of a tensor, and convert it to the dtype of ``target``.

        Args:
            stored: Tensor of this folder.
            shape: Shape that the tensor is viewed as.
            offsets: First index of the box, by axis of ``shape``.
            target: Memory to read into, of the sizes of the box.
        """

    def close(self) -> None:
        """Close the files, which the next read opens again."""


class ModelFolder(TensorFolder, Protocol):
    """Folder with the weights of a model, and its config."""

    config: dict[str, Any]
    """Config of the model with the keys of a Hugging Face ``config.json``."""
    config_file: str
    """Path of the file of the config, for errors."""


class HFFolder:
    """Folder with a ``config.json`` and safetensors files.

    Args:
        location: Path of the folder, or its address in an object store.

    Raises:
        CheckpointError: It is no such folder, a file is damaged or missing, or the index does not describe the files.
    """

    todo = MATCH_CONFIG

    def __init__(self, location: Path | str) -> None:
        self._files = files_of(location)
        self.path, self.config_file = self._files.location, self._files.path(CONFIG)
        self._opened: dict[str, OpenTensors] = {}
        self._open = ExitStack()
        self._names = self._names_of_files()
        self.config = self._config()
        index = self._index()
        # All headers are read, and no tensor: what is wrong is known before anything is written.
        files = sorted({*index.values()}) if index else [self._only_file()]
        of_files = {file: read_header(self._files, file) for file in files}
        problems = list(self._doubles(of_files))
        self.tensors: Mapping[str, Any] = {
            name: stored for tensors in of_files.values() for name, stored in tensors.items()
        }
        problems += self._contradictions(index, of_files) if index else ()
        if problems:
            raise CheckpointError(*shortened(problems))
        self._naming = NAMINGS.get(str(self.config.get("model_type")), LLAMA)
        self.head = self._naming.of("lm_head.weight")
        if self._naming.fused:
            self.tensors = self._without_fused()

    def table(self, spec: DecoderSpec) -> Iterator[HFTensor]:
        """Yield the tensors that a decoder needs."""
        for row in hf_tensors(spec):
            yield replace(row, name=self._naming.of(row.name))

    def _without_fused(self) -> dict[str, StoredTensor]:
        """Return the tensors with queries, keys and values as three instead of one."""
        try:
            parts = dict(self._naming.parts(self.tensors, self.config))
        except ValueError as error:
            name, _, message = str(error).partition(": ")
            raise CheckpointError(Problem(f"{self.path}: {name}", message, self.todo)) from None
        fused = {name.partition("[")[0] for name in parts}
        return {**{name: stored for name, stored in self.tensors.items() if name not in fused}, **parts}

    def read_box(self, stored: StoredTensor, shape: Sequence[int], offsets: Sequence[int], target: Tensor) -> None:
        """Read a box of a tensor, as :class:`TensorFolder` says."""
        # Opening a file for each box would take longer than reading it.
        if stored.file not in self._opened:
            self._opened[stored.file] = self._open.enter_context(OpenTensors(self._files, stored.file))
        self._opened[stored.file].read_box(stored, shape, offsets, target)

    def close(self) -> None:
        """Close the files, which the next read opens again."""
        self._opened.clear()
        self._open.close()

    def _names_of_files(self) -> list[str]:
        try:
            return self._files.names()
        except FileNotFoundError:
            message = "does not exist"
        except NotADirectoryError:
            message = "is a file"
        except OSError as error:
            message = f"cannot be read ({reason_of(error)})"
        todo = "Pass a folder with config.json and safetensors"
        raise CheckpointError(Problem(self.path, message, todo))

    def _config(self) -> dict[str, Any]:
        config = read_json(self._files, CONFIG, LARGEST_CONFIG)
        if config.get("quantization_config"):
            message = "quantization_config is set, and quantised weights cannot be loaded"
            raise CheckpointError(Problem(self.config_file, message, "Choose a folder with the original weights"))
        return config

    def _index(self) -> dict[str, str]:
        """Return the file of each tensor by the index; empty if there is none."""
        if INDEX not in self._names:
            return {}
        file = self._files.path(INDEX)
        files = read_json(self._files, INDEX, _LARGEST_INDEX).get("weight_map")
        if not (isinstance(files, dict) and files):
            raise CheckpointError(
                Problem(f"{file}: weight_map", f"expected an object, got {reprlib.repr(files)}", DOWNLOAD)
            )
        # The names of files are joined to the folder's path, so each must be a plain name.
        for name, target in files.items():
            if not (isinstance(target, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", target, re.ASCII)):
                message = f"expected a safetensors file of this folder, got {reprlib.repr(target)}"
                raise CheckpointError(Problem(f"{file}: {quoted(name)}", message, DOWNLOAD))
        return files

    def _only_file(self) -> str:
        if ONE_FILE in self._names:
            return ONE_FILE
        if fnmatch.filter(self._names, "pytorch_model*.bin"):
            message = f"holds pickled files (pytorch_model*.bin) and no {ONE_FILE}"
            todo = "Load it with transformers, which unpickles it, and save it with save_pretrained"
        elif files := fnmatch.filter(self._names, "*.safetensors"):
            message, todo = f"holds {', '.join(files[:3])}, but neither {INDEX} nor {ONE_FILE}", DOWNLOAD
        else:
            message, todo = f"holds neither {INDEX} nor {ONE_FILE}", "Choose another folder"
        raise CheckpointError(Problem(self.path, message, todo))

    def _contradictions(
        self, index: Mapping[str, str], of_files: Mapping[str, Mapping[str, StoredTensor]]
    ) -> Iterator[Problem]:
        for name, file in index.items():
            if name not in of_files[file]:
                yield Problem(
                    f"{self._files.path(file)}: {quoted(name)}", f"is missing, but {INDEX} names it", DOWNLOAD
                )
        for file, tensors in of_files.items():
            for name in tensors.keys() - index.keys():
                yield Problem(f"{self._files.path(file)}: {quoted(name)}", f"is not listed in {INDEX}", DOWNLOAD)

    def _doubles(self, of_files: Mapping[str, Mapping[str, StoredTensor]]) -> Iterator[Problem]:
        seen: dict[str, str] = {}
        for file, tensors in of_files.items():
            for name in tensors:
                if name in seen:
                    yield Problem(f"{self._files.path(file)}: {quoted(name)}", f"is in {seen[name]} too", DOWNLOAD)
                seen.setdefault(name, file)


def shortened(problems: list[Problem]) -> list[Problem]:
    """Return the first problems, and one that counts the others: of another model, every tensor differs."""
    if len(problems) <= MOST_PROBLEMS:
        return problems
    rest = len(problems) - MOST_PROBLEMS
    return [*problems[:MOST_PROBLEMS], Problem("…", f"and {rest} more", "Correct the first ones")]


def read_json(files: FolderFiles, name: str, limit: int) -> dict[str, Any]:
    """Read a bounded JSON object.

    Raises:
        CheckpointError: The file is missing, too large, or holds something else.
    """
    path = files.path(name)
    try:
        source = files.open(name)
        try:
            if source.size > limit:
                raise ValueError(f"larger than {limit} bytes")
            content = bytearray(source.size)
            source.read_into(0, memoryview(content))
        finally:
            source.close()
        found = json.loads(content.decode())
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {reprlib.repr(found)}")
    except FileNotFoundError:
        raise CheckpointError(Problem(path, "is missing", "Choose another folder")) from None
    except OSError as error:
        todo = todo_at(path, error.errno, DOWNLOAD)
        raise CheckpointError(Problem(path, f"cannot be read ({reason_of(error)})", todo)) from None
    except (ValueError, RecursionError) as error:
        message = f"is not readable JSON ({error or 'nested too deeply'})"
        raise CheckpointError(Problem(path, message, DOWNLOAD)) from None
    return found
