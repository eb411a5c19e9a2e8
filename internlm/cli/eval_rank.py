"""One rank of ``internlm eval``: a model without an optimizer, its parameters from a checkpoint, and the table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist
from torch import nn

from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.checkpoint.model_loading import load_parameters, newest_checkpoint
from internlm.cli.ckpt_output import print_json, reports_storage_errors, say, table
from internlm.cli.rank import join_ranks
from internlm.config import masked_dict
from internlm.core.context import global_context as gpc
from internlm.core.scheduler import Scheduler, TokenCrossEntropy
from internlm.eval import measure, token_bytes_of
from internlm.eval.evaluate import Measured
from internlm.initialize.build_trainer import build_scheduler
from internlm.initialize.launch import leave_at_exit
from internlm.train.build_data import build_valid_loader_with_data_type
from internlm.train.build_model import create_model
from internlm.train.parallelize import initialize_model_and_parallel_communicator
from internlm.utils.errors import ConfigError, Problem, naming_lost_ranks
from internlm.utils.logger import get_logger
from internlm.utils.progress import in_phase


@dataclass
class _Evaluated:
    """Model that is evaluated, and the scheduler that runs it."""

    model: nn.Module
    scheduler: Scheduler


def evaluate_rank(arguments: argparse.Namespace) -> None:
    """Evaluate the checkpoint ``arguments.ckpt``; rank 0 prints the results.

    Raises:
        UserError: Something that the user can fix prevents the evaluation.
    """
    join_ranks(arguments)
    leave_at_exit()
    config = gpc.config
    loaders = build_valid_loader_with_data_type()
    if not loaders:
        message = "is not set, so there is no data to evaluate on"
        raise ConfigError(Problem("data.valid_folder", message, "Pass --set data.valid_folder=FOLDER"))
    path = config.data.tokenizer_path
    token_bytes = token_bytes_of(path, config.model.vocab_size) if path else None
    # Before the model is built, which takes long for a large one.
    exchange = Exchange()
    location = find_checkpoint(arguments.ckpt, exchange)
    with naming_lost_ranks():
        model = create_model(deferred=True, trains=False)
        model, _ = initialize_model_and_parallel_communicator(model, loads_all=True)
        scheduler = build_scheduler(TokenCrossEntropy(model), types=1)
        step = load_parameters(model, location, masked_dict(config), exchange, config.ckpt.allow_model_changes)
        with in_phase("evaluation"):
            total, by_type = measure(_Evaluated(model, scheduler), loaders, token_bytes)
    if dist.get_rank() == 0:
        _print(location, step, [*by_type.items(), ("total", total)], arguments.json)


def find_checkpoint(location: str, exchange: Exchange) -> str:
    """Return ``location`` if it is a checkpoint, otherwise that of the newest one in this folder; collective.

    Raises:
        CheckpointError: It is a folder without a committed checkpoint, or cannot be read.
    """
    found = [""]
    # Rank 0 decides for all: a run may be saving to the folder.
    with exchange.failing_together():
        if dist.get_rank() == 0:
            found = [reports_storage_errors(newest_checkpoint)(location)]
    return exchange.broadcast(found[0])


def _print(location: str, step: int | None, results: Sequence[tuple[str, Measured]], as_json: bool) -> None:
    outer, name = split_checkpoint(location)
    path = open_storage(outer).path(name)
    if as_json:
        *types, total = ({"type": name, **_values(measured)} for name, measured in results)
        print_json({"checkpoint": path, "step": step, "types": types, "total": total})
        return
    say(path if step is None else f"{path} (step {step})")
    for line in table([*_rows(results)], right=range(1, 6)):
        say(line)
    if results[-1][1].bytes is None:
        get_logger().info("bits per byte are not reported, since data.tokenizer_path is not set")


def _values(measured: Measured) -> dict[str, float | None]:
    derived = {name: getattr(measured, name) for name in ("loss", "perplexity", "accuracy", "bits_per_byte")}
    return {**derived, **{key: value for key, value in asdict(measured).items() if key != "loss_sum"}}


def _rows(results: Sequence[tuple[str, Measured]]) -> Iterator[list[str]]:
    has_bytes = results[-1][1].bytes is not None
    yield ["type", "tokens", "loss", "perplexity", "accuracy", *(["bits per byte"] if has_bytes else [])]
    for name, measured in results:
        figures = [f"{measured.loss:.6f}", f"{measured.perplexity:.6g}", f"{measured.accuracy:.4f}"]
        figures += [] if measured.bits_per_byte is None else [f"{measured.bits_per_byte:.6f}"]
        yield [name, str(measured.tokens), *figures]
