"""``internlm ckpt``: what its commands print, their exit codes, and what they leave alone."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.checkpoint import comparison, lease
from internlm.checkpoint.comparison import compare_tensor
from internlm.checkpoint.lease import LEASE_FILE, parse_owner, this_owner, to_bytes
from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.saved_checkpoint import open_checkpoint
from internlm.cli import ckpt_content
from internlm.cli.ckpt_output import format_size
from internlm.cli.main import EXIT_INTERRUPTED, main
from tests.unit.checkpoint.samples import complete, in_ranges, run_state, save, write

VALUES = torch.arange(48.0).view(6, 8)


def checkpoint(folder: Path, step: int, values: Tensor = VALUES, split: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {"model/w": in_ranges(values, [split]), "optimizer/main/w": in_ranges(-values, [16])}
    return save(folder / f"step-{step}", tensors, step)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints of format 2, and an older one of format 1."""
    for step in (30, 40, 50):
        checkpoint(tmp_path / "run", step)
    complete(write(tmp_path / "run" / "step-20", {"model/w": in_ranges(VALUES, [20])}))
    return tmp_path / "run"


class Run:
    """Outcome of a command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        try:
            self.code = main(["ckpt", *map(str, arguments)]) or 0
        except SystemExit as end:
            self.code = int(end.code or 0)
        self.out, self.err = capsys.readouterr()
        self.lines = self.out.splitlines()


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    """Return the names in a folder that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def break_file(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# -- ls


def test_checkpoints_are_listed_newest_first_with_their_status(folder: Path, capsys: Any) -> None:
    shutil.copytree(folder / "step-50", folder / "step-60.tmp-a1b2")
    shutil.copytree(folder / "step-40", folder / "step-45.deleting-a1b2")
    (folder / "step-40").rename(folder / "step-40.replaced-a1b2")
    save(folder / "snapshot-1", {"model/w": in_ranges(VALUES, [])}, 55)
    break_file(folder / "step-30" / "manifest.json")
    (folder / "7").mkdir()
    (folder / "7" / "model_tp0_pp0.pt").touch()
    (folder / "notes").write_text("mine")
    before = content_of(folder)
    run = Run(capsys, "ls", folder)
    assert run.code == 0
    rows = [line.split() for line in run.lines[1:8]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("step-60.tmp-a1b2", "60", "unfinished"),
        ("snapshot-1", "55", "snapshot"),
        ("step-50", "50", "committed"),
        ("step-45.deleting-a1b2", "45", "deleting"),
        ("step-40.replaced-a1b2", "40", "replaced"),
        ("step-30", "30", "damaged"),
        ("step-20", "20", "committed"),
    ]
    assert [row[-3:-1] for row in (rows[2], rows[6])] == [["2", "2"], ["1", "2"]]  # format and ranks
    assert run.lines[8].startswith(f"{folder}/step-30/manifest.json: expected the checksum ")
    assert run.lines[9].startswith(f"{folder} holds checkpoints in the format of older versions of InternEvo")
    listed = json.loads(Run(capsys, "ls", folder, "--json").out)
    (newest,) = [entry for entry in listed["checkpoints"] if entry["name"] == "step-50"]
    files = [path for path in (folder / "step-50").iterdir() if path.name != "manifest.json"]
    assert newest["size"] == sum(path.stat().st_size for path in files)
    assert newest["saved"] == (folder / "step-50" / "manifest.json").stat().st_mtime
    assert content_of(folder) == before


def test_ls_names_a_manifest_that_was_removed(tmp_path: Path, capsys: Any) -> None:
    folder = save(tmp_path / "step-3", {"model/w": in_ranges(VALUES, [])})
    (folder / "manifest.json").unlink()
    assert f"{folder}: manifest.json is missing. Choose another checkpoint" in Run(capsys, "ls", tmp_path).lines


def test_commands_name_a_folder_that_cannot_be_read_and_go_on(unprivileged: Path, capsys: Any) -> None:
    folder = unprivileged / "run"
    for step in (20, 30, 40):
        checkpoint(folder, step)
    shutil.copytree(folder / "step-20", folder / "step-50.tmp-a1b2")
    unreadable = [folder / "step-40", folder / "step-50.tmp-a1b2"]
    for path in unreadable:
        path.chmod(0)
    expected = f"{folder}/step-40: cannot be read (permission denied). Make it readable, and start again"
    run = Run(capsys, "ls", folder)
    assert (run.code, run.lines[-1]) == (0, expected)
    statuses = [line.split()[-1] for line in run.lines[1:5]]
    assert statuses == ["unfinished", "unreadable", "committed", "committed"]
    run = Run(capsys, "verify", folder)
    assert (run.code, [line.partition(" (")[0] for line in run.lines]) == (
        2,
        [f"{folder}/step-40: cannot be read", "step-30: verifies", "step-20: verifies"],
    )
    assert Run(capsys, "prune", folder, "--keep-last", 1, "--yes").code == 0
    assert names(folder) == ["step-30", "step-40", "step-50.tmp-a1b2"]
    for path in unreadable:
        path.chmod(0o700)


def test_a_folder_without_checkpoints_is_no_error(tmp_path: Path, capsys: Any) -> None:
    assert Run(capsys, "ls", tmp_path).lines == [f"{tmp_path} holds no checkpoints"]


# -- show


def test_show_prints_what_a_checkpoint_contains(folder: Path, capsys: Any) -> None:
    run = Run(capsys, "show", folder / "step-50")
    assert run.code == 0
    assert run.lines[0] == str(folder / "step-50")
    shown = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in run.lines[1:9] if line.startswith("  ")}
    assert shown["step"] == "50, of which 1 skipped"
    assert shown["model"] == "model_type=LLAMA2, num_layers=2"
    assert "  optimizer  float32        1       2  192 bytes" in run.lines
    groups = json.loads(Run(capsys, "show", folder / "step-20", "--json").out)["groups"]
    assert groups == [{"section": "model", "dtype": "float32", "tensors": 1, "pieces": 4, "bytes": 192}]


