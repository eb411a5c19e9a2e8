"""Checkpoints as InternEvo's earlier versions and InternLM wrote them, from small decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.core.context import parallel_context
from internlm.model.decoder import Decoder
from tests.unit.checkpoint.hf_samples import weights_of

_OLD = {"attention.wo": "mixer.out_proj", "attention_norm": "norm1", "ffn_norm": "norm2", "feed_forward": "mlp"}


def _by_heads(heads: int, *qkv: Tensor) -> Tensor:
    """Fuse rows by kv head."""
    return torch.cat([x.unflatten(0, (heads, -1)) for x in qkv], 1).flatten(0, 1)


def internevo_folder(
    model: Decoder,
    folder: Path,
    ranks: int = 1,
    stages: int = 1,
    chunks: int = 1,
    *,
    qkv: str = "by heads",
    isp: bool = False,
    splits_hidden: bool = True,
    old: bool = False,
    **config: Any,
) -> Path:
    """Write the files of ``model`` for a layout.

    Args:
        model: The model.
        folder: Folder to write.
        ranks: Size of tensor parallelism, or with ``isp`` of the weight group.
        stages: Size of pipeline parallelism.
        chunks: Chunks of each stage.
        qkv: How queries, keys and values are stored: ``by heads``, ``stacked`` or ``apart``.
        isp: Whether weights are split over the weight group.
        splits_hidden: Whether the embedding is split over the hidden dimension.
        old: Whether names are those of the first generation.
        config: Keys of the saved model section.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = iter(torch.arange(model.spec.config.num_layers).chunk(stages * chunks))
    of_chunks = [[next(layers).tolist() for _ in range(stages)] for _ in range(chunks)]
    for stage in range(stages):
        for rank in range(ranks):
            state: dict[str, Tensor] = {}
            for chunk in range(chunks):
                own = _chunk(model, of_chunks[chunk][stage], rank, ranks, qkv, isp, splits_hidden)
                if chunk or stage:
                    own = {name: x for name, x in own.items() if "embed" not in name}
                if (chunk, stage) != (chunks - 1, stages - 1):
                    own = {name: x for name, x in own.items() if name not in ("norm.weight", "output.weight")}
                prefix = "model." if chunks == 1 else f"{chunk}."
                state |= {prefix + (_old_name(name) if old else name): x.clone() for name, x in own.items()}
            torch.save(state, folder / f"model_{'wp' if isp else 'tp'}{rank}_pp{stage}.pt")
    c = model.spec.config
    sizes = dict(num_layers=c.num_layers, hidden_size=c.hidden_size, num_attention_heads=c.num_attention_heads)
    save_config(folder, {**sizes, "vocab_size": c.vocab_size, "dtype": torch.float32, **config})
    return folder


def _chunk(
    model: Decoder, layers: list[int], rank: int, ranks: int, qkv: str, isp: bool, splits_hidden: bool
) -> dict[str, Tensor]:
    """Return the tensors of a run of layers on a rank, and those that are in no layer."""
    weights = weights_of(model)
    found: dict[str, tuple[Tensor, int | None]] = {
        "tok_embeddings.weight": (weights["embedding.weight"], int(splits_hidden)),
        "norm.weight": (weights["norm.weight"], None),
        "output.weight": (weights["output.weight"], 0),
    }
    for local, layer in enumerate(layers):
        for name, weight in weights.items():
            module = name.removeprefix(f"layers.{layer}.")
            if module == name:
                continue
            here = f"layers.{local}.{module}"
            if ".wqkv." in name:
                queries = weight.shape[1] - 2
                parts = [part.flatten(0, 2) for part in weight.split((queries, 1, 1), 1)]
                found |= _fused(here, parts, weight.shape[0], qkv, ranks, isp)
            elif ".w13." in name:
                found[here.replace("w13", "w1")], found[here.replace("w13", "w3")] = (weight[0], 0), (weight[1], 0)
            elif ".wo." in name or ".w2." in name:
                found[here] = (weight, 1 if name.endswith("weight") else None)
            else:
                found[here] = (weight, None)
    shards = {}
    for name, (weight, axis) in found.items():
        if isp and axis is not None:
            axis = 0
        # A bias that is added to a sum of ranks is that of the first one.
        if axis is None and name.endswith(".bias") and not isp and rank:
            continue
        shards[name] = weight if axis is None else weight.chunk(ranks, axis)[rank]
    return shards


def _fused(
    name: str, parts: list[Tensor], heads: int, qkv: str, ranks: int, isp: bool
) -> dict[str, tuple[Tensor, int | None]]:
    if qkv == "apart":
        return {name.replace("wqkv", f"w{key}"): (part, 0) for key, part in zip("qkv", parts, strict=True)}
    if qkv == "by heads":
        return {name: (_by_heads(heads, *parts), 0)}
    # Each rank of tensor parallelism stacks what it has; under isp, ranks have parts of the whole stack.
    rows = [parts] if isp else [[part.chunk(ranks)[rank] for part in parts] for rank in range(ranks)]
    return {name: (torch.cat([torch.cat(own) for own in rows]), 0)}


def _old_name(name: str) -> str:
    """Return the name in the first generation, whose w2 and w3 have each other's place."""
    name = name.replace("tok_embeddings", "embedding.word_embeddings").replace("output", "head")
    name = name.replace("layers.", "blocks.").replace("attention.wqkv", "mixer.Wqkv")
    name = name.replace(".w2.", ".w*.").replace(".w3.", ".w2.").replace(".w*.", ".w3.")
    for new, old in _OLD.items():
        name = name.replace(new, old)
    return name


def save_config(folder: Path, section: dict[str, Any]) -> None:
    """Save a model section as an object of InternEvo's class, which is not there when it is loaded."""
    saved_class = type("Config", (dict,), {"__module__": parallel_context.__name__})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_context, "Config", saved_class, raising=False)
        torch.save(saved_class(section), folder / "model_config.pt")
