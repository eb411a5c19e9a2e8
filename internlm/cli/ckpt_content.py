"""Commands on the content of checkpoints: ``internlm ckpt show``, ``verify`` and ``diff``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from internlm.checkpoint.comparison import TensorDifference, compare_states, compare_tensor, tensors_of
from internlm.checkpoint.listing import describe
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.saved_checkpoint import Found, SavedCheckpoint, open_checkpoint
from internlm.checkpoint.storage import Storage
from internlm.checkpoint.verification import Verification
from internlm.checkpoint.verification import verify as verify_checkpoint
from internlm.cli.ckpt_output import (
    checkpoints_of_folder,
    default_jobs,
    format_size,
    format_time,
    print_json,
    reports_storage_errors,
    say,
    table,
)
from internlm.cli.ckpt_parsers import SECTIONS
from internlm.cli.commands import EXIT_DIFFERENT
from internlm.config import masked_values, nested_dict
from internlm.utils.errors import EXIT_USER_ERROR, CheckpointError, Problem

#: Config keys in the summary of ``show``, by line.
SUMMARY = {
    "model": ("model_type", "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.vocab_size",
              "model.dtype"),
    "data": ("data.seq_len", "data.micro_bsz", "data.micro_num", "data.total_steps", "data.train_folder"),
    "parallel": ("parallel.tensor.size", "parallel.tensor.mode", "parallel.pipeline.size", "parallel.weight.size",
                 "parallel.zero1.size", "parallel.zero1.fsdp"),
}  # fmt: skip


def _open(location: str) -> tuple[Storage, str, SavedCheckpoint]:
    outer, name = split_checkpoint(location)
    storage = open_storage(outer)
    return storage, name, open_checkpoint(storage, name)


# -- show -------------------------------------------------------------------------------------------------------------


@reports_storage_errors
def show(arguments: argparse.Namespace) -> None:
    """Show what a checkpoint contains.

    Raises:
        CheckpointError: It is no checkpoint, or its manifest or state does not verify.
    """
    storage, name, checkpoint = _open(arguments.checkpoint)
    state = checkpoint.state.model_dump(mode="json")
    # Earlier versions saved secrets as they were.
    state["config"] = masked_values(state["config"])
    if arguments.config:
        print_json(state["config"])
        return
    tensors = [
        {
            "name": tensor,
            "dtype": str(stored.properties.dtype).removeprefix("torch."),
            "shape": list(stored.size),
            "pieces": len(stored.chunks),
            "bytes": stored.size.numel() * stored.properties.dtype.itemsize,
        }
        for tensor, stored in tensors_of(checkpoint).items()
    ]
    if arguments.tensors:
        if arguments.json:
            print_json(tensors)
            return
        rows = [[str(value) for value in tensor.values()] for tensor in tensors]
        for line in table([("tensor", "dtype", "shape", "pieces", "bytes"), *rows], right=(3, 4)):
            say(line)
        return
    entry = describe(storage, Found(name, checkpoint.state.train_state.step, True))
    groups = _groups(tensors)
    if arguments.json:
        print_json({"path": checkpoint.where, **dataclasses.asdict(entry), "state": state, "groups": groups})
        return
    say(checkpoint.where)
    for label, text in _facts(checkpoint, state):
        say(f"  {label:<14}{text}")
    say(f"  {'saved':<14}{format_time(entry.saved)}, {format_size(entry.size)}, format {checkpoint.format}")
    rows = [[str(group[key]) for key in ("section", "dtype", "tensors", "pieces")] for group in groups]
    rows = [[*row, format_size(group["bytes"])] for row, group in zip(rows, groups, strict=True)]
    for line in table([("section", "dtype", "tensors", "pieces", "size"), *rows], right=(2, 3, 4)):
        say(f"  {line}")


def _groups(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the number and the bytes of the tensors of each section and dtype."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in tensors:
        section, dtype = tensor["name"].partition("/")[0], tensor["dtype"]
        empty = {"section": section, "dtype": dtype, "tensors": 0, "pieces": 0, "bytes": 0}
        group = groups.setdefault((section, dtype), empty)
        group["tensors"] += 1
        group["pieces"] += tensor["pieces"]
        group["bytes"] += tensor["bytes"]
    return list(groups.values())


def _facts(checkpoint: SavedCheckpoint, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield labels and texts of what the state says."""
    counters, position = checkpoint.state.train_state, checkpoint.state.position
    yield "step", f"{counters.step}, of which {counters.inf_nan_skip_batches} skipped"
    yield "tokens", str(counters.num_consumed_tokens)
    yield "data position", f"batch {position.batch}, row {position.row}, of data with fingerprint {state['data']}"
    yield "ranks", str(state["world_size"] or "unknown")
    yield "seed", str(state["seed"])
    yield "versions", ", ".join(f"{software} {version}" for software, version in state["versions"].items()) or "unknown"
    for label, keys in SUMMARY.items():
        values = {key: nested_dict.get(state["config"], key) for key in keys}
        if text := ", ".join(f"{key.removeprefix(f'{label}.')}={value}" for key, value in values.items() if value):
            yield label, text


