"""Damaged, contradictory and hostile Hugging Face folders: one line that names the place, exit code 2, nothing left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.checkpoint.folder_checks import todo_at
from internlm.checkpoint.hf_folder import INDEX
from internlm.cli.main import main
from tests.unit.checkpoint.hf_samples import GQA, checkpoint_of, exported, rewrite_header, tiny_folder
from tests.unit.model.samples import decoder

#: A folder is broken by a function of it; the error holds the text.
Break = Callable[[Path], Any]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that is sound."""
    return tiny_folder(tmp_path_factory.mktemp("good"))


def _config(key: str, value: Any) -> Break:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[key] = value
        if value is None:
            del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _index(name: str, file: Any) -> Break:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = file
        (folder / INDEX).write_text(json.dumps(index))

    return change


def _file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def _tensor(key: str, value: Any) -> Break:
    """Change an entry of the header for Q."""

    def change(folder: Path) -> None:
        rewrite_header(_file_of(folder, Q), lambda header: {**header, Q: {**header[Q], key: value}})

    return change


def _bytes(change: Callable[[bytes], bytes]) -> Break:
    def rewrite(folder: Path) -> None:
        file = _file_of(folder, Q)
        file.write_bytes(change(file.read_bytes()))

    return rewrite


def _remove_file(folder: Path) -> None:
    _file_of(folder, Q).unlink()


def _pipe(folder: Path) -> None:
    file = _file_of(folder, Q)
    file.unlink()
    os.mkfifo(file)


def _rename_tensor(folder: Path) -> None:
    """Rename Q in file and index alike."""
    rewrite_header(_file_of(folder, Q), lambda h: {("other" if key == Q else key): value for key, value in h.items()})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["other"] = index["weight_map"].pop(Q)
    (folder / INDEX).write_text(json.dumps(index))


def _copy_tensors(folder: Path) -> None:
    """Put the tensors of the first file into a second one."""
    shutil.copy(_file_of(folder, Q), folder / "copy.safetensors")
    _index("model.norm.weight", "copy.safetensors")(folder)


def _double_key(folder: Path) -> None:
    file = _file_of(folder, Q)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header)[:-1] + f', "{Q}": {json.dumps(header[Q])}}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])


def _pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


