"""Subcommand ``internlm data show``: the samples that the micro-batches of a step were read from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from internlm.cli.ckpt_output import print_json, printable, reports_storage_errors, say, table
from internlm.cli.step_location import evidence_of, locate
from internlm.config import Config, check_runnable, load_config, resolve
from internlm.config.schema.parallel import round_size_of
from internlm.core.context import ParallelMode
from internlm.core.context.layout import Layout
from internlm.core.context.parallel_context import sizes_of
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.build import build_train_loader
from internlm.data.loader import TrainLoader
from internlm.data.provenance import TracedSpan
from internlm.data.tokenizer import Tokenizer, load_tokenizer
from internlm.utils.errors import ConfigError, Problem, UserError

DEFAULT_SEED = 1024  # of the training arguments


@dataclass(frozen=True)
class _Reader:
    """Data-parallel rank, with the ranks that read its rows, and the part of a row that they read."""

    data_rank: int
    ranks: list[int]
    shard: GroupPosition = ALONE


@reports_storage_errors
def show(arguments: argparse.Namespace) -> None:
    """Print the samples of a step.

    Raises:
        UserError: The config or an option is invalid, the data has changed, or a checkpoint cannot be read.
    """
    evidence = evidence_of(resolve(arguments.config, arguments.set).config, arguments.ckpt, arguments.step)
    # The batch of a step follows from the number of processes, unless data.global_batch is set.
    world = arguments.world or evidence.world_size
    if world is None:
        message = "is unknown: there is no checkpoint that has the number of processes"
        raise UserError(Problem("--world", message, "Pass --world N, the number of processes of the run"))
    config = load_config(arguments.config, arguments.set, world)
    check_runnable(config)
    readers = _readers(config, world)
    seed = next(seed for seed in (arguments.seed, evidence.seed, DEFAULT_SEED) if seed is not None)
    loader = _loader(config, seed, len(readers))
    located = locate(config, seed, arguments.step, loader, evidence)
    if arguments.rank is not None:
        readers = [_reader_of(config, world, arguments.rank)]
    path = arguments.tokenizer or config.data.tokenizer_path
    tokenizer = load_tokenizer(path) if arguments.text and path else None
    entries = [_entry(loader, arguments, reader, tokenizer) for reader in readers]
    rows = located.plan.rows_of_step(arguments.step)
    before = evidence.before.where if evidence.before else None
    if arguments.json:
        known = {"checkpoint": before, "confirmed_by": located.confirmed_by or None, "world": world}
        doubt = located.contradiction or None
        print_json({"step": arguments.step, **rows._asdict(), **known, "contradiction": doubt, "readers": entries})
        return
    # A run may be going to reach the step, so that is no error.
    confirmed = f"; confirmed by {located.confirmed_by}" if located.confirmed_by else "; no record has this step"
    last = rows.first_row + rows.rows - 1
    say(f"step {arguments.step}: batch {rows.batch}, rows {rows.first_row} to {last}")
    say(f"position: {before or 'from the start of the run'}{confirmed}")
    for entry in entries:
        _print(entry)


def _loader(config: Config, seed: int, data_size: int) -> TrainLoader:
    """Return the training loader of the first data-parallel rank."""
    round_size = round_size_of(config.parallel.pipeline, config.model.num_chunks)
    replica = GroupPosition(0, data_size)
    return build_train_loader(config.data, config.model.vocab_size, seed, replica, round_size=round_size)[0]


# -- ranks ------------------------------------------------------------------------------------------------------------


def _readers(config: Config, world: int) -> list[_Reader]:
    """Return all data-parallel ranks."""
    # Ranks of a tensor group, and the stages of a pipeline, read the same rows.
    layout = Layout(sizes_of(config, world))
    data_ranks: dict[int, list[int]] = {}
    for group in layout.groups(ParallelMode.DATA):
        for data_rank, rank in enumerate(group):
            data_ranks.setdefault(data_rank, []).append(rank)
    return [_Reader(data_rank, sorted(ranks)) for data_rank, ranks in sorted(data_ranks.items())]


def _reader_of(config: Config, world: int, rank: int) -> _Reader:
    """Return what ``rank`` reads, which is a part of each row under isp.

    Raises:
        UserError: The rank is not in the world.
    """
    if rank >= world:
        raise UserError(Problem("--rank", f"{rank} is not a rank of the run", f"Pass a rank below --world, {world}"))
    layout = Layout(sizes_of(config, world))
    shard = ALONE
    if config.parallel.tensor.mode == "isp":
        group = layout.group_of(rank, ParallelMode.TENSOR)
        shard = GroupPosition(group.index(rank), len(group))
    return _Reader(layout.group_of(rank, ParallelMode.DATA).index(rank), [rank], shard)


# -- rows -------------------------------------------------------------------------------------------------------------


def _entry(
    loader: TrainLoader, arguments: argparse.Namespace, reader: _Reader, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return what a data-parallel rank reads in the step.

    Raises:
        ConfigError: ``--micro-batch`` is no micro-batch of the step.
    """
    count = loader.plan.micro_batches(arguments.step)
    wanted = range(count) if arguments.micro_batch is None else [arguments.micro_batch]
    if arguments.micro_batch is not None and arguments.micro_batch >= count:
        message = f"{arguments.micro_batch} is no micro-batch of step {arguments.step}"
        raise ConfigError(Problem("--micro-batch", message, f"Pass a number below {count}"))
    rows = loader.plan.rows(arguments.step, reader.data_rank)
    return {
        "data_rank": reader.data_rank,
        "ranks": reader.ranks,
        "micro_batches": [
            {
                "micro_batch": index,
                "row": rows[index] if index < len(rows) else None,
                "spans": list(_spans(loader, rows[index], reader.shard, arguments.text, tokenizer))
                if index < len(rows)
                else [],
            }
            for index in wanted
        ],
    }


