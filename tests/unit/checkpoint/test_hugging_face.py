"""Conversion of checkpoints to Hugging Face folders and back: bitwise, in bounded memory, and equal logits."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from internlm.checkpoint import logical_tensors
from internlm.checkpoint.hf_export import Export, export
from internlm.checkpoint.hf_folder import INDEX
from internlm.checkpoint.hf_import import import_folder
from internlm.checkpoint.hf_specs import spec_of_config
from internlm.checkpoint.logical_tensors import LogicalTensor
from internlm.checkpoint.manager import load_weights
from internlm.config.families import FAMILIES
from internlm.core.parallel.param_state import placed_parameters
from internlm.model.hf_config import from_hf_config, to_hf_config
from internlm.model.hf_tensors import tensor_shapes
from tests.unit.checkpoint.hf_samples import (
    GQA,
    checkpoint_of,
    exported,
    opened,
    reader_of,
    same_bits,
    tensors_of,
    weights_of,
)
from tests.unit.checkpoint.samples import rewrite_state, run_state, save
from tests.unit.model.samples import decoder, tokens

#: Keys that the format of the family cannot express, and that are therefore changed.
KEYS: dict[str, dict[str, Any]] = {
    "GEMMA": {"hidden_size": 64},
    "GEMMA3": {"hidden_size": 64, "num_layers": 7, "sliding_window": 6},
    "MISTRAL": {"sliding_window": 5},
}
#: Families whose tensors are changed on purpose: the head is normalised.
FOLDED = ("BAICHUAN2",)


def _model(family: str, dtype: torch.dtype, **keys: Any) -> Any:
    return decoder(family, dtype, **{**GQA, **KEYS.get(family, {}), **keys})


def _built(section: dict[str, Any], dtype: torch.dtype) -> Any:
    """Build the model of a printed section."""
    keys = dict(section["model"])
    assert keys.pop("dtype") == str(dtype)
    return decoder(section["model_type"], dtype, **keys)


def test_shapes_are_those_of_the_decoder() -> None:
    for family in FAMILIES:
        model = _model(family, torch.float32, tie_word_embeddings=False)
        expected = {name: tuple(placement.global_shape) for name, _, placement in placed_parameters(model)}
        assert tensor_shapes(model.spec) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors come back bitwise, with a section that builds the same model, whose logits are those of transformers."""
    model = _model(family, dtype)
    folder = exported(model, family, tmp_path, shard_bytes=16000)
    assert (folder / INDEX).exists()
    section: dict[str, Any] = {}
    exec(import_folder(folder, tmp_path / "back"), section)
    came_back = tensors_of(tmp_path / "back")
    if family in FOLDED:
        rows = came_back["output.weight"].float().norm(dim=-1)
        assert torch.allclose(rows, torch.ones_like(rows), atol=1e-6 if dtype == torch.float32 else 1e-2)
        came_back["output.weight"] = weights_of(model)["output.weight"]
    assert same_bits(came_back, weights_of(model))
    again = _built(section, dtype)
    assert to_hf_config(section["model_type"], again.spec) == to_hf_config(family, model.spec)
    load_weights(again, tmp_path / "back")
    if dtype == torch.float32:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        ids = tokens(2, 24)
        expected = loaded(ids).logits
        for ours in (model, again):
            assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_folders_of_transformers(model_type: str, tmp_path: Path) -> None:
    """A folder with several files that save_pretrained wrote gives a model with the same logits."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=61)
    more = dict(num_key_value_heads=2, head_dim=16, pad_token_id=None, tie_word_embeddings=model_type != "llama")
    config = CONFIG_MAPPING[model_type](**sizes, **more, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    assert (tmp_path / "hf" / INDEX).exists()
    section: dict[str, Any] = {}
    exec(import_folder(tmp_path / "hf", tmp_path / "ours"), section)
    model = _built(section, torch.float32)
    load_weights(model, tmp_path / "ours")
    ids = tokens(2, 24)
    expected = theirs(ids).logits
    assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gelu_of_gemma_is_the_approximation_by_tanh(tmp_path: Path) -> None:
    """As ``transformers`` reads the config of the first releases; of other models it is another function."""
    folder = exported(_model("GEMMA", torch.float32), "GEMMA", tmp_path)
    file = folder / "config.json"
    file.write_text(file.read_text().replace("gelu_pytorch_tanh", "gelu"))
    section: dict[str, Any] = {}
    exec(import_folder(folder, tmp_path / "back"), section)
    model = _built(section, torch.float32)
    load_weights(model, tmp_path / "back")
    ids = tokens(2, 24)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(ids).logits
    assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    without = {key: value for key, value in json.loads(file.read_text()).items() if key != "hidden_act"}
    assert from_hf_config(without)[1]["activation"] == "gelu_tanh"
    with pytest.raises(ValueError, match="hidden_act: 'gelu' is not one of silu"):
        from_hf_config({**json.loads(file.read_text()), "model_type": "llama", "architectures": None})


def test_dtypes(tmp_path: Path) -> None:
    """Tensors are converted, and values that float16 cannot hold are refused by name."""
    model = _model("LLAMA2", torch.float32)
    checkpoint = opened(checkpoint_of(model, "LLAMA2", tmp_path / "step-3"))
    spec = spec_of_config(checkpoint.state.config, "here")
    export(checkpoint, spec, tmp_path / "hf", Export(dtype=torch.bfloat16))
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    import_folder(tmp_path / "hf", tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), {name: x.bfloat16() for name, x in weights_of(model).items()})
    with torch.no_grad():
        model.norm.weight[3] = 1e30
    checkpoint = opened(checkpoint_of(model, "LLAMA2", tmp_path / "large"))
    with pytest.raises(Exception, match=r"model/norm.weight: has values that float16 cannot hold"):
        export(checkpoint, spec, tmp_path / "half", Export(dtype=torch.float16))
    assert not [path for path in tmp_path.iterdir() if "half" in path.name]


READ = {
    name: decoder("LLAMA2", torch.float32, **GQA, qkv_bias=True, o_bias=True, qk_interleaved=name == "interleaved")
    for name in ("halves", "interleaved")
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the models in READ."""
    return {name: exported(model, "LLAMA2", tmp_path_factory.mktemp("read")) for name, model in READ.items()}


