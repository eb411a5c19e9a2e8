"""Hugging Face folders of architectures that transformers lacks: tensors bitwise, configs, and mistakes by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.checkpoint.hf_folder import HFFolder
from internlm.checkpoint.hf_import import import_folder
from internlm.checkpoint.hf_specs import differences, spec_of_folder
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.safetensors_files import header_of, write_tensors
from internlm.model.decoder import Decoder
from internlm.utils.errors import CheckpointError
from tests.unit.checkpoint.hf_samples import GQA, reader_of, same_bits, tensors_of, weights_of
from tests.unit.model.samples import decoder

WRITTEN = ("internlm", "internlm2", "internlm3", "baichuan")
ARCHITECTURES = dict(zip(WRITTEN, ("InternLM", "InternLM2", "InternLM3", "Baichuan"), strict=True))
MODELS = {
    "internlm": decoder("INTERNLM", torch.float32, use_dynamic_ntk_rope=True),
    "internlm2": decoder("INTERNLM2", torch.bfloat16, **GQA, qkv_bias=True, o_bias=True, rope_base=1e6),
    "internlm3": decoder("INTERNLM3", torch.float32, **GQA),
    "baichuan": decoder("BAICHUAN2", torch.float32),
}
KEYS: dict[str, dict[str, Any]] = {
    "internlm": {"bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
    "internlm2": {"bias": True, "rope_theta": 1e6, "num_key_value_heads": 2},
    "internlm3": {"bias": False, "qkv_bias": False, "rope_theta": 5e7, "num_key_value_heads": 2, "head_dim": 8},
    "baichuan": {},
}
_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w2": "mlp.down_proj",
}
_OWN = {"embedding": "model.tok_embeddings", "norm": "model.norm", "output": "output"}


def _by_heads(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Fuse projections as InternLM2 does: for each kv head its query heads, the key and the value."""
    rows = []
    per_group, width = q.shape[0] // groups, k.shape[0] // groups
    for group in range(groups):
        rows += [q[group * per_group : (group + 1) * per_group]]
        rows += [x[group * width : (group + 1) * width] for x in (k, v)]
    return torch.cat(rows)


def _theirs(model: Decoder, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a model by the names of an architecture."""
    found: dict[str, Tensor] = {}
    for name, weight in weights_of(model).items():
        module, _, parameter = name.rpartition(".")
        layer = "".join(f"model.{part}." for part in [".".join(module.split(".")[:2])] if module.startswith("layers"))
        inner = module.removeprefix(layer.removeprefix("model."))
        if inner == "attention.wqkv":
            heads = weight.shape[1] - 2
            q, k, v = (part.flatten(0, 2) for part in weight.split((heads, 1, 1), 1))
            if kind == "internlm2":
                found[f"{layer}attention.wqkv.{parameter}"] = _by_heads(q, k, v, weight.shape[0])
            elif kind == "baichuan":
                found[f"{layer}self_attn.W_pack.{parameter}"] = torch.cat((q, k, v))
            else:
                found |= {
                    f"{layer}self_attn.{key}_proj.{parameter}": x for key, x in zip("qkv", (q, k, v), strict=True)
                }
        elif inner == "feed_forward.w13":
            names = ("feed_forward.w1", "feed_forward.w3") if kind == "internlm2" else ("mlp.gate_proj", "mlp.up_proj")
            found |= {f"{layer}{new}.{parameter}": part for new, part in zip(names, weight, strict=True)}
        else:
            names = {**{key: key for key in _NAMES}, **_OWN} if kind == "internlm2" else _NAMES
            found[f"{layer}{names[inner]}.{parameter}"] = weight
    return found


def _folder(folder: Path, kind: str) -> Path:
    c = MODELS[kind].spec.config
    folder.mkdir()
    config = {
        "model_type": kind,
        "architectures": [f"{ARCHITECTURES[kind]}ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_attention_heads,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.layer_norm_epsilon,
        "max_position_embeddings": c.max_position_embeddings,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **KEYS[kind],
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: x.contiguous() for name, x in _theirs(MODELS[kind], kind).items()}
    write(folder, tensors)
    return folder


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the file of a folder."""
    with LocalStorage(folder).create("model.safetensors") as sink:
        write_tensors(sink, header_of({name: (x.dtype, x.shape) for name, x in tensors.items()}), tensors.values())


@pytest.mark.parametrize("kind", WRITTEN)
def test_releases_are_read(kind: str, tmp_path: Path) -> None:
    """As a checkpoint, and by a run, whose config is that of the folder."""
    model = MODELS[kind]
    folder = _folder(tmp_path / "hf", kind)
    section: dict[str, Any] = {}
    exec(import_folder(folder, tmp_path / "out"), section)
    assert same_bits(tensors_of(tmp_path / "out"), weights_of(model))
    opened = HFFolder(folder)
    assert not list(differences(opened.config_file, spec_of_folder(opened).spec, model.spec))
    target = torch.empty(2, 1, 3, 5, dtype=model.dtype)
    wqkv = weights_of(model)["layers.1.attention.wqkv.weight"]
    with reader_of(folder, model) as reader:
        reader.check()
        for slot in range(wqkv.shape[1]):
            reader.read_slice("layers.1.attention.wqkv.weight", (0, slot, 4, 7), target)
            assert torch.equal(target, wqkv[:2, slot : slot + 1, 4:7, 7:12])


def _config(key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), key: value}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _without(name: str) -> Any:
    def change(folder: Path) -> None:
        write(folder, {key: x for key, x in _theirs(MODELS["internlm2"], "internlm2").items() if key != name})

    return change


WQKV = "model.layers.1.attention.wqkv.weight"
MISTAKES = {
    "another head count": (_config("num_key_value_heads", 1), f"'{WQKV.replace('1.att', '0.att')}': expected 48 rows"),
    "heads as text": (_config("num_attention_heads", "4"), "num_attention_heads: expected an integer"),
    "heads that do not divide": (_config("num_key_value_heads", 3), "not divisible by 3 kv heads"),
    "missing": (_without(WQKV), f"{WQKV}[q]: is missing"),
    "no biases": (_config("bias", False), "attention.wqkv.bias[q]': the model has no such tensor"),
    "rotary of another kind": (_config("rotary", {"type": ["x"]}), "rope_type: ['x'] is not one of"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str, tmp_path: Path) -> None:
    change, message = MISTAKES[case]
    folder = _folder(tmp_path / "hf", "internlm2")
    change(folder)
    with pytest.raises(CheckpointError) as raised:
        import_folder(folder, tmp_path / "out")
    assert message in str(raised.value)
    assert all(problem.where.startswith((str(folder), "…")) for problem in raised.value.problems)


def test_alibi_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "hf", "baichuan")
    _config("max_position_embeddings", None)(folder)
    with pytest.raises(CheckpointError, match="max_position_embeddings: is missing, as in releases with ALiBi"):
        import_folder(folder, tmp_path / "out")
