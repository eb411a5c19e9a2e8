"""Verification of whole checkpoints: every damage of a file is found, and its first bad bytes are named."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm.checkpoint import verification
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.run_state import RunState
from internlm.checkpoint.saved_checkpoint import read_manifest
from internlm.checkpoint.verification import Verification, verify
from internlm.utils.errors import CheckpointError, DamagedCheckpointError
from tests.unit.checkpoint import samples
from tests.unit.checkpoint.samples import complete, damage, in_ranges, save, write

FIXTURE = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "format-1"
FILES = ("manifest.json", "state.json", "rank-00000.bin")


def values(seed: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def checkpoint(folder: Path, step: int) -> Path:
    """Save two tensors, each in pieces of its own."""
    tensors = {"model/w": in_ranges(values(step), [20, 64]), "optimizer/main/w": in_ranges(-values(step), [16])}
    return save(folder / f"step-{step}", tensors, step)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return checkpoint(tmp_path, 40)


def check(folder: Path, jobs: int = 1) -> Verification:
    return verify(LocalStorage(folder.parent), folder.name, jobs)


def found(folder: Path) -> list[str]:
    """Return the problems of a checkpoint, without the path of its folder, also of one that cannot be opened."""
    try:
        problems = check(folder).problems
    except CheckpointError as error:
        problems = list(error.problems)
    return [f"{problem.where.removeprefix(f'{folder}/')}: {problem.message}" for problem in problems]


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


# -- good checkpoints


def test_a_good_checkpoint_verifies(good: Path) -> None:
    size = sum((good / name).stat().st_size for name in FILES[1:])
    assert check(good) == Verification(format=2, files=3, size=size, problems=[], unlisted=[])


@pytest.mark.parametrize("jobs", [1, 3])
def test_progress_adds_up_to_the_size(good: Path, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "RUN_BYTES", 200)
    calls: list[tuple[int, int]] = []
    result = verify(LocalStorage(good.parent), good.name, jobs, lambda *call: calls.append(call))
    assert len(calls) > 3
    assert sum(read for read, _ in calls) == result.size
    assert {total for _, total in calls} == {result.size}


def test_files_that_are_not_listed_are_named(good: Path) -> None:
    (good / "notes.txt").write_text("mine")
    (good / "old").mkdir()
    result = check(good)
    assert (result.unlisted, result.problems) == (["notes.txt", "old/"], [])


# -- damage


def test_the_first_bad_bytes_of_each_file_are_named(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "RUN_BYTES", 200)
    tensors = read_manifest(LocalStorage(good.parent), good.name).tensors
    pieces = sorted((piece for tensor in tensors.values() for piece in tensor.pieces), key=lambda each: each.position)
    names = {piece: name for name, tensor in tensors.items() for piece in tensor.pieces}
    for piece in (pieces[3], pieces[1]):
        flip(good / piece.file, piece.position)
    first, after = pieces[1].position, pieces[2].position
    differ = f"bytes {first} to {after} differ from those that were saved ({names[pieces[1]]} and 1 more piece)"
    assert found(good) == [f"rank-00000.bin: {differ}"]
    assert [problem.message for problem in damage(LocalStorage(good.parent), good.name)] == [differ]
    flip(good / "state.json", 0)
    size = (good / "state.json").stat().st_size
    saved = f"state.json: bytes 0 to {size} differ from those that were saved"
    assert found(good) == [f"rank-00000.bin: {differ}", saved]


def test_a_flipped_bit_is_found_wherever_it_is(good: Path) -> None:
    generator = random.Random(0)
    contents = {name: (good / name).read_bytes() for name in FILES}
    everywhere = [(name, position) for name in FILES for position in range(len(contents[name]))]
    # As many in small files as in large ones, and as many again at any byte.
    chosen = [(name, generator.randrange(len(contents[name]))) for name in FILES for _ in range(200)]
    chosen += generator.choices(everywhere, k=600)
    silent = []
    for name, position in chosen:
        bit = generator.randrange(8)
        flip(good / name, position, bit)
        if not any(line.startswith(name) for line in found(good)):
            silent.append((name, position, bit))
        (good / name).write_bytes(contents[name])
    assert len(chosen) >= 1000
    assert silent == []
    assert found(good) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_is_named_with_both_sizes(good: Path, name: str, share: float) -> None:
    size = (good / name).stat().st_size
    kept = int(size * share)
    os.truncate(good / name, kept)
    (line,) = found(good)
    assert line.startswith(f"{name}: ")
    assert name == "manifest.json" or f"{kept} bytes, manifest says {size}" in line


def test_a_file_that_grew_is_named_with_both_sizes(good: Path) -> None:
    size = (good / "rank-00000.bin").stat().st_size
    os.truncate(good / "rank-00000.bin", 2 * size)
    assert found(good) == [f"rank-00000.bin: {2 * size} bytes, manifest says {size}"]


def _delete(path: Path) -> None:
    path.unlink()


def _make_link(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [_delete, _make_link, _make_pipe])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_any_more_is_named(good: Path, name: str, change: Callable[[Path], None]) -> None:
    change(good / name)
    (line,) = found(good)
    assert name in line


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_step_is_named(good: Path, name: str) -> None:
    other = checkpoint(good.parent, 41)
    shutil.copy(other / name, good / name)
    assert found(good)
    assert all(line.startswith(name) for line in found(good))


def test_a_checkpoint_under_the_name_of_another_is_named(good: Path) -> None:
    good.rename(good.with_name("step-41"))
    with pytest.raises(DamagedCheckpointError, match="is the manifest of step-40, not of step-41"):
        check(good.with_name("step-41"))


def test_a_wrong_value_in_a_state_file_is_damage_though_its_checksum_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**samples.run_state(3), "seed": -1}
    monkeypatch.setattr(samples, "run_state", lambda step: wrong)
    monkeypatch.setattr(samples, "RunState", RunState.model_construct)  # without validation
    folder = save(tmp_path / "step-3", {"model/w": in_ranges(values(0), [])})
    assert found(folder) == ["state.json: seed: must be at least 0, got -1"]


# -- format 1


def test_format_1_is_verified_by_the_sums_of_its_archives(tmp_path: Path) -> None:
    folder = tmp_path / "step-3"
    shutil.copytree(FIXTURE / "step-3", folder)
    assert check(folder, jobs=2).problems == []
    assert check(folder).format == 1
    folder = complete(write(tmp_path / "step-4", {"model/w": in_ranges(values(0), [])}))
    path = folder / "__0_0.distcp"
    flip(path, path.read_bytes().index(values(0).numpy().tobytes()))
    (line,) = found(folder)
    assert line.startswith("__0_0.distcp: bytes 0 to ")
    assert line.endswith("differ from those that were saved (archive/data/0 has another CRC-32)")


def test_an_archive_that_is_none_is_named(tmp_path: Path) -> None:
    folder = complete(write(tmp_path / "step-3", {"model/w": in_ranges(values(0), [])}))
    path = folder / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    (line,) = found(folder)
    assert "are no archive of a tensor" in line


def test_a_chunk_that_the_index_of_format_1_lacks_is_damage(tmp_path: Path) -> None:
    folder = complete(write(tmp_path / "step-3", {"model/w": in_ranges(values(0), [64])}))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["model/w"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert found(folder) == [f"{folder}: model/w: pieces have 64 elements, expected 128"]