@given(data=st.data())
@pytest.mark.parametrize("name", READ)
def test_any_slice_of_a_tensor_is_read(name: str, folders: dict[str, Path], data: st.DataObject) -> None:
    model = READ[name]
    weights = weights_of(model)
    tensor = data.draw(st.sampled_from([key for key in weights if key.startswith("layers.1") or "." not in key[:10]]))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in weights[tensor].shape]
    target = torch.full([b - a for a, b in bounds], torch.nan)
    with reader_of(folders[name], model) as reader:
        reader.check()
        reader.read_slice(tensor, tuple(a for a, _ in bounds), target)
    assert torch.equal(target, weights[tensor][tuple(slice(a, b) for a, b in bounds)])


class _Peak(TorchDispatchMode):
    """Largest number of bytes of the tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_memory_is_that_of_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting holds one of our tensors where theirs is no run of it, importing a few pieces, whatever the model."""
    monkeypatch.setattr(logical_tensors, "PIECE_BYTES", 2048)
    model = _model("LLAMA2", torch.float32, num_layers=4)
    checkpoint = opened(checkpoint_of(model, "LLAMA2", tmp_path / "step-3"))
    with _Peak() as exporting:
        export(checkpoint, spec_of_config(checkpoint.state.config, "here"), tmp_path / "hf", Export())
    # Queries, keys and values are copied one by one from the tensor that holds them side by side.
    c = model.spec.config
    queries = c.num_attention_heads * c.head_size * c.hidden_size * 4
    fused = weights_of(model)["layers.0.attention.wqkv.weight"].nbytes
    # The memory for pieces grows to this once.
    assert fused + queries <= exporting.peak <= fused + queries + 2048
    with _Peak() as importing:
        import_folder(tmp_path / "hf", tmp_path / "back")
    # A piece, and what is read for it.
    assert 2048 <= importing.peak <= 2 * 2048
    assert same_bits(tensors_of(tmp_path / "back"), weights_of(model))


@pytest.mark.parametrize("family", ["LLAMA2", "BAICHUAN2"])
@given(data=st.data())
@settings(max_examples=5)
def test_pieces_of_any_layout_are_exported(family: str, data: st.DataObject) -> None:
    """Whatever the slices that ranks have saved: rows, columns, or runs that end in the middle of a row."""
    model = _model(family, torch.float32, num_layers=1)
    with TemporaryDirectory() as temporary:
        whole = checkpoint_of(model, family, Path(temporary) / "whole" / "step-3")
        config = opened(whole).state.config
        tensors: dict[str, LogicalTensor] = {}
        for name, weight in weights_of(model).items():
            tensors[f"model/{name}"] = logical = LogicalTensor(tuple(weight.shape), weight.dtype)
            offsets = (0,) * weight.dim()
            if weight.dim() == 2 and data.draw(st.booleans()):  # split along both axes
                parts = [part for half in weight.chunk(2, 0) for part in half.chunk(2, 1)]
                rows, columns = parts[0].shape
                for index, part in enumerate(parts):
                    logical.add((index // 2 * rows, index % 2 * columns), part.contiguous())
                continue
            for at, part in logical_tensors.cut(offsets, weight, data.draw(st.integers(20, weight.numel()))):
                logical.add(at, part)
        (Path(temporary) / "split").mkdir()
        split = save(Path(temporary) / "split" / "step-3", tensors)
        rewrite_state(split, json.dumps({**run_state(), "format": 2, "config": config}).encode())
        spec = spec_of_config(config, "here")
        for name, path in (("one", whole), ("other", split)):
            export(opened(path), spec, Path(temporary) / name, Export(dtype=torch.bfloat16))
        one, other = (Path(temporary, name, "model.safetensors").read_bytes() for name in ("one", "other"))
        assert one == other


def test_a_user_s_model_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="'MINE' is not a built-in model type"):
        spec_of_config({"model_type": "MINE", "model": {}}, "here")