def test_show_lists_tensors(folder: Path, capsys: Any) -> None:
    assert Run(capsys, "show", folder / "step-50", "--tensors").lines == [
        "tensor            dtype    shape   pieces  bytes",
        "model/w           float32  [6, 8]       4    192",
        "optimizer/main/w  float32  [6, 8]       2    192",
    ]


def test_show_masks_secrets_that_earlier_versions_saved(tmp_path: Path, capsys: Any) -> None:
    state = run_state(20)
    state["config"]["monitor"] = {"alert": {"feishu_alert_address": "https://host/hook/secret-token"}}
    folder = complete(write(tmp_path / "step-20", {"model/w": in_ranges(VALUES, [])}), json.dumps(state))
    for option in ("--config", "--json"):
        shown = Run(capsys, "show", folder, option).out
        assert "https://host/***" in shown
        assert "secret-token" not in shown


# -- verify


def test_verify_reads_all_checkpoints_of_a_folder(folder: Path, capsys: Any) -> None:
    before = content_of(folder)
    run = Run(capsys, "verify", folder)
    assert run.code == 0
    assert [line.partition(" (")[0] for line in run.lines] == [f"step-{step}: verifies" for step in (50, 40, 30, 20)]
    assert "format 1 has no checksums but the CRC-32 of its tensors" in run.lines[-1]
    assert content_of(folder) == before