# -- verify -----------------------------------------------------------------------------------------------------------


@reports_storage_errors
def verify(arguments: argparse.Namespace) -> int:
    """Verify a checkpoint or all checkpoints of a folder, and return the exit code.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    found = checkpoints_of_folder(arguments.path)
    if found:
        storage = open_storage(arguments.path)
        names = [entry.name for entry in found if entry.is_committed]
        if not names:
            raise CheckpointError(Problem(storage.location, "holds no committed checkpoint", "Choose another folder"))
    else:
        outer, name = split_checkpoint(arguments.path)
        storage, names = open_storage(outer), [name]
    unfinished = [entry.name for entry in found if not entry.is_committed]
    if not arguments.json:
        for name in unfinished:
            say(f"{name}: unfinished, not verified")
    outcomes = []
    for name in names:
        outcome = _verify_one(storage, name, arguments.jobs or default_jobs())
        if not arguments.json:
            _say_outcome(outcome)
        outcomes.append(outcome)
    verifies = all(outcome["verifies"] for outcome in outcomes)
    if arguments.json:
        print_json({"verifies": verifies, "checkpoints": outcomes, "unfinished": unfinished})
    return 0 if verifies else EXIT_USER_ERROR


def _verify_one(storage: Storage, name: str, jobs: int) -> dict[str, Any]:
    """Verify a checkpoint, and return the outcome: format, files and size are None if its manifest does not verify."""
    outcome: dict[str, Any] = {"name": name, "path": storage.path(name), "format": None, "files": None, "size": None}
    try:
        result = _verify_with_progress(storage, name, jobs)
    except CheckpointError as error:
        return {**outcome, "verifies": False, "problems": list(map(str, error.problems)), "unlisted": []}
    found = dataclasses.asdict(dataclasses.replace(result, problems=[]))
    return {**outcome, **found, "verifies": not result.problems, "problems": list(map(str, result.problems))}


def _say_outcome(outcome: dict[str, Any]) -> None:
    for file in outcome["unlisted"]:
        say(f"{outcome['path']}/{file}: does not belong to the checkpoint")
    for problem in outcome["problems"]:
        say(problem)
    if outcome["verifies"]:
        is_old = outcome["format"] == 1
        sums = "format 1 has no checksums but the CRC-32 of its tensors" if is_old else "checksums of all bytes"
        say(f"{outcome['name']}: verifies ({outcome['files']} files, {format_size(outcome['size'])}; {sums})")


def _verify_with_progress(storage: Storage, name: str, jobs: int) -> Verification:
    from tqdm import tqdm  # imported here, because only a terminal needs it

    with tqdm(desc=name, unit="B", unit_scale=True, leave=False, disable=None) as bar:  # None: only on a terminal

        def progress(read: int, total: int) -> None:
            bar.total = total
            bar.update(read)

        return verify_checkpoint(storage, name, jobs, progress)


# -- diff -------------------------------------------------------------------------------------------------------------


@reports_storage_errors
def diff(arguments: argparse.Namespace) -> int:
    """Compare two checkpoints, print how they differ, and return the exit code.

    Raises:
        CheckpointError: One of them is no checkpoint or is damaged.
    """
    (_, _, first), (_, _, second) = _open(arguments.first), _open(arguments.second)
    sections = arguments.only or SECTIONS
    names = sorted(name for name in {*tensors_of(first), *tensors_of(second)} if name.partition("/")[0] in sections)
    differences: list[TensorDifference] = []
    for name in names:
        difference = compare_tensor(name, first, second, arguments.bitwise)
        if difference:
            differences.append(difference)
            if not arguments.json:
                say(f"{name}: {difference.message}")
    changed = compare_states(first.state, second.state) if "state" in sections else {}
    if arguments.json:
        tensors = [dataclasses.asdict(difference) for difference in differences]
        values = [{"key": key, "first": old, "second": new} for key, (old, new) in changed.items()]
        print_json({"equal": not (tensors or values), "compared": len(names), "tensors": tensors, "state": values})
    else:
        for key, (old, new) in changed.items():
            say(f"{key}: {old!r} → {new!r}")
        values_text = f"; {len(changed)} values of the state differ" if "state" in sections else ""
        say(f"{len(names) - len(differences)} of {len(names)} tensors are bitwise equal{values_text}")
    return EXIT_DIFFERENT if differences or changed else 0
