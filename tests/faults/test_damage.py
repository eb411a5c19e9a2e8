"""Checkpoints whose files were truncated (F6), changed by a bit (F7), deleted, swapped (F8), or made to do harm (F19).

The newest checkpoint is damaged. A run must find that before its first step, name it, and continue with the bits of the
snapshot before it.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.manifest import checksum
from internlm.checkpoint.storage import MANIFEST
from tests.faults.disk import Tree, write_tree
from tests.faults.recorded_runs import Recording, Resumed, Saved, Scenario, record, resume_each
from tests.unit.checkpoint.samples import Evil, damage

SCENARIO = Scenario()
NEWEST, BEFORE = "step-4", "snapshot-1"
STATE, SHARDS = "state.json", ("rank-00000.bin", "rank-00001.bin")
FILES = (MANIFEST, STATE, *SHARDS)
#: Bits that are flipped in checkpoints that are verified, and in some that a run resumes from; without and with --wide.
VERIFIED, MANY_VERIFIED = 150, 1000
RESUMED, MANY_RESUMED = 25, 250
#: Bytes by which the memory of a rank may grow when it reads a checkpoint that claims to be huge.
ALLOWED_MEMORY = 100 << 20


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Path]:
    """A run with two snapshots and a checkpoint, and its folder."""
    folder = tmp_path_factory.mktemp("damage")
    return record(SCENARIO, folder), folder


@pytest.fixture
def tree(recorded: tuple[Recording, Path]) -> Tree:
    """The save folder of the run, without its lease."""
    disk = recorded[0].disk
    return {name: content for name, content in disk.after(len(disk.calls)).items() if "lease" not in name}


def _content(tree: Tree, file: str, checkpoint: str = NEWEST) -> bytes:
    content = tree[f"{checkpoint}/{file}"]
    assert isinstance(content, bytes)
    return content


def _with(tree: Tree, file: str, content: bytes | Callable[[Path], object]) -> Tree:
    return {**tree, f"{NEWEST}/{file}": content}


def _without(tree: Tree, file: str) -> Tree:
    return {name: content for name, content in tree.items() if name != f"{NEWEST}/{file}"}


def _assert_all_fall_back(
    recorded: tuple[Recording, Path], damages: Sequence[tuple[Tree, str]], timeout: float = 120
) -> list[Resumed]:
    """Resume from each tree: the damage is named with the given text, and the snapshot before is loaded."""
    recording, folder = recorded
    before = next(save for save in recording.saves if save.name == BEFORE)
    results = resume_each(SCENARIO, folder, [tree for tree, _ in damages], timeout)
    for (_, expected), ranks in zip(damages, results, strict=True):
        assert not _wrong(folder / "ckpts", before, ranks, expected), expected
    return [ranks[0] for ranks in results]


def _wrong(root: Path, before: Saved, ranks: Sequence[Resumed], expected: str) -> str:
    """Return what is wrong with a run that should have fallen back, or an empty string."""
    first = ranks[0]
    if first.message != f"resumed from {root}/{BEFORE} at step 3 ({NEWEST} did not verify)":
        return first.message
    if len(first.warnings) != 1 or f"{NEWEST} does not verify: {root}/{NEWEST}" not in first.warnings[0]:
        return str(first.warnings)
    if expected not in first.warnings[0]:
        return f"expected {expected!r} in {first.warnings[0]!r}"
    is_same = tuple(rank.digest for rank in ranks) == before.digests and first.step == before.step
    return "" if is_same else "other values"


@pytest.mark.fault("F6")
def test_truncated_files_are_found_before_the_first_step(
    recorded: tuple[Recording, Path], tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    damages = []
    for file in FILES:
        content = _content(tree, file)
        for part in (0, 0.5, 0.99):
            size = int(len(content) * part)
            sizes = "" if file == MANIFEST else f"{file}: {size} bytes, manifest says {len(content)}"
            damages.append((_with(tree, file, content[:size]), sizes or f"{NEWEST}/{file}: expected "))
    record_property("faults", len(damages))
    _assert_all_fall_back(recorded, damages)


def _flipped(tree: Tree, choices: random.Random) -> tuple[str, bytes]:
    """Choose a file, half of the time by its size, and flip one of its bits."""
    weights = [len(_content(tree, file)) for file in FILES] if choices.random() < 0.5 else [1] * len(FILES)
    (file,) = choices.choices(FILES, weights)
    content = bytearray(_content(tree, file))
    content[choices.randrange(len(content))] ^= 1 << choices.randrange(8)
    return file, bytes(content)


@pytest.mark.fault("F7")
def test_every_flipped_bit_is_detected(
    request: pytest.FixtureRequest, tree: Tree, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    storage = LocalStorage(tmp_path)
    write_tree(tree, tmp_path)
    assert not list(damage(storage, NEWEST))
    flips = MANY_VERIFIED if request.config.getoption("--wide") else VERIFIED
    missed = []
    for seed in range(flips):
        file, content = _flipped(tree, random.Random(seed))
        (tmp_path / NEWEST / file).write_bytes(content)
        found = list(damage(storage, NEWEST))
        if not found or not found[0].where.startswith(f"{tmp_path}/{NEWEST}/{file}"):
            missed.append((seed, file, found))
        (tmp_path / NEWEST / file).write_bytes(_content(tree, file))
    record_property("faults", flips)
    record_property("corruptions", f"{flips - len(missed)}/{flips}")
    assert missed == []


@pytest.mark.fault("F7")
def test_a_run_resumes_from_no_checkpoint_with_a_flipped_bit(
    request: pytest.FixtureRequest,
    recorded: tuple[Recording, Path],
    tree: Tree,
    record_property: Callable[[str, object], None],
) -> None:
    """Unless it did not read the bit: each rank reads the pieces that it needs."""
    flips = MANY_RESUMED if request.config.getoption("--wide") else RESUMED
    record_property("faults", flips)
    chosen = [_flipped(tree, random.Random(f"resumed {seed}")) for seed in range(flips)]
    damages = [(_with(tree, file, content), f"{NEWEST}/{file}: ") for file, content in chosen]
    _assert_all_fall_back(recorded, damages, timeout=280)


@pytest.mark.fault("F8")
def test_missing_and_swapped_files_are_named(
    recorded: tuple[Recording, Path], tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    missing = dict.fromkeys(SHARDS, "is missing") | {MANIFEST: f"{MANIFEST} is missing", STATE: "does not exist"}
    damages = [(_without(tree, file), text) for file, text in missing.items()]
    damages += [(_with(tree, file, _content(tree, file, BEFORE)), f"{NEWEST}/{file}: ") for file in FILES]
    first, second = (_content(tree, file) for file in SHARDS)
    damages.append((_with(_with(tree, SHARDS[0], second), SHARDS[1], first), f"{NEWEST}/rank-0000"))
    record_property("faults", len(damages))
    _assert_all_fall_back(recorded, damages)


# -- hostile files


def _manifest(tree: Tree, change: Callable[[dict[str, Any]], object]) -> Tree:
    """Change the manifest, with a checksum that is right."""
    content = json.loads(_content(tree, MANIFEST))
    del content["checksum"]
    change(content)
    rest = json.dumps(content, separators=(",", ":")).encode()[1:]
    return _with(tree, MANIFEST, f'{{"checksum": "{checksum(rest)}",\n'.encode() + rest)


def _rename_file(name: str) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(SHARDS[0])
        for tensor in manifest["tensors"].values():
            tensor["pieces"] = [[name if part == SHARDS[0] else part for part in piece] for piece in tensor["pieces"]]

    return change


def _absurd_tensor(manifest: dict[str, Any]) -> None:
    record = next(iter(manifest["tensors"].values()))
    record["shape"] = [1 << 20] * 3
    record["pieces"] = [[SHARDS[0], 0, [0, 0, 0], [1 << 20] * 3, "0" * 32]]


def _absurd_size(manifest: dict[str, Any]) -> None:
    manifest["files"][STATE]["size"] = 1 << 50


def _huge(path: Path) -> None:
    """Make a file with the size of a large disk and nothing in it."""
    path.touch()
    os.truncate(path, 1 << 40)


def _deep() -> bytes:
    rest = b'"format":2,' + b'"x":' + b"[" * 200_000
    return f'{{"checksum": "{checksum(rest)}",\n'.encode() + rest


@pytest.mark.fault("F19")
def test_hostile_files_are_refused_and_nothing_is_executed(
    recorded: tuple[Recording, Path], tree: Tree, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    """Nor is a link followed, a pipe waited for, or memory allocated for what a file claims to hold."""
    proof = tmp_path / "proof"
    shutil.rmtree(tmp_path / "outside", ignore_errors=True)
    write_tree({"outside": None, **{f"outside/{file}": _content(tree, file) for file in FILES}}, tmp_path)
    evil = pickle.dumps(Evil(proof))
    refused = "String should match pattern"
    damages: list[tuple[Tree, str]] = []
    for file in FILES:
        link = functools.partial(_link, tmp_path / "outside" / file)
        damages += [
            (_with(tree, file, link), "is a symbolic link"),
            (_with(tree, file, os.mkfifo), "expected a regular file"),
            (_with(tree, file, evil), f"{NEWEST}/{file}: "),
            (_with(tree, file, _huge), f"{NEWEST}/{file}: "),
        ]
    damages += [
        (_manifest(tree, _rename_file(name)), refused)
        for name in ("../outside/rank-00000.bin", f"{tmp_path}/outside/rank-00000.bin", "..", "a/b/c")
    ]
    damages += [
        (_manifest(tree, _absurd_tensor), f"{NEWEST}/{MANIFEST}: "),
        (_manifest(tree, _absurd_size), "manifest says 1125899906842624"),
        (_with(tree, MANIFEST, _deep()), f"{NEWEST}/{MANIFEST}: "),
    ]
    record_property("faults", len(damages))
    results = _assert_all_fall_back(recorded, damages)
    assert results[-1].memory - results[0].memory < ALLOWED_MEMORY
    assert not proof.exists()


def _link(target: Path, path: Path) -> None:
    path.symlink_to(target)