DEEP = b"[" * 100_000
BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: is missing. Choose another folder"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not readable JSON"),
    "config is nested deeply": (lambda f: (f / "config.json").write_bytes(DEEP), "config.json: is not readable JSON"),
    "config is large": (lambda f: (f / "config.json").write_bytes(b" " * 2_000_000), "larger than"),
    "another architecture": (_config("model_type", "bloom"), "model_type: 'bloom' is not one of llama"),
    "another head": (_config("architectures", ["LlamaModel"]), "architectures: expected ['LlamaForCausalLM']"),
    "quantised": (_config("quantization_config", {"bits": 4}), "quantization_config is set"),
    "no layers": (_config("num_hidden_layers", None), "num_hidden_layers: expected an integer of at least 1, got None"),
    "layers as text": (_config("num_hidden_layers", "2"), "num_hidden_layers: expected an integer"),
    "absurd layers": (_config("num_hidden_layers", 10**9), "num_hidden_layers: must be at most 10000, got 1000000000"),
    "absurd width": (_config("hidden_size", 2**39), "expected shape"),
    "heads do not divide": (_config("num_key_value_heads", 3), "4 heads are not divisible by 3 kv heads"),
    "another activation": (_config("hidden_act", ["silu"]), "hidden_act: ['silu'] is not one of silu"),
    "no epsilon": (_config("rms_norm_eps", None), "rms_norm_eps: expected a positive number, got None"),
    "another rope": (_config("rope_scaling", {"rope_type": "longrope"}), "rope_type: 'longrope' is not one of default"),
    "rope is no object": (_config("rope_scaling", [1]), "rope_scaling: expected an object, got [1]"),
    "rope without factor": (_config("rope_scaling", {"rope_type": "linear"}), "factor: expected a positive number"),
    "partial rotary": (_config("partial_rotary_factor", 0.5), "partial_rotary_factor: 0.5 has no counterpart"),
    "other width": (_config("intermediate_size", 80), "mlp.gate_proj.weight: expected shape [80, 32], got [96, 32]"),
    "more layers": (_config("num_hidden_layers", 3), "model.layers.2.self_attn.q_proj.weight: is missing"),
    "fewer layers": (_config("num_hidden_layers", 1), "model.layers.1.self_attn.q_proj.weight': the model has no such"),
    "tied, but it differs": (_config("tie_word_embeddings", True), "differs from model.embed_tokens.weight"),
    "pickles": (_pickle, "holds pickled files"),
    "index leads out": (_index(Q, "../x.safetensors"), "expected a safetensors file of this folder, got '../x"),
    "index is absolute": (_index(Q, "/etc/x.safetensors"), "expected a safetensors file of this folder"),
    "index names no text": (_index(Q, 3), "expected a safetensors file of this folder, got 3"),
    "index names an absent file": (_index(Q, "absent.safetensors"), "absent.safetensors: cannot be read"),
    "index names an absent tensor": (_index("x.weight", "model-00001-of-00010.safetensors"), "is missing, but"),
    "index is empty": (lambda f: (f / INDEX).write_text("{}"), "weight_map: expected an object, got None"),
    "no index": (lambda f: (f / INDEX).unlink(), f"but neither {INDEX} nor model.safetensors"),
    "file is absent": (_remove_file, "cannot be read (does not exist)"),
    "file is a pipe": (_pipe, "is not a regular file"),
    "file is cut": (_bytes(lambda b: b[:-1]), "bytes by its header, got"),
    "file is longer": (_bytes(lambda b: b + b"\0"), "bytes by its header, got"),
    "file is empty": (_bytes(lambda b: b""), "it ends at byte 0"),
    "header is longer than the file": (_bytes(lambda b: b"\xff" * 8 + b[8:]), "by its first 8 bytes"),
    "header is no JSON": (_bytes(lambda b: b[:8] + b"\xff" + b[9:]), "is not a whole safetensors file"),
    "header is a list": (_bytes(lambda b: (2).to_bytes(8, "little") + b"[]"), "expected an object as header, got []"),
    "header is nested deeply": (
        _bytes(lambda b: len(DEEP).to_bytes(8, "little") + DEEP),
        "is not a whole safetensors file",
    ),
    "tensor occurs twice": (_double_key, f"'{Q}' occurs twice"),
    "tensor is in two files": (_copy_tensors, "too"),
    "offsets outside": (_tensor("data_offsets", [10**12, 10**12 + 4096]), "does not begin at byte"),
    "offsets overlap": (_tensor("data_offsets", [0, 4096]), "overlaps another tensor"),
    "offsets backwards": (_tensor("data_offsets", [4096, 0]), "but data_offsets are"),
    "offsets are negative": (_tensor("data_offsets", [-4096, 0]), "data_offsets: expected non-negative integers"),
    "absurd shape": (_tensor("shape", [1 << 61, 1 << 61]), "has"),
    "shape is no list": (_tensor("shape", "32"), "shape: expected non-negative integers, got '32'"),
    "shape of other elements": (_tensor("shape", [31, 32]), "but data_offsets are"),
    "shape is transposed": (_tensor("shape", [16, 64]), f"{Q}: expected shape [32, 32], got [16, 64]"),
    "unknown dtype": (_tensor("dtype", "F7"), "unknown dtype 'F7'"),
    "integers": (_tensor("dtype", "I32"), f"{Q}: expected dtype F64, F32, F16, BF16, got I32"),
    "another name": (_rename_tensor, "'other': the model has no such tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BROKEN[case]
    shutil.copytree(good, tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(SystemExit) as ended:
        main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "out")])
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert output.out == ""
    assert message in output.err
    assert "Traceback" not in output.err
    assert all(line.startswith((str(tmp_path / "hf"), "…")) for line in output.err.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_needs_space_rather_than_another_path() -> None:
    assert (
        todo_at("out/model.safetensors", errno.ENOSPC, "Check the path") == "Free space there, or choose another folder"
    )
    assert todo_at("out/model.safetensors", errno.EACCES, "Check the path") == "Check the path"


def test_the_good_folder(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is converted once, and never over something else."""
    command = ["convert", "from-hf", str(good), str(tmp_path / "out")]
    assert main(command) is None
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(SystemExit):
        main(command)
    assert f"{tmp_path / 'out'}: exists already. Choose another name, or remove it" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


REST = "data = dict(seq_len=8, micro_bsz=1, total_steps=1)\nadam = dict(lr=1e-3)"


def _exporting(tmp_path: Path, family: str, keys: dict[str, Any], *more: str) -> list[str]:
    checkpoint_of(decoder(family, torch.float32, **GQA, **keys), family, tmp_path / "step-3")
    return ["convert", "to-hf", str(tmp_path / "step-3"), str(tmp_path / "out"), *more]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases of qkv alone": ("INTERNLM", {"o_bias": False}, "model.qkv_bias: 'True with o_bias = False' cannot be"),
    "mlp_bias": ("QWEN3", {"mlp_bias": True}, "model.mlp_bias: True cannot be expressed by Qwen3ForCausalLM"),
    "layernorm": ("LLAMA2", {"norm_type": "layernorm"}, "model.norm_type: 'layernorm' cannot be expressed"),
    "post-norm": ("LLAMA2", {"apply_post_layer_norm": True}, "model.apply_post_layer_norm: True cannot be"),
    "window": ("LLAMA2", {"use_sliding_window": True, "sliding_window": 4}, "model.use_sliding_window: True cannot"),
    "tied normalised head": ("BAICHUAN2", {"tie_word_embeddings": True}, "model.norm_head: 'True with tie_word"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_express(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, keys, message = REFUSED[case]
    with pytest.raises(SystemExit) as ended:
        main(_exporting(tmp_path, family, keys))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_export_of_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pieces are verified while they are exported; the folder with the first tensors is removed."""
    command = _exporting(tmp_path, "LLAMA2", {})
    file = tmp_path / "step-3" / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "differ from those that were saved" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_config_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--config replaces what the checkpoint says, and the tensors are compared with it."""
    command = _exporting(tmp_path, "LLAMA2", {})
    config = tmp_path / "config.py"
    sizes = "num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_attention_heads=1, vocab_size=61"
    config.write_text(f"model_type = 'LLAMA2'\nmodel = dict({sizes}, multiple_of=16)\n{REST}\n")
    with pytest.raises(SystemExit):
        main([*command, "--config", str(config)])
    error = capsys.readouterr().err
    assert "model/layers.0.attention.wqkv.weight: expected shape [1, 6, 8, 32], got [2, 4, 8, 32]" in error
    config.write_text(config.read_text().replace("heads=1", "heads=2"))
    assert main([*command, "--config", str(config), "--dtype", "bfloat16", "--shard-size", "1MB"]) is None
    assert "1 file with tensors" in capsys.readouterr().out


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    """With the ids of special tokens, and the settings of generation."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 5, "a": 7}, unk_token="a"))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 0.5}))
    (folder / "notes.txt").write_text("no tokenizer")
    model = decoder("LLAMA2", torch.float32, **GQA)
    out = exported(model, "LLAMA2", tmp_path, tokenizer=folder)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"notes.txt"} | {"config.json", "model.safetensors"}
    config = json.loads((out / "config.json").read_text())
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [0, 5, None]
