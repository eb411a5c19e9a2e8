"""Runs that start from a Hugging Face folder, in any layout, and that write their last checkpoint as one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from internlm.checkpoint.hf_import import import_folder
from internlm.model.decoder import Decoder
from internlm.model.hf_tensors import hf_tensors
from tests.dist.tiny import TINY
from tests.dist.whole_runs import Outcome, fit, resume, saving
from tests.unit.checkpoint.hf_samples import exported, llama_release, tensors_of, weights_of
from tests.unit.model.samples import decoder

#: A vocabulary that no size divides, so that ranks hold rows of padding.
KEYS: dict[str, Any] = {**TINY["model"], "vocab_size": 67, "qk_interleaved": True}
FSDP = ("parallel.zero1.fsdp=True", "model.dtype=torch.bfloat16")
ISP = ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2")
PIPELINE = ("parallel.pipeline.size=2", "data.micro_num=2")
LAYOUTS: list[Any] = [
    (1, False, ()),
    (2, False, ("parallel.tensor.size=2", "parallel.tensor.mode=mtp")),
    (2, True, ISP),
    *(
        pytest.param(*row, marks=pytest.mark.wide)
        for row in (
            (2, True, PIPELINE),
            (2, False, ("parallel.tensor.size=2", "parallel.tensor.mode=msp", "model.embed_split_hidden=False")),
            (2, False, FSDP),
            (3, True, ("parallel.zero1.size=3", "model.dtype=torch.bfloat16")),
            (4, False, (*ISP, *PIPELINE)),
        )
    ),
]


def _model(tied: bool) -> Decoder:
    keys = {key: value for key, value in KEYS.items() if key != "dtype"}
    return decoder("INTERNLM2", torch.float64, **keys, tie_word_embeddings=tied)


def _load(folder: Path, *more: str) -> list[str]:
    load = [f"ckpt.load_ckpt_info.path={folder}", "ckpt.load_ckpt_info.content=('model',)"]
    return [*load, "ckpt.load_ckpt_info.ckpt_type=hf", "model.vocab_size=67", "model.qk_interleaved=True", *more]


def _assert_loaded(run: Outcome, model: Decoder) -> None:
    """Assert that a run has the parameters of ``model``, and that the next update starts from them."""
    loaded = {name.removeprefix("model/"): x for name, x in run.tensors.items() if name.startswith("model/")}
    expected = weights_of(model)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        if (main := run.tensors.get(f"optimizer/main/{name}")) is not None:
            assert torch.equal(main.to(tensor.dtype), tensor), name


@pytest.mark.parametrize(("ranks", "tied", "layout"), LAYOUTS)
def test_every_layout_loads_the_same_model(ranks: int, tied: bool, layout: tuple[str, ...], tmp_path: Path) -> None:
    model = _model(tied)
    folder = exported(model, "INTERNLM2", tmp_path, shard_bytes=20000)
    run = resume(ranks, _load(folder, f"model.tie_word_embeddings={tied}", *layout))
    assert run.message == f"nothing to resume; loaded model from {folder} (a model of type llama in the format hf)"
    _assert_loaded(run, model)


def test_an_imported_checkpoint_is_loaded_like_any_other(tmp_path: Path) -> None:
    """In another layout and dtype, with the printed sections as config."""
    keys = {**{key: value for key, value in KEYS.items() if key != "dtype"}, "qk_interleaved": False}
    model = decoder("LLAMA2", torch.float64, **keys)
    sections: dict[str, Any] = {}
    exec(import_folder(exported(model, "LLAMA2", tmp_path), tmp_path / "imported"), sections)
    overrides = [f"model.{key}={value}" for key, value in sections["model"].items() if value is not None]
    info = sections["ckpt"]["load_ckpt_info"]
    overrides += [f"ckpt.load_ckpt_info.{key}={value}" for key, value in info.items()]
    run = resume(2, [f"model_type={sections['model_type']}", *overrides, *ISP, "model.dtype=torch.bfloat16"])
    assert run.message == f"nothing to resume; loaded model from {tmp_path / 'imported'}"
    _assert_loaded(run, model)


@pytest.mark.parametrize("layout", [ISP, pytest.param(PIPELINE, marks=pytest.mark.wide)])
def test_a_release_of_meta_is_loaded_with_new_adapters(layout: tuple[str, ...], tmp_path: Path) -> None:
    """Adapters, which no folder has, keep the values that they begin with."""
    keys = {**{key: value for key, value in KEYS.items() if key != "dtype"}, "vocab_size": 66}
    model = decoder("LLAMA2", torch.float64, **keys)
    folder = llama_release(model, tmp_path, files=2)
    more = ("model.vocab_size=66", "model.lora.rank=2", "ckpt.load_ckpt_info.ckpt_type=llama")
    run = resume(2, _load(folder, *more, *layout))
    assert run.message == f"nothing to resume; loaded model from {folder} (a model of type llama in the format llama)"
    for name, weight in weights_of(model).items():
        assert torch.equal(run.tensors[f"model/{name}"], weight), name
    adapters = [tensor for name, tensor in run.tensors.items() if name.startswith("model/") and ".lora_a." in name]
    assert adapters
    assert all(tensor.any() for tensor in adapters)


def test_a_model_that_differs_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Every difference is named; those that leave the tensors as they are can be allowed."""
    folder = exported(_model(False), "INTERNLM2", tmp_path)
    changed = ("model.num_kv_attention_heads=4", "model.rope_base=500.0", "model.layer_norm_epsilon=1e-4")
    run = resume(2, _load(folder, *changed, "parallel.tensor.size=2"))
    lines = run.message.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *(
            "model.num_kv_attention_heads",
            "model.layer_norm_epsilon",
            "model.rope_base, rope_scaling or their neighbours",
        ),
    ]
    assert lines[0] == (f"model.num_kv_attention_heads: 4, but {folder}/config.json has 2. Use the value of the folder")
    weights = weights_of(_model(False))
    assert not any(torch.equal(run.tensors[f"model/{name}"], weight) for name, weight in weights.items())
    allowed = resume(1, _load(folder, *changed[1:], "ckpt.allow_model_changes=True"))
    assert torch.equal(allowed.tensors["model/norm.weight"], weights["norm.weight"])


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    """On all ranks, though each of the two holds a part of the layers, and one of them has the missing tensor."""
    folder = exported(_model(False), "INTERNLM2", tmp_path, shard_bytes=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run = resume(2, _load(folder, *PIPELINE))
    assert run.message == (
        f"{folder}: model.layers.1.mlp.up_proj.weight: is missing. Use a model section that matches its config.json"
    )


def _folders(path: Path) -> list[str]:
    return sorted(path.name for path in (path / "ckpts").iterdir() if path.is_dir())


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_the_last_checkpoint_is_a_hugging_face_folder_too(background: bool, tmp_path: Path) -> None:
    """Transformers loads it; and a run that starts from it has its parameters."""
    keys = ("model_type=INTERNLM", "model.vocab_size=67", "ckpt.enable_internevo2hf_ckpt=True")
    more = ("parallel.tensor.size=2", f"ckpt.async_upload={background}")
    overrides = saving(tmp_path, *keys, *more, every=1, total=2)
    run = fit(2, overrides)
    assert run.log[-1][0] == 1
    assert _folders(tmp_path) == ["step-1", "step-2", "step-2-hf"]
    # As a process leaves them that is killed while it exports, and where an earlier run had the same step.
    exported = tmp_path / "ckpts" / "step-2-hf"
    (tmp_path / "ckpts" / ".step-2-hf.partial-0a1b2c3d").mkdir()
    (exported / "model.safetensors").write_bytes(b"")
    os.utime(exported / "config.json", (0, 0))
    assert "resumed from" in resume(2, overrides).message
    assert _folders(tmp_path) == ["step-1", "step-2", "step-2-hf"]
    ours = tensors_of(tmp_path / "ckpts" / "step-2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpts" / "step-2-hf", dtype="auto").state_dict()
    spec = decoder(
        "INTERNLM", torch.float64, **{**{k: v for k, v in KEYS.items() if k != "dtype"}, "qk_interleaved": False}
    ).spec
    for row in hf_tensors(spec):
        assert torch.equal(theirs[row.name], row.of(ours[row.ours])), row.name


def test_a_model_that_no_format_has_is_refused_before_training(tmp_path: Path) -> None:
    run = resume(1, saving(tmp_path, "ckpt.enable_internevo2hf_ckpt=True", "model.norm_type=layernorm"))
    assert run.message.startswith("model.norm_type: 'layernorm' cannot be expressed by LlamaForCausalLM")