def test_verify_prints_the_first_bad_bytes_and_the_exit_code_is_2(folder: Path, capsys: Any) -> None:
    break_file(folder / "step-40" / "rank-00000.bin")
    (folder / "step-40" / "notes").write_text("mine")
    (folder / "step-60").mkdir()
    run = Run(capsys, "verify", folder, "--jobs", 2)
    assert run.code == 2
    assert run.lines[0] == "step-60: unfinished, not verified"
    assert run.lines[2] == f"{folder}/step-40/notes: does not belong to the checkpoint"
    bad = rf"{folder}/step-40/rank-00000.bin: bytes \d+ to 384 differ from those that were saved \(.*/w\)\. Choose .*"
    assert re.fullmatch(bad, run.lines[3])
    assert Run(capsys, "verify", folder / "step-40").code == 2
    assert Run(capsys, "verify", folder / "step-50").code == 0


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_a_save_or_a_deletion_left_is_no_damage(command: str, folder: Path, capsys: Any) -> None:
    for name, reason in (
        ("step-50.tmp-a1b2", "the save was interrupted before it was committed"),
        ("step-40.deleting-a1b2", "its deletion was interrupted"),
    ):
        (folder / name.partition(".")[0]).rename(folder / name)
        (folder / name / "manifest.json").unlink()
        run = Run(capsys, command, folder / name)
        assert run.code == 2
        assert f"{folder / name}: unfinished: {reason}. Choose another checkpoint" in run.out + run.err


def test_verify_prints_the_outcome_as_json(folder: Path, capsys: Any) -> None:
    break_file(folder / "step-40" / "rank-00000.bin")
    break_file(folder / "step-30" / "manifest.json")
    (folder / "step-50" / "notes").write_text("mine")
    (folder / "step-60").mkdir()
    run = Run(capsys, "verify", folder, "--json")
    found = json.loads(run.out)
    assert (run.code, found["verifies"], found["unfinished"]) == (2, False, ["step-60"])
    assert [(row["name"], row["verifies"], row["format"]) for row in found["checkpoints"]] == [
        ("step-50", True, 2), ("step-40", False, 2), ("step-30", False, None), ("step-20", True, 1)
    ]  # fmt: skip
    assert found["checkpoints"][0]["unlisted"] == ["notes"]
    assert found["checkpoints"][1]["problems"][0].startswith(f"{folder}/step-40/rank-00000.bin: bytes ")
    assert found["checkpoints"][2]["problems"][0].startswith(f"{folder}/step-30/manifest.json: ")
    run = Run(capsys, "verify", folder / "step-50", "--json")
    (only,) = json.loads(run.out)["checkpoints"]
    assert (run.code, only["path"], only["problems"]) == (0, f"{folder}/step-50", [])


# -- diff


def test_a_checkpoint_equals_itself_in_other_pieces(folder: Path, tmp_path: Path, capsys: Any) -> None:
    other = checkpoint(tmp_path / "other", 50, split=31)
    for options in ((), ("--bitwise",)):
        run = Run(capsys, "diff", folder / "step-50", other, *options)
        assert (run.code, run.lines) == (0, ["2 of 2 tensors are bitwise equal; 0 values of the state differ"])


def test_diff_prints_how_tensors_and_values_differ(folder: Path, tmp_path: Path, capsys: Any) -> None:
    values = VALUES.clone()
    values[3, 2] += 2
    values[5, 7] = 40
    other = checkpoint(tmp_path / "other", 41, values)
    run = Run(capsys, "diff", folder / "step-40", other, "--only", "model", "--only", "state")
    assert run.code == 1
    assert run.lines == [
        "model/w: 2 of 48 elements differ, first at [3, 2]; by at most 7, relatively 0.149",
        "sampler: [40, 4, 16] → [41, 4, 16]",
        "train_state.step: 40 → 41",
        "0 of 1 tensors are bitwise equal; 2 values of the state differ",
    ]
    assert (
        Run(capsys, "diff", folder / "step-40", other, "--bitwise", "--only", "model").lines[0] == "model/w: different"
    )
    assert Run(capsys, "diff", folder / "step-40", other, "--only", "rng").code == 0
    compared = json.loads(Run(capsys, "diff", folder / "step-40", other, "--json").out)
    assert compared["equal"] is False
    assert compared["tensors"][0]["first"] == [3, 2]
    assert compared["state"][1] == {"key": "train_state.step", "first": 40, "second": 41}


def test_what_the_encoding_of_stdout_lacks_is_escaped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["ckpt", "diff", f"{folder}/step-40", f"{folder}/step-50", "--only", "state"]) == 1
    stdout.seek(0)
    assert r"train_state.step: 40 \u2192 50" in stdout.read()


