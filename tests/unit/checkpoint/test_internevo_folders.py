"""Checkpoints of InternEvo's earlier versions: bitwise the same model from any layout and naming; broken ones."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from internlm.checkpoint.hf_reader import HFReader
from internlm.checkpoint.internevo_config import is_stacked
from internlm.checkpoint.internevo_files import read_files
from internlm.checkpoint.internevo_folder import InternEvoFolder
from internlm.cli.main import main
from tests.unit.checkpoint.hf_samples import opened, same_bits, tensors_of, weights_of
from tests.unit.checkpoint.internevo_samples import internevo_folder, save_config
from tests.unit.checkpoint.samples import Evil
from tests.unit.model.samples import decoder

SIZES: dict[str, Any] = {"vocab_size": 64, "num_layers": 4, "mlp_ratio": 2.5}
KV: dict[str, Any] = {"num_kv_attention_heads": 4, "num_attention_heads": 8, "head_dim": 8}
MODELS = {
    "INTERNLM": decoder("INTERNLM", torch.float32, **SIZES),
    "INTERNLM2": decoder("INTERNLM2", torch.float32, **SIZES, **KV),
    "LLAMA2": decoder("LLAMA2", torch.bfloat16, **SIZES, **KV),
    "QWEN2": decoder("QWEN2", torch.float32, **SIZES, **KV),
    "BAICHUAN2": decoder("BAICHUAN2", torch.float32, **SIZES),
}
LAYOUTS = [(ranks, stages) for ranks in (1, 2, 4) for stages in (1, 2)]


def _keys(name: str) -> dict[str, Any]:
    """Return the keys that the saved section has, beside the sizes."""
    return {"mlp_ratio": 2.5, "multiple_of": 16, **(KV if MODELS[name].spec.config.num_attention_heads == 8 else {})}


def _convert(folder: Path, *more: str) -> Path:
    out = folder.parent / "out"
    assert main(["convert", "from-internevo", str(folder), str(out), *more]) is None
    return out


def _check(name: str, folder: Path, *more: str) -> None:
    assert same_bits(tensors_of(_convert(folder, *more)), weights_of(MODELS[name]))


@pytest.mark.parametrize(("ranks", "stages"), LAYOUTS)
@pytest.mark.parametrize("qkv", ["by heads", "apart"])
def test_second_generation(
    ranks: int, stages: int, qkv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one fused projection, or three; the section that is printed builds the model."""
    model = MODELS["INTERNLM2"]
    splits_hidden = stages == 1
    folder = internevo_folder(
        model, tmp_path / "100", ranks, stages, qkv=qkv, splits_hidden=splits_hidden, **_keys("INTERNLM2")
    )
    for name in ("optimizer_tp0_pp0_zo0.pt", "context.pt", "schedulder.pt"):
        torch.save({}, folder / name)
    _check("INTERNLM2", folder, *(["--model-type", "INTERNLM2"] if qkv == "apart" else []))
    output = capsys.readouterr()
    assert "left behind, with the optimizer state and the position in the data: context.pt, optim" in output.err
    section: dict[str, Any] = {}
    exec(output.out, section)
    keys = {key: value for key, value in section["model"].items() if key != "dtype"}
    assert section["model_type"] == "INTERNLM2"
    again = decoder("INTERNLM2", **keys).spec.config
    assert again.intermediate_size == model.spec.config.intermediate_size
    assert (again.kv_heads, again.head_size, again.vocab_size) == (4, 8, 64)
    assert opened(tmp_path / "out").state.config["model_type"] == "INTERNLM2"
    assert not main(["ckpt", "verify", str(tmp_path / "out")])


@pytest.mark.parametrize(("ranks", "stages"), LAYOUTS)
def test_first_generation(ranks: int, stages: int, tmp_path: Path) -> None:
    """Queries of all heads before keys and values, other names, w3 as the down projection, biases of one rank."""
    folder = internevo_folder(MODELS["INTERNLM"], tmp_path / "1", ranks, stages, qkv="stacked", old=True)
    _check("INTERNLM", folder)


