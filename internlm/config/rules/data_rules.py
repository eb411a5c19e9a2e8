"""Rules about the data: the batch of a step, its ramp-up, skipped batches, and what streamed data needs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from internlm.config.rules.rule import WORLD_SIZE, Rule, RunInfo, at
from internlm.config.schema import Config
from internlm.config.schema.fields import parse_rampup, parse_skip_batches
from internlm.config.schema.parallel import round_size_of
from internlm.utils.errors import Problem

#: What :func:`micro_num_of` reads.
MICRO_NUM_READS = (
    *at("data", "global_batch", "micro_bsz"),
    *at("parallel", "tensor.size", "pipeline.size", "pipeline.mode"),
    "model.num_chunks",
    WORLD_SIZE,
)


def micro_num_of(config: Config, run: RunInfo) -> int | None:
    """Return the micro-batches per step of each data-parallel rank, as ``global_batch`` implies; None without it."""
    if config.data.global_batch is None:
        return None
    # The same for every rank, as schedules and collectives of weights require; what is too much is padding.
    parallel = config.parallel
    data_size = max(1, (run.world_size or 1) // (parallel.tensor.size * parallel.pipeline.size))
    rounds = round_size_of(parallel.pipeline, config.model.num_chunks)
    return rounds * -(-config.data.global_batch // (config.data.micro_bsz * data_size * rounds))


def global_batch_is_given_once(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``micro_num``, if it is given beside ``global_batch``, is what follows from it."""
    implied, given = micro_num_of(config, run), config.data.micro_num
    if implied is not None and implied != given:
        message = f"{given}, but data.global_batch = {config.data.global_batch} implies {implied} here"
        yield Problem("data.micro_num", message, "Remove one of the two keys")


def global_batch_has_whole_rows(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``micro_bsz`` divides ``global_batch``."""
    batch, size = config.data.global_batch, config.data.micro_bsz
    if batch is not None and batch % size:
        message = f"{batch} is not divisible by data.micro_bsz = {size}"
        yield Problem("data.global_batch", message, f"Use {max(batch // size, 1) * size}, or another micro_bsz")


def skip_batches_parses(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``skip_batches`` lists batch numbers and ranges."""
    try:
        parse_skip_batches(config.data.skip_batches)
    except ValueError as error:
        yield Problem("data.skip_batches", str(error), "Example: '0-9,20', both ends included")


def rampup_leads_to_the_whole_batch(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that batch-size ramp-up is well-formed, and starts at no more than it leads to."""
    data = config.data
    try:
        rampup = parse_rampup(data.rampup_batch_size)
    except ValueError as error:
        yield Problem("data.rampup_batch_size", str(error), "Example: '2 2 100' starts at 2 and adds 2 every 100 steps")
        return
    if rampup is None:
        return
    micro_num, global_batch = data.micro_num, data.global_batch
    key, end = ("micro_num", micro_num) if global_batch is None else ("global_batch", global_batch)
    if rampup.start > end:
        message = f"start = {rampup.start} is more than data.{key} = {end}, where the ramp-up ends"
        yield Problem("data.rampup_batch_size", message, f"Start at {end} or less")
    size = data.micro_bsz
    if global_batch is not None and (rampup.start % size or rampup.increment % size):
        message = f"start = {rampup.start} and increment = {rampup.increment} are not both divisible by "
        todo = "With data.global_batch they are numbers of sequences"
        yield Problem("data.rampup_batch_size", f"{message}data.micro_bsz = {size}", todo)


def streams_have_texts_and_a_tokenizer(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that streamed data has a folder and a tokenizer."""
    required = {
        "data.train_folder": (config.data.train_folder, "a folder of texts"),
        "data.tokenizer_path": (config.data.tokenizer_path, "a sentencepiece model or a Hugging Face tokenizer folder"),
    }
    if config.data.type == "streaming":
        for key, (value, meaning) in required.items():
            if value is None:
                yield Problem(key, "missing, but data.type is 'streaming'", f"Set it to {meaning}")


def weights_have_data(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that weights are for tokenized files, that one is positive, and that changes come in order."""
    # Types are the sub-folders of tokenized files. Streams and random data have no index of samples by type.
    data, changes = config.data, [dict(change) for change in config.data.weight_changes]
    if (data.max_epochs or changes) and not data.weights:
        key = "max_epochs" if data.max_epochs else "weight_changes"
        yield Problem(f"data.{key}", "needs data.weights, which is empty", "Give the weights from the first step on")
    if data.weights and (data.train_folder is None or data.type not in ("tokenized", "megatron")):
        message = f"needs tokenized files with dataset types, got data.type = {data.type!r}"
        message += " without data.train_folder" if data.train_folder is None else ""
        yield Problem("data.weights", message, "Set data.train_folder, or remove the weights")
    for key, weights in (("weights", data.weights), *(("weight_changes", change["weights"]) for change in changes)):
        if weights and not any(weights.values()):
            yield Problem(f"data.{key}", "all weights are 0", "Give at least one dataset type a positive weight")
        if sum(weights.values()) == math.inf:  # shares of it would all be 0
            yield Problem(f"data.{key}", "the weights add up to inf", "Divide all of them by the largest one")
    steps = [change["step"] for change in changes]
    if steps != sorted(set(steps)):
        yield Problem("data.weight_changes", f"the steps {steps} are not ascending", "Sort the changes by step")


def best_fit_packs(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that best-fit packing is not combined with layouts that do not pack whole samples."""
    data = config.data
    if data.pack != "best_fit":
        return
    if data.type == "streaming":
        message = "'best_fit' needs the lengths of all samples, which data.type = 'streaming' does not have"
        yield Problem("data.pack", message, "Tokenize the texts first, or remove the key")
    if data.pack_sample_into_one or not data.use_packed_dataset:
        key = "pack_sample_into_one = True" if data.pack_sample_into_one else "use_packed_dataset = False"
        yield Problem("data.pack", f"'best_fit' does not go with data.{key}", "Remove one of the two keys")


RULES = (
    Rule(at("data", "weights", "max_epochs", "weight_changes", "type", "train_folder"), weights_have_data),
    Rule(at("data", "pack", "pack_sample_into_one", "use_packed_dataset", "type"), best_fit_packs),
    Rule((*MICRO_NUM_READS, "data.micro_num"), global_batch_is_given_once),
    Rule(at("data", "global_batch", "micro_bsz"), global_batch_has_whole_rows),
    Rule(at("data", "skip_batches"), skip_batches_parses),
    Rule(at("data", "rampup_batch_size", "micro_num", "global_batch", "micro_bsz"), rampup_leads_to_the_whole_batch),
    Rule(at("data", "type", "train_folder", "tokenizer_path"), streams_have_texts_and_a_tokenizer),
)
