"""Checkpoints and Hugging Face folders of small decoders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internlm.checkpoint.hf_export import Export, export
from internlm.checkpoint.hf_folder import HFFolder
from internlm.checkpoint.hf_reader import HFReader
from internlm.checkpoint.hf_specs import spec_of_config
from internlm.checkpoint.locations import open_storage
from internlm.checkpoint.logical_tensors import LogicalTensor, model_tensors
from internlm.checkpoint.saved_checkpoint import SavedCheckpoint, open_checkpoint
from internlm.model.decoder import Decoder
from tests.unit.checkpoint.samples import rewrite_state, run_state, save
from tests.unit.model.samples import decoder

GQA: dict[str, Any] = {"num_kv_attention_heads": 2}


def checkpoint_of(model: Decoder, family: str, target: Path) -> Path:
    """Save ``model`` as a run of ``family`` would."""
    target.parent.mkdir(exist_ok=True)
    save(target, model_tensors(model))
    config = {"model_type": family, "model": model.spec.config.model_dump(mode="json"), "data": {}}
    rewrite_state(target, json.dumps({**run_state(), "format": 2, "config": config}).encode())
    return target


def opened(path: Path) -> SavedCheckpoint:
    """Open a checkpoint."""
    return open_checkpoint(open_storage(str(path.parent)), path.name)


def exported(model: Decoder, family: str, folder: Path, **settings: Any) -> Path:
    """Write ``model`` as a Hugging Face folder, by way of a checkpoint."""
    return converted(checkpoint_of(model, family, folder / "step-3"), folder / "hf", **settings)


def converted(path: Path, target: Path, **settings: Any) -> Path:
    """Write a checkpoint as a Hugging Face folder."""
    checkpoint = opened(path)
    export(checkpoint, spec_of_config(checkpoint.state.config, "here"), target, Export(**settings))
    return target


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Read all tensors of the model in a checkpoint."""
    checkpoint = opened(path)
    stored = {name: x for name, x in checkpoint.metadata.state_dict_metadata.items() if name.startswith("model/")}
    whole = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in stored.items()}
    checkpoint.read({name: LogicalTensor.whole(x) for name, x in whole.items()})
    return {name.removeprefix("model/"): x for name, x in whole.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether names, dtypes and bits are equal."""
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and torch.equal(x.view(torch.uint8), other[name].view(torch.uint8))
        for name, x in one.items()
    )


def reader_of(folder: Path, model: Decoder) -> HFReader:
    """Return a reader of a folder for ``model``."""
    return HFReader(HFFolder(folder), model.spec)


def tiny_folder(folder: Path) -> Path:
    """Write a Hugging Face folder of a Llama with several files."""
    model = decoder("LLAMA2", torch.float32, **GQA)
    return exported(model, "LLAMA2", folder, shard_bytes=16000)


def rewrite_header(file: Path, change: Any) -> None:
    """Replace the header of a safetensors file by what ``change`` makes of it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def bytes_of(tensor: dict[str, Any]) -> int:
    """Return the size of a tensor by its header."""
    return math.prod(tensor["shape"]) * 4


def llama_release(model: Decoder, folder: Path, files: int = 1, splits_hidden: bool = True, **params: Any) -> Path:
    """Write ``model``, which pairs neighbouring elements, as Meta's releases have it, split over ``files``."""
    c = model.spec.config
    assert model.spec.qk_interleaved
    heads = c.num_attention_heads // c.kv_heads
    whole: dict[str, tuple[Tensor, int | None]] = {"rope.freqs": (torch.ones(c.head_size // 2), None)}
    for name, weight in weights_of(model).items():
        if name.endswith("wqkv.weight"):
            for key, part in zip("qkv", weight.split([heads, 1, 1], dim=1), strict=True):
                whole[name.replace("wqkv", f"w{key}")] = (part.flatten(0, -2), 0)
        elif name.endswith("w13.weight"):
            whole[name.replace("w13", "w1")], whole[name.replace("w13", "w3")] = ((part, 0) for part in weight)
        elif name == "embedding.weight":
            whole["tok_embeddings.weight"] = (weight, int(splits_hidden))
        else:
            whole[name] = (weight, {"wo": 1, "w2": 1, "output": 0}.get(name.split(".")[-2]))
    for index in range(files):
        shards = {
            name: (tensor if axis is None else tensor.chunk(files, axis)[index]).clone().contiguous()
            for name, (tensor, axis) in whole.items()
        }
        torch.save(shards, folder / f"consolidated.{index:02}.pth")
    sizes = dict(dim=c.hidden_size, n_layers=c.num_layers, n_heads=c.num_attention_heads, n_kv_heads=c.kv_heads)
    content = {**sizes, "vocab_size": -1, "norm_eps": c.layer_norm_epsilon, "multiple_of": 256, **params}
    (folder / "params.json").write_text(json.dumps(content))
    return folder