OTHERS = {
    "separate, of two chunks": ("LLAMA2", dict(ranks=2, stages=2, chunks=2, qkv="apart")),
    "biases of queries": ("QWEN2", dict(ranks=2, qkv="apart")),
    "stacked": ("BAICHUAN2", dict(ranks=4, qkv="stacked")),
    "isp": ("INTERNLM2", dict(ranks=4, stages=2, isp=True)),
    "isp, stacked": ("BAICHUAN2", dict(ranks=4, isp=True, qkv="stacked")),
    "isp of the first generation": ("INTERNLM", dict(ranks=2, isp=True, qkv="stacked", old=True)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_layouts(case: str, tmp_path: Path) -> None:
    name, layout = OTHERS[case]
    _check(name, internevo_folder(MODELS[name], tmp_path / "1", **layout, **_keys(name)), "--model-type", name)


@pytest.mark.parametrize("old", [True, False])
def test_projections_that_look_alike(old: bool, tmp_path: Path) -> None:
    """Where both have the shape of the hidden size squared on a rank, the generation says which is which."""
    model = decoder("INTERNLM", torch.float32, **{**SIZES, "mlp_ratio": 2.0})
    folder = internevo_folder(model, tmp_path / "1", 2, qkv="stacked", old=old)
    assert same_bits(tensors_of(_convert(folder, "--model-type", "INTERNLM")), weights_of(model))


READ = {
    "INTERNLM2": dict(ranks=4, isp=True),
    "BAICHUAN2": dict(ranks=4, isp=True, qkv="stacked"),
    "INTERNLM": dict(ranks=2, qkv="stacked"),
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFReader]:
    """Readers of the models in READ."""
    found = {}
    for name, layout in READ.items():
        path = internevo_folder(MODELS[name], tmp_path_factory.mktemp("read"), **layout)
        folder = InternEvoFolder(read_files(path, trust=False), MODELS[name].spec, is_stacked(name))
        found[name] = HFReader(folder, MODELS[name].spec)
    return found


@given(data=st.data())
@pytest.mark.parametrize("name", READ)
def test_any_slice_of_a_tensor_is_read(name: str, readers: dict[str, HFReader], data: st.DataObject) -> None:
    weights = {key: x for key, x in weights_of(MODELS[name]).items() if "layers" not in key or "layers.3" in key}
    tensor = data.draw(st.sampled_from([*weights]))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in weights[tensor].shape]
    target = torch.full([b - a for a, b in bounds], torch.nan)
    readers[name].read_slice(tensor, tuple(a for a, _ in bounds), target)
    assert torch.equal(target, weights[tensor][tuple(slice(a, b) for a, b in bounds)])


def _tensors(change: Callable[[dict[str, Tensor]], Any], *files: str) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        for file in files or ("tp1_pp0",):
            path = folder / f"model_{file}.pt"
            content = torch.load(path, weights_only=True)
            change(content)
            torch.save(content, path)

    return rewrite


def _set(name: str, tensor: Tensor, *files: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors.update({name: tensor}), *files)


def _cut(folder: Path) -> None:
    file = folder / "model_tp1_pp0.pt"
    file.write_bytes(file.read_bytes()[:-100])


def _config(**keys: Any) -> Callable[[Path], None]:
    sizes = dict(num_layers=4, hidden_size=32, num_attention_heads=8, vocab_size=64)
    return lambda folder: save_config(folder, {**sizes, **_keys("INTERNLM2"), **keys})


BOTH = ("tp0_pp0", "tp1_pp0")
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no files": (lambda f: [file.unlink() for file in f.glob("model_*")], ": holds no model_tp*_pp*.pt or model_wp*"),
    "a file is missing": (
        lambda f: (f / "model_tp0_pp1.pt").unlink(),
        "model_tp0_pp1.pt: is missing, and the folder holds files of 2 ranks and 2 stages",
    ),
    "an absurd rank": (
        lambda f: (f / "model_tp1_pp1.pt").rename(f / "model_tp99999_pp99999.pt"),
        "holds 4 of the files of 100000 ranks and 100000 stages",
    ),
    "two layouts": (lambda f: (f / "model_wp0_pp0.pt").write_bytes(b""), "holds both model_tp* and model_wp*"),
    "a copy": (lambda f: (f / "model_tp0_pp0 (1).pt").write_bytes(b""), "model_tp0_pp0 (1).pt: is none of model_tp"),
    "fsdp": (lambda f: (f / "model_tp0_pp0_dp1.pt").write_bytes(b""), "model_tp0_pp0_dp1.pt: is none of model_tp"),
    "experts": (
        lambda f: (f / "model_moe_layer0_expert0_tp0.pt").write_bytes(b""),
        "model_moe_layer0_expert0_tp0.pt: holds an expert, which no model here has",
    ),
    "cut": (_cut, "model_tp1_pp0.pt: cannot be loaded (File is not a zip file)"),
    "empty": (lambda f: (f / "model_tp1_pp0.pt").write_bytes(b""), "model_tp1_pp0.pt: cannot be loaded"),
    "a pipe": (lambda f: [(f / "model_tp1_pp0.pt").unlink(), os.mkfifo(f / "model_tp1_pp0.pt")], "a regular file"),
    "a list": (
        lambda f: torch.save([1], f / "model_tp1_pp0.pt"),
        "cannot be loaded (expected a dict",
    ),
    "a pickle that makes a folder": (
        lambda f: torch.save({"x": Evil(f / "proof")}, f / "model_tp1_pp0.pt"),
        "model_tp1_pp0.pt: cannot be loaded (its pickle names posix.mkdir, and not only tensors). Pass --trust if you",
    ),
    "a config that makes a folder": (
        lambda f: torch.save({"x": Evil(f / "proof")}, f / "model_config.pt"),
        "model_config.pt: cannot be loaded (its pickle names posix.mkdir",
    ),
    "no config": (lambda f: (f / "model_config.pt").unlink(), "model_config.pt: is missing, so that the model's sizes"),
    "a config without sizes": (lambda f: save_config(f, {}), "model_config.pt: model.num_layers: "),
    "a config with experts": (_config(num_experts=4), "model_config.pt: model.num_experts: 4"),
    "an unknown key": (_config(mine=3), "model_config.pt: model.mine: unknown key. Pass --config with the config of"),
    "post-norm": (
        _config(apply_post_layer_norm=True),
        "model_config.pt: model.apply_post_layer_norm: True",
    ),
    "other heads": (
        _config(num_kv_attention_heads=2),
        "'model.layers.0.attention.wqkv.weight': expected shape [96, 32], got 2 shards of [64, 32]",
    ),
    "heads that cannot be split": (
        _config(num_attention_heads=4, num_kv_attention_heads=2, head_dim=12),
        "'model.layers.0.attention.wqkv.weight': expected shape",
    ),
    "fewer layers": (_config(num_layers=3), "layers.3.attention_norm.weight': the model has no such tensor"),
    "more layers": (_config(num_layers=5), "layers.4.attention.wq.weight: is missing"),
    "an unknown tensor": (
        _set("model.layers.0.attention.wx.weight", torch.zeros(2), *BOTH),
        "'model.layers.0.attention.wx.weight': is no tensor of a known model",
    ),
    "a tensor of one file": (
        _tensors(lambda tensors: tensors.pop("model.layers.0.attention.wo.weight")),
        "model_tp0_pp0.pt: 'model.layers.0.attention.wo.weight': is not in model_tp1_pp0.pt",
    ),
    "a tensor is missing": (
        _tensors(lambda tensors: tensors.pop("model.layers.0.attention.wo.weight"), *BOTH),
        "layers.0.attention.wo.weight: is missing",
    ),
    "two names": (
        _set("model.embedding.weight", torch.zeros(64, 16), *BOTH),
        "'model.embedding.weight': is the same tensor as 'model.tok_embeddings.weight'",
    ),
    "fused and separate": (
        _set("model.layers.0.attention.wk.weight", torch.zeros(16, 32), *BOTH),
        "is the same tensor as layers.0.attention.wk.weight",
    ),
    "a layer is missing": (
        _tensors(lambda tensors: [tensors.pop(name) for name in [*tensors] if ".layers.0." in name], *BOTH),
        ": stage 0: has layers 1, and not consecutive ones from 0",
    ),
    "another shape": (
        _set("model.layers.0.attention.wo.weight", torch.zeros(32, 31)),
        "'model.layers.0.attention.wo.weight': expected shape [32, 64], got 2 shards of [32, 32], [32, 31]",
    ),
    "another dtype": (_set("model.norm.weight", torch.ones(32).half(), "tp1_pp1"), "'model.norm.weight': differs betw"),
    "integers": (
        _set("model.norm.weight", torch.ones(32).int(), "tp0_pp1", "tp1_pp1"),
        "norm.weight: expected dtype F64, F32, F16, BF16, got torch.int32",
    ),
    "norms of different saves": (
        _set("model.layers.1.ffn_norm.weight", torch.ones(32)),
        "'model.layers.1.ffn_norm.weight': differs between the files of one stage",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that is sound."""
    return internevo_folder(MODELS["INTERNLM2"], tmp_path_factory.mktemp("good"), 2, 2, **_keys("INTERNLM2"))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BROKEN[case]
    folder = shutil.copytree(good, tmp_path / "1")
    change(folder)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "from-internevo", str(folder), str(tmp_path / "out")])
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert message in output.err
    assert "Traceback" not in output.err
    assert all(line.startswith((str(folder), "…")) for line in output.err.splitlines())
    assert output.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert not (folder / "proof").exists()


def test_trust(good: Path, tmp_path: Path) -> None:
    """With the flag, a file is unpickled, and its tensors are converted; without it, it is refused."""
    folder = shutil.copytree(good, tmp_path / "1")
    content = torch.load(folder / "model_tp0_pp0.pt", weights_only=True)
    torch.save(WithState(content), folder / "model_tp0_pp0.pt")
    with pytest.raises(SystemExit):
        main(["convert", "from-internevo", str(folder), str(tmp_path / "out")])
    _check("INTERNLM2", folder, "--trust")


class WithState(OrderedDict[str, Any]):
    """Dict of a class that only its module knows."""


def test_options(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config takes the place of the saved section; a folder around checkpoints is named as such."""
    folder = shutil.copytree(good, tmp_path / "ckpts" / "100")
    (folder / "model_config.pt").unlink()
    config = tmp_path / "config.py"
    sizes = "num_layers=4, hidden_size=32, num_attention_heads=8, num_kv_attention_heads=4, head_dim=8, vocab_size=64"
    rest = "data = dict(seq_len=8, micro_bsz=1, total_steps=1)\nadam = dict(lr=1e-3)"
    config.write_text(f"model_type = 'LLAMA2'\nmodel = dict({sizes})\n{rest}\n")
    command = ["convert", "from-internevo", str(folder), str(tmp_path / "ckpts" / "out"), "--config", str(config)]
    with pytest.raises(SystemExit):
        main([*command, "--model-type", "LLAMA2"])
    assert "--model-type: cannot be combined with --config" in capsys.readouterr().err
    _check("INTERNLM2", folder, "--config", str(config))
    assert "model_type = 'LLAMA2'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", "from-internevo", str(folder.parent), str(tmp_path / "other")])
    assert f"Pass the folder of a checkpoint, such as {folder}" in capsys.readouterr().err
