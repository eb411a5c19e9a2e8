"""Folders of Meta's releases: the tensors of all files, in the order of pairs that the model has; and broken ones."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from internlm.checkpoint.hf_reader import HFReader
from internlm.checkpoint.hf_specs import differences, spec_of_folder
from internlm.checkpoint.llama_folder import LlamaFolder
from internlm.checkpoint.manager import load_weights
from internlm.cli.main import main
from internlm.utils.errors import CheckpointError
from tests.unit.checkpoint.hf_samples import GQA, llama_release, weights_of
from tests.unit.checkpoint.samples import Evil
from tests.unit.model.samples import decoder, tokens

RELEASES = {
    "one file": dict(files=1, splits_hidden=True),
    "two files": dict(files=2, splits_hidden=True),
    "two files of Llama 3": dict(files=2, splits_hidden=False),
}
KEYS: dict[str, Any] = {**GQA, "vocab_size": 62}
PAIRED = decoder("LLAMA2", torch.float32, **KEYS, qk_interleaved=True)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of one model."""
    return {name: llama_release(PAIRED, tmp_path_factory.mktemp("llama"), **keys) for name, keys in RELEASES.items()}


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("release", RELEASES)
def test_equal_logits(release: str, paired: bool, releases: dict[str, Path]) -> None:
    """With either layout of the rotary embedding; the config is that of the model."""
    folder = LlamaFolder(releases[release])
    model = decoder("LLAMA2", torch.float32, **KEYS, qk_interleaved=paired)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert not list(differences(folder.config_file, spec_of_folder(folder).spec, model.spec))
    with HFReader(folder, model.spec) as reader:
        reader.check()
        for name, weight in weights_of(model).items():
            reader.read_slice(name, (0,) * weight.dim(), weight)
    ids = tokens(2, 24)
    assert torch.allclose(model(ids), PAIRED(ids), rtol=1e-5, atol=1e-5)


def test_command(releases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``from-llama`` writes a checkpoint, and prints a section that builds the same model."""
    assert main(["convert", "from-llama", str(releases["two files"]), str(tmp_path / "out")]) is None
    section: dict[str, Any] = {}
    exec(capsys.readouterr().out, section)
    keys = {key: value for key, value in section["model"].items() if key != "dtype"}
    model = decoder(section["model_type"], torch.float32, **keys)
    load_weights(model, tmp_path / "out")
    ids = tokens(2, 24)
    assert torch.allclose(model(ids), PAIRED(ids), rtol=1e-5, atol=1e-5)


@given(data=st.data())
@pytest.mark.parametrize("release", RELEASES)
def test_any_slice_of_a_tensor_is_read(release: str, releases: dict[str, Path], data: st.DataObject) -> None:
    weights = weights_of(PAIRED)
    name = data.draw(st.sampled_from([key for key in weights if not key.startswith("layers.0")]))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in weights[name].shape]
    target = torch.full([b - a for a, b in bounds], torch.nan)
    HFReader(LlamaFolder(releases[release]), PAIRED.spec).read_slice(name, tuple(a for a, _ in bounds), target)
    assert torch.equal(target, weights[name][tuple(slice(a, b) for a, b in bounds)])


def test_scaled_rope_and_other_params(tmp_path: Path) -> None:
    """Every difference between the params and the model is named."""
    folder = llama_release(PAIRED, tmp_path, rope_theta=500000.0, use_scaled_rope=True, norm_eps=1e-4)
    theirs = spec_of_folder(LlamaFolder(folder)).spec
    assert theirs.config.rope_scaling is not None
    keys = [problem.where for problem in differences(folder / "params.json", theirs, PAIRED.spec)]
    assert keys == ["model.layer_norm_epsilon", "model.rope_base, rope_scaling or their neighbours"]


def _params(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        params = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps({**params, key: value}))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], Any], file: int = 1) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / f"consolidated.{file:02}.pth"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return rewrite


def _compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)


def _pipe(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()
    os.mkfifo(folder / "consolidated.00.pth")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no params": (lambda f: (f / "params.json").unlink(), "params.json: is missing"),
    "no width": (_params("dim", None), "params.json: hidden_size: expected an integer of at least 1, got None"),
    "another vocabulary": (
        _params("vocab_size", 9),
        "params.json: vocab_size: expected 62, as the embedding",
    ),
    "a file is missing": (lambda f: (f / "consolidated.00.pth").unlink(), "expected consolidated.00.pth and so on"),
    "a pickle that makes a folder": (
        lambda f: torch.save({"x": Evil(f / "proof")}, f / "consolidated.01.pth"),
        "consolidated.01.pth: cannot be loaded (its pickle names posix.mkdir, and not only tensors",
    ),
    "no archive": (lambda f: (f / "consolidated.00.pth").write_bytes(b"x" * 99), "cannot be loaded (File is not a zip"),
    "compressed": (_compressed, "'archive/data.pkl' is compressed or too large"),
    "a pipe": (_pipe, "cannot be loaded (expected a regular file)"),
    "a list": (lambda f: torch.save([1], f / "consolidated.00.pth"), "expected a dict of tensors, got list"),
    "a number": (_tensors(lambda t: t.update(x=3)), "expected a tensor as 'x', got int"),
    "a view of any shape": (_tensors(lambda t: t.update(x=torch.zeros(1).expand(1 << 40))), "'x' is not stored as a"),
    "a tensor in one file": (_tensors(lambda t: t.pop("layers.1.attention.wq.weight")), "is not in every one of the 2"),
    "another shape": (
        _tensors(lambda t: t.update({"output.weight": torch.zeros(3, 32)})),
        "'output.weight': has shapes [31, 32], [3, 32] in the files",
    ),
    "no feed-forward": (
        lambda f: [_tensors(lambda t: t.pop("layers.0.feed_forward.w1.weight"), n)(f) for n in (0, 1)],
        "layers.0.feed_forward.w1.weight: is missing, or is no matrix",
    ),
    "another tensor": (
        lambda f: [_tensors(lambda t: t.update(x=torch.zeros(2)), n)(f) for n in (0, 1)],
        "'x': the model has no such tensor",
    ),
    "integers": (
        lambda f: [_tensors(lambda t: t.update({"norm.weight": t["norm.weight"].int()}), n)(f) for n in (0, 1)],
        "norm.weight: expected dtype F64, F32, F16, BF16, got torch.int32",
    ),
}


def _check(path: Path) -> None:
    folder = LlamaFolder(path)
    HFReader(folder, spec_of_folder(folder).spec).check()


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    folder = llama_release(PAIRED, tmp_path, files=2, splits_hidden=True)
    change(folder)
    with pytest.raises(CheckpointError) as raised:
        _check(folder)
    assert message in str(raised.value)
    assert all(problem.where.startswith(str(folder)) for problem in raised.value.problems)
    assert not (folder / "proof").exists()