def test_diff_compares_checkpoints_of_two_formats(folder: Path, capsys: Any) -> None:
    run = Run(capsys, "diff", folder / "step-50", folder / "step-20", "--only", "model")
    assert (run.code, run.lines) == (0, ["1 of 1 tensors are bitwise equal"])
    run = Run(capsys, "diff", folder / "step-50", folder / "step-20", "--only", "optimizer")
    assert run.lines[0] == f"optimizer/main/w: only in {folder}/step-50"


def test_diff_of_a_damaged_checkpoint_is_an_error(folder: Path, capsys: Any) -> None:
    break_file(folder / "step-40" / "rank-00000.bin")
    run = Run(capsys, "diff", folder / "step-40", folder / "step-50")
    assert run.code == 2
    assert "differ from those that were saved" in run.err


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, NAN], [1.0, NAN], None),
        ([0.0, 1.0], [-0.0, 1.0], (1, [0], 0.0, 0.0)),
        ([1.0, 2.0], [1.0, NAN], (1, [1], INF, INF)),
        ([1.0, 2.0], [INF, 2.0], (1, [0], INF, INF)),
        ([3.0, 2.0], [-1.0, 2.5], (2, [0], 4.0, 4 / 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex128])
def test_differences_are_those_of_bits(
    one: list[float], other: list[float], expected: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = [
        save(tmp_path / f"step-{step}", {"model/w": in_ranges(torch.tensor(values, dtype=dtype), [])}, step)
        for step, values in enumerate((one, other))
    ]
    opened = [open_checkpoint(LocalStorage(path.parent), path.name) for path in saved]
    found = compare_tensor("model/w", *opened)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.different, found.first, found.largest_absolute) == expected[:3]
        assert found.largest_relative == pytest.approx(expected[3])


def test_large_tensors_are_compared_in_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "BOX_ELEMENTS", 5)
    values = VALUES.clone()
    values[4, 6], values[4, 1], values[5, 0] = 0, -33, 41
    paths = checkpoint(tmp_path / "a", 3), checkpoint(tmp_path / "b", 3, values, split=7)
    opened = [open_checkpoint(LocalStorage(path.parent), path.name) for path in paths]
    read: list[int] = []
    whole = comparison._read
    monkeypatch.setattr(comparison, "_read", lambda *args: (read.append(math.prod(args[-1])), whole(*args))[1])
    found = compare_tensor("model/w", *opened)
    assert found is not None
    assert (found.different, found.elements, found.first, found.largest_absolute) == (3, 48, [4, 1], 66)
    assert max(read) <= 5
    assert sum(read) == 2 * 48


