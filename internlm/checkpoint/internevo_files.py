"""Files of a checkpoint of InternEvo's earlier versions and of InternLM, and the names of their tensors.

Such a folder has a file for each rank of the model's layout: ``model_tp0_pp0.pt`` and so on, or ``model_wp0_pp0.pt``
where weights are split over the weight group (isp). Each holds the tensors of a stage of the pipeline, whose layers are
numbered from 0. Names differ between versions; here they are those of the newest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from internlm.checkpoint.foreign_folders import find_foreign
from internlm.checkpoint.hf_folder import shortened
from internlm.checkpoint.pickled_files import load_tensors
from internlm.checkpoint.safetensors_files import DOWNLOAD, quoted
from internlm.utils.errors import CheckpointError, Problem

MODEL_CONFIG = "model_config.pt"
CONFIG_NEEDED = "Pass --config with the config of the run"
EXPECTED = "model_tp*_pp*.pt or model_wp*_pp*.pt"
_SHARD = re.compile(r"model_(?P<split>tp|wp)(?P<rank>\d{1,5})_pp(?P<stage>\d{1,5})\.pt")
#: Wrappers of the model, and the index of a chunk where a stage has several.
_PREFIX = re.compile(r"(module\.|model\.)*((?P<chunk>\d{1,3})\.)?(module\.|model\.)*")
_LAYER = re.compile(r"(layers|blocks)\.(?P<layer>\d{1,6})\.(?P<rest>.+)")
# Buffers that follow from the config.
_COMPUTED = re.compile(r"(.+\.)?(inv_freq|rotary_emb\.scale)")
_WHOLE = {
    **dict.fromkeys(("tok_embeddings", "embedding"), "embedding"),
    **dict.fromkeys(("tok_embeddings.word_embeddings", "embedding.word_embeddings"), "embedding"),
    **dict.fromkeys(("output", "head"), "output"),
    "norm": "norm",
}
_LINEARS = {
    ("attention", "attention"): ("wqkv", "wq", "wk", "wv", "wo"),
    ("mixer", "attention"): ("wqkv", "wq", "wk", "wv", "wo"),
    ("feed_forward", "feed_forward"): ("w1", "w2", "w3"),
    ("mlp", "feed_forward"): ("w1", "w2", "w3"),
}
_RENAMED = {"wqkv": "Wqkv", "wo": "out_proj"}
#: Modules of a layer by their names in all versions.
_IN_LAYER = {
    **dict.fromkeys(("attention_norm", "norm1"), "attention_norm"),
    **dict.fromkeys(("ffn_norm", "norm2"), "ffn_norm"),
    **{
        f"{old}.{name}": f"{new}.{linear}"
        for (old, new), linears in _LINEARS.items()
        for linear in linears
        for name in (linear, _RENAMED.get(linear, linear))
    },
}


class _Name(NamedTuple):
    """Name of a tensor in a file."""

    chunk: int
    """Index of the chunk of its stage."""
    layer: int | None
    """Index of the layer in its chunk; None: the tensor is in none."""
    rest: str
    """Name in the layer, or of the whole tensor."""


class Shards(NamedTuple):
    """Tensor of a stage in the files of its ranks."""

    name: str
    """Name in the files."""
    tensors: tuple[Tensor, ...]
    """Its shards by rank; of a bias that is added to a sum over ranks, the first file may have the only one."""


@dataclass(frozen=True)
class InternEvoFiles:
    """Content of the files of a checkpoint: whole names, and tensors that are still split."""

    path: Path
    is_isp: bool
    """Whether weights are split over the weight group, whose ranks gather them before use."""
    tensors: Mapping[str, Shards]
    """Tensors by their new names, in which layers are numbered in the whole model."""
    left_behind: Sequence[str] = field(default=())
    """Names of other files of the checkpoint: optimizer state and counters."""

    @property
    def is_first_generation(self) -> bool:
        """Whether the names are those of the first generation of InternLM."""
        return any(".mixer." in shards.name for shards in self.tensors.values())


def read_files(path: Path, trust: bool) -> InternEvoFiles:
    """Open all files of a model, and join its stages; no tensor is read.

    Args:
        path: Folder of the checkpoint.
        trust: Whether files that need more than tensors are unpickled, which runs any code that they name.

    Raises:
        CheckpointError: A file is missing, damaged, or not trusted; or a name is unknown, or occurs twice.
    """
    names = _names(path)
    shards = {name: match for name in names if (match := _SHARD.fullmatch(name))}
    _check_grid(path, names, shards)
    ranks = 1 + max(int(match["rank"]) for match in shards.values())
    stages = 1 + max(int(match["stage"]) for match in shards.values())
    split = next(iter(shards.values()))["split"]
    # All files are opened first: what is wrong with one is known before anything is written.
    of_stages = []
    for stage in range(stages):
        files = [path / f"model_{split}{rank}_pp{stage}.pt" for rank in range(ranks)]
        of_stages.append(_stage({file: load_tensors(file, trust) for file in files}))
    left = [name for name in names if name not in shards and name != MODEL_CONFIG and not name.endswith(".md5")]
    return InternEvoFiles(path, split == "wp", _joined(path, of_stages), left)


def _names(path: Path) -> list[str]:
    if not path.is_dir():
        message = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(Problem(str(path), message, f"Pass a folder with {EXPECTED}"))
    return sorted(file.name for file in path.iterdir() if not file.is_dir())


def _check_grid(path: Path, names: Sequence[str], shards: Mapping[str, re.Match[str]]) -> None:
    """Check that there is a file for each rank of one layout, and no file of another one."""
    if problems := [*_other_files(path, names, shards)] or [*_missing_files(path, shards)]:
        raise CheckpointError(*shortened(problems))


def _other_files(path: Path, names: Sequence[str], shards: Collection[str]) -> Iterator[Problem]:
    for name in names:
        if name in shards or name == MODEL_CONFIG or not re.fullmatch(r"model_.*\.pt", name):
            continue
        if "expert" in name:
            yield Problem(
                str(path / name), "holds an expert, which no model here has", "Choose a model without experts"
            )
        else:
            yield Problem(str(path / name), f"is none of {EXPECTED}", "Move it elsewhere if it is a copy")
    if not shards:
        found = find_foreign(lambda folder: _names_in(path / folder))
        inner = path / found.path if found is not None and found.path else None
        todo = f"Pass the folder of a checkpoint, such as {inner}" if inner else "Pass another folder"
        yield Problem(str(path), f"holds no {EXPECTED}", todo)


def _missing_files(path: Path, shards: Mapping[str, re.Match[str]]) -> Iterator[Problem]:
    splits = {match["split"] for match in shards.values()}
    if len(splits) > 1:
        yield Problem(str(path), "holds both model_tp* and model_wp*", "Separate the two checkpoints")
        return
    ranks, stages = (1 + max(int(match[key]) for match in shards.values()) for key in ("rank", "stage"))
    if ranks * stages > 100 * len(shards):  # an absurd number, rather than a list of files
        message = f"holds {len(shards)} of the files of {ranks} ranks and {stages} stages"
        yield Problem(str(path), message, "Copy the whole checkpoint")
        return
    (split,) = splits
    for name in (f"model_{split}{rank}_pp{stage}.pt" for stage in range(stages) for rank in range(ranks)):
        if name not in shards:
            message = f"is missing, and the folder holds files of {ranks} ranks and {stages} stages"
            yield Problem(str(path / name), message, "Copy the whole checkpoint")


def _names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


# -- names of tensors -------------------------------------------------------------------------------------------------


def _parsed(name: str) -> _Name | None:
    """Return the new name of a tensor; None if no version has it."""
    prefix = _PREFIX.match(name)
    assert prefix is not None, "the pattern matches any text"
    inner = name[prefix.end() :]
    layer = _LAYER.fullmatch(inner)
    module, _, parameter = (layer["rest"] if layer else inner).rpartition(".")
    new = _IN_LAYER.get(module) if layer else _WHOLE.get(module)
    if new is None or parameter not in ("weight", "bias"):
        return None
    return _Name(int(prefix["chunk"] or 0), int(layer["layer"]) if layer else None, f"{new}.{parameter}")


def _stage(files: Mapping[Path, Mapping[str, Tensor]]) -> dict[_Name, Shards]:
    """Return the tensors of a stage, of which each file holds a shard.

    Raises:
        CheckpointError: A name is unknown, or occurs twice or in some of the files only.
    """
    found: dict[_Name, Shards] = {}
    problems = []
    for name in dict.fromkeys(name for tensors in files.values() for name in tensors):
        if _COMPUTED.fullmatch(name):
            continue
        holding = [file for file, tensors in files.items() if name in tensors]
        where, parsed = f"{holding[0]}: {quoted(name)}", _parsed(name)
        # A bias that is added to a sum over ranks is added by the first of them.
        is_of_first = name.endswith(".bias") and holding == [*files][:1]
        if parsed is None:
            problems.append(Problem(where, "is no tensor of a known model", "Convert a model of InternLM or InternEvo"))
        elif len(holding) < len(files) and not is_of_first:
            absent = next(file for file in files if file not in holding)
            problems.append(Problem(where, f"is not in {absent.name}", "Copy the whole checkpoint"))
        elif parsed in found:
            message = f"is the same tensor as {quoted(found[parsed].name)}"
            problems.append(Problem(where, message, "Remove one of them"))
        else:
            found[parsed] = Shards(name, tuple(files[file][name] for file in holding))
    if problems:
        raise CheckpointError(*shortened(problems))
    return found


def _joined(path: Path, stages: Sequence[Mapping[_Name, Shards]]) -> dict[str, Shards]:
    """Return the tensors of all stages, with their layers numbered in the whole model.

    Raises:
        CheckpointError: A stage lacks a layer, or two stages have different tensors of one name.
    """
    found: dict[str, Shards] = {}
    problems, first = [], 0
    # Chunks are runs of layers, each of which is split over all stages.
    for chunk in range(1 + max((name.chunk for tensors in stages for name in tensors), default=0)):
        for stage, tensors in enumerate(stages):
            own = {name: shards for name, shards in tensors.items() if name.chunk == chunk}
            layers = sorted({name.layer for name in own if name.layer is not None})
            # Some versions number layers in the whole model.
            start = first if layers and layers[0] == first else 0
            if layers != [*range(start, start + len(layers))]:
                message = f"has layers {', '.join(map(str, layers[:20]))}, and not consecutive ones from 0"
                problems.append(Problem(f"{path}: stage {stage}", message, DOWNLOAD))
            for name, shards in own.items():
                number = "" if name.layer is None else f"layers.{first + name.layer - start}."
                whole = number + name.rest
                # The first and the last stage may both hold a tied embedding.
                if whole in found and not _are_equal(found[whole], shards):
                    message = f"differs from {whole} of an earlier stage"
                    problems.append(Problem(f"{path}: stage {stage}: {quoted(shards.name)}", message, DOWNLOAD))
                found.setdefault(whole, shards)
            first += len(layers)
    if problems:
        raise CheckpointError(*shortened(problems))
    return found


def _are_equal(one: Shards, other: Shards) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=False)
    return len(one.tensors) == len(other.tensors) and all(same_bits(*pair) for pair in pairs)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