def _spans(
    loader: TrainLoader, row: int, shard: GroupPosition, with_text: bool, tokenizer: Tokenizer | None
) -> Iterator[dict[str, Any]]:
    """Yield the pieces of a row that a rank reads, with token ids and texts if these are wanted."""
    # Looked up by name: rows of a user's own need not be traceable to be trained on.
    trace = getattr(loader.rows, "trace", None)
    if trace is None:
        message = "samples of this type of data cannot be traced to their files"
        raise ConfigError(Problem("data.type", message, "Tokenize the data with internlm tokenize"))
    length = loader.rows.shape.packed_length // shard.size
    start = length * shard.rank
    spans: list[TracedSpan | None] = [span.clipped(start, start + length) for span in trace(row)]
    ids = loader.rows[row].input_ids[start : start + length] if with_text else None
    for span in spans:
        if span is None:
            continue
        *_, origin = span
        entry = {**span._asdict(), **origin._asdict()}
        del entry["origin"]
        if ids is not None:
            tokens = ids[span.at : span.at + span.stop - span.begin].tolist()
            entry |= {"input_ids": tokens, "text": tokenizer.decode(tokens) if tokenizer else None}
        yield entry


def _print(entry: dict[str, Any]) -> None:
    ranks = ", ".join(map(str, entry["ranks"]))
    for micro_batch in entry["micro_batches"]:
        head = f"rank {ranks} (data rank {entry['data_rank']}), micro-batch {micro_batch['micro_batch']}"
        say("")
        if micro_batch["row"] is None:
            say(f"{head}: padding, since the step has no more rows")
            continue
        say(f"{head}: row {micro_batch['row']}")
        rows = [("at", "tokens", "of", "type", "file", "row", "bytes")]
        rows += [
            (
                str(span["at"]),
                f"[{span['begin']}, {span['stop']})",
                str(span["length"]),
                span["type_name"],
                printable(span["file"]) or "(random)",
                str(span["row"]),
                _format_bytes(span["byte"], span["bytes"]),
            )
            for span in micro_batch["spans"]
        ]
        head_line, *lines = table(rows, right=(0, 1, 2, 5, 6))
        say(f"  {head_line}")
        for line, span in zip(lines, micro_batch["spans"], strict=True):
            say(f"  {line}")
            if "input_ids" in span:
                say(f"      {span['input_ids'] if span['text'] is None else repr(span['text'])}")


def _format_bytes(first: int | None, size: int | None) -> str:
    if first is None or size is None:
        return "" if first is None else str(first)
    return f"[{first}, {first + size})"