@pytest.mark.parametrize(
    ("values", "message"),
    [(torch.zeros(8, 6), "shape [6, 8] → [8, 6]"), (VALUES.half(), "dtype float32 → float16")],
)
def test_other_shapes_and_dtypes_are_differences(
    values: Tensor, message: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    other = save(tmp_path / "step-50", {"model/w": in_ranges(values, [])}, 50)
    run = Run(capsys, "diff", folder / "step-50", other, "--only", "model")
    assert (run.code, run.lines[0]) == (1, f"model/w: {message}")


# -- prune


def test_prune_deletes_nothing_without_yes(folder: Path, capsys: Any) -> None:
    before = content_of(folder)
    run = Run(capsys, "prune", folder, "--keep-last", 1)
    assert run.code == 0
    assert [line.split()[0] for line in run.lines[2:5]] == ["step-40", "step-30", "step-20"]
    assert run.lines[-1].startswith("nothing was deleted; --yes deletes 3 folders, ")
    assert content_of(folder) == before


def test_prune_prints_what_it_deletes_as_json(folder: Path, capsys: Any) -> None:
    break_file(folder / "step-50" / "rank-00000.bin")
    before = content_of(folder)
    for yes in ([], ["--yes"]):
        assert content_of(folder) == before
        run = Run(capsys, "prune", folder, "--keep-last", 1, "--json", *yes)
        found = json.loads(run.out)
        assert (run.code, found["deleted"]) == (0, bool(yes))
        assert [entry["name"] for entry in found["checkpoints"]] == ["step-30", "step-20"]
        assert found["notes"][0].startswith(f"{folder}/step-50/rank-00000.bin: bytes ")
        assert found["notes"][1:] == ["step-40 verifies and is kept"]
    assert names(folder) == ["step-40", "step-50"]
    assert json.loads(Run(capsys, "prune", folder, "--keep-last", 3, "--json").out)["deleted"] is False


def test_prune_keeps_the_newest_and_each_of_a_multiple(folder: Path, capsys: Any) -> None:
    run = Run(capsys, "prune", folder, "--keep-last", 2, "--keep-every", 20, "--yes")
    assert run.code == 0
    assert names(folder) == ["step-20", "step-40", "step-50"]
    assert Run(capsys, "prune", folder, "--keep-last", 3).lines == ["nothing to delete"]


def test_prune_keeps_the_newest_checkpoint_that_verifies(folder: Path, capsys: Any) -> None:
    break_file(folder / "step-50" / "rank-00000.bin")
    break_file(folder / "step-40" / "manifest.json")
    run = Run(capsys, "prune", folder, "--keep-last", 1, "--yes")
    assert run.code == 0
    assert "step-30 verifies and is kept" in run.lines
    assert names(folder) == ["step-30", "step-40", "step-50"]


def test_prune_deletes_nothing_if_no_checkpoint_verifies(folder: Path, capsys: Any) -> None:
    for step in (30, 40, 50):
        (folder / f"step-{step}" / "rank-00000.bin").unlink()
    shutil.rmtree(folder / "step-20")
    run = Run(capsys, "prune", folder, "--keep-last", 1, "--yes")
    assert run.code == 2
    assert "none of its checkpoints verifies, so nothing is deleted" in run.err
    assert len(list(folder.iterdir())) == 3


def test_prune_deletes_what_unfinished_saves_left_only_if_asked(folder: Path, capsys: Any) -> None:
    for name in ("step-60.tmp-a1b2", "step-45.deleting-a1b2", "step-50.replaced-a1b2"):
        shutil.copytree(folder / "step-50", folder / name)
    (folder / "step-40").rename(folder / "step-40.replaced-e5f6")  # its successor was not committed
    (folder / "step-98").mkdir()
    (folder / "step-99").mkdir()
    (folder / "step-99" / "thesis.tex").write_text("mine")
    assert Run(capsys, "prune", folder, "--keep-last", 9, "--yes").lines == ["nothing to delete"]
    run = Run(capsys, "prune", folder, "--keep-last", 9, "--yes", "--unfinished")
    assert run.code == 0
    assert names(folder) == ["step-20", "step-30", "step-40.replaced-e5f6", "step-50", "step-99"]


def test_prune_deletes_what_it_can_and_names_the_rest(unprivileged: Path, capsys: Any) -> None:
    folder = unprivileged / "run"
    for step in (20, 30, 40):
        checkpoint(folder, step)
    (folder / "step-30").chmod(0o500)
    shutil.copytree(folder / "step-20", folder / "step-60.tmp-a1b2")
    run = Run(capsys, "prune", folder, "--keep-last", 1, "--unfinished", "--yes")
    (left,) = folder.glob("step-30.deleting-*")
    assert (run.code, names(folder)) == (2, [left.name, "step-40"])
    assert run.err.endswith(f"{left}: permission denied. Make it writable, or delete it\n")
    assert "deleted" not in run.lines[-1]
    left.chmod(0o700)


def test_prune_refuses_a_folder_that_a_live_run_owns(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / LEASE_FILE).write_bytes(to_bytes(replace(this_owner("training"), host="far", boot_id="another")))
    before = content_of(folder)
    assert Run(capsys, "ls", folder).lines[-1].startswith(f"{folder} is owned by a live run (host far, pid ")
    # Whoever wants to prune watches the lease for seconds; this owner renews it whenever it is looked at.
    monkeypatch.setattr(lease, "LeaseTimes", partial(lease.LeaseTimes, watch=0.1, poll=0.01))
    read, count = lease._read, itertools.count(1)

    def renewed(storage: LocalStorage) -> bytes:
        owner = parse_owner(read(storage) or b"")
        assert owner is not None
        return to_bytes(replace(owner, renewed=next(count)))

    monkeypatch.setattr(lease, "_read", renewed)
    run = Run(capsys, "prune", folder, "--keep-last", 1, "--yes")
    assert run.code == 2
    assert "owned by a live run (host far, pid " in run.err
    (folder / ".lock").unlink()
    assert content_of(folder) == before


def test_a_lease_that_is_not_renewed_is_no_live_run(folder: Path, capsys: Any) -> None:
    (folder / LEASE_FILE).write_bytes(to_bytes(replace(this_owner("training"), host="far", boot_id="another")))
    os.utime(folder / LEASE_FILE, (time.time() - 100,) * 2)
    assert "live run" not in Run(capsys, "ls", folder).out


# -- bad input


STATE = "{0}/step-50/state.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ls", "{0}/none"],
            "{0}/none: no such folder ({0} has step-20/, step-30/, step-40/, step-50/). Pass a folder",
        ),
        (["ls", "{0}/step-50"], "{0}/step-50: is one checkpoint, not a folder of them. Pass the folder around it"),
        (["prune", "{0}/step-50", "--keep-last", "1"], "{0}/step-50: is one checkpoint, not a folder of them"),
        (["ls", "{0}/step-50/state.json"], f"{STATE}: is not a folder, or is below a file. Check the path"),
        (["verify", "{0}/step-50/state.json"], f"{STATE}: is not a folder, or is below a file. Check the path"),
        (["show", "{0}/step-50/state.json"], f"{STATE}: is not a folder, or is below a file. Choose a step-N folder"),
        (["show", "{0}"], "{0}: is a folder of checkpoints, with step-50, step-40, step-30. Pass one of them"),
        (["show", "{0}/step-51"], "{0}/step-51: no such checkpoint ({0} has step-50, step-40, step-30, step-20)"),
        (["verify", "{0}/step-51"], "{0}/step-51: no such checkpoint ({0} has step-50, step-40, step-30, step-20)"),
        (["diff", "{0}/step-50", "{0}/.."], "{1}: not a checkpoint: it has no manifest.json"),
        (["ls", "local:"], "'local:': names no folder"),
        (["prune", "{0}"], "internlm ckpt prune: the following arguments are required: --keep-last"),
        (["diff", "{0}", "{0}", "--only", "weights"], "--only: 'weights' is unknown. Pass one of model, optimizer"),
        (["list"], "COMMAND: 'list' is unknown."),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: list[str], message: str, folder: Path, capsys: Any) -> None:
    places = folder, folder.parent
    run = Run(capsys, *(text.format(*places) for text in arguments))
    assert (run.code, len((run.out + run.err).splitlines())) == (2, 1)
    assert (run.out + run.err).startswith(message.format(*places))


def test_a_folder_of_unfinished_saves_has_nothing_to_verify(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "step-3").mkdir()
    run = Run(capsys, "verify", tmp_path)
    assert (run.code, run.err) == (2, f"{tmp_path}: holds no committed checkpoint. Choose another folder\n")


def test_ctrl_c_ends_a_command_with_one_line(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt_content, "verify_checkpoint", interrupt)
    run = Run(capsys, "verify", folder)
    assert (run.code, run.err) == (EXIT_INTERRUPTED, "interrupted\n")


def test_names_of_a_file_cannot_control_the_terminal(tmp_path: Path, capsys: Any) -> None:
    folder = save(tmp_path / "step-3", {"model/\x1b[2Jw": in_ranges(VALUES, [])})
    assert Run(capsys, "show", folder, "--tensors").lines[1].startswith("model/\\x1b[2Jw ")


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 bytes"), (1 << 20, "1 MiB"), (999 << 20, "999 MiB"), (1000 << 20, "0.977 GiB")]
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text
