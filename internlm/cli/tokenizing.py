"""Subcommand ``internlm tokenize``: turn texts into tokenized files without importing torch.

Each worker process imports the main module again, which is why this file imports little.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from internlm.data.bad_rows import BadRows, escape_control
from internlm.data.instructions import TEMPLATE, check_template, read_instructions
from internlm.data.text_encoder import Recipe, Sample, make_recipe
from internlm.data.text_files import RECORDS, FoundFiles, find_texts
from internlm.data.texts import read_texts
from internlm.data.tokenized_writer import Summary, tokenize_samples
from internlm.utils.errors import ConfigError, DataError, Problem, UserError

#: Files left out that are listed by name.
LISTED_FILES = 5


def tokenize(arguments: argparse.Namespace) -> None:
    """Tokenize text files into a ``.bin`` file and its ``.bin.meta``, or into two pairs for training and validation.

    Raises:
        UserError: A file or the tokenizer cannot be read, a row is bad and not skipped, there is no text, or an output
            exists and is not to be overwritten.
    """
    a = arguments
    # The processes use all cores already: threads of the tokenizers package in each of them would compete. The workers
    # inherit the variable.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    output: Path = a.bin_output_path
    outputs = [output]
    if a.split_ratio:
        outputs = [output.parent / folder / output.name for folder in ("train", "valid")]
    if not a.overwrite:
        _refuse_existing(outputs)
    recipe = make_recipe(a.tokenizer_path, a.bos, a.eos, a.parse_special_tokens)
    if a.format == "alpaca":
        template = check_template(a.prompt_template or TEMPLATE)
        found, bad = find_texts(a.text_input_path, RECORDS), BadRows(a.on_error)
        samples = read_instructions(found.files, template, bad)
    elif a.prompt_template:
        raise ConfigError(Problem("--prompt-template", "is for --format alpaca only", "Omit it"))
    else:
        found, bad = find_texts(a.text_input_path), BadRows(a.on_error)
        samples = (("", text) for text in read_texts(found.files, a.text_key, a.whole_file, bad))
    write_samples(samples, outputs, recipe, a.num_workers, second_share=a.split_ratio, found=found, bad=bad)


def _refuse_existing(outputs: Sequence[Path]) -> None:
    """Raise if an output exists: minutes or days of work, whose texts may be gone."""
    paths = [path for output in outputs for path in (output, output.with_name(f"{output.name}.meta"))]
    if existing := [path for path in paths if os.path.lexists(path)]:
        todo = "Choose another --bin_output_path, or pass --overwrite to replace it"
        raise DataError(*(Problem(str(path), "exists", todo) for path in existing))


def write_samples(
    samples: Iterator[Sample],
    outputs: Sequence[Path],
    recipe: Recipe,
    workers: int,
    *,
    second_share: float,
    found: FoundFiles,
    bad: BadRows,
) -> None:
    """Tokenize samples, and print what was written, what was left out, and the lines of a config for the data.

    Args:
        samples: Prompt and text of each sample.
        outputs: One ``.bin`` file, or two: for training and for validation.
        recipe: Tokenizer and special tokens.
        workers: Number of processes.
        second_share: Share of the samples in the second file.
        found: The files of the samples.
        bad: Counter of bad rows that the reader of ``samples`` fills.
    """
    try:
        summaries = tokenize_samples(samples, outputs, recipe, workers, second_share=second_share, progress=True)
    except UserError:
        for total in bad.totals():
            print(total, file=sys.stderr)
        raise
    for output, summary in zip(outputs, summaries, strict=True):
        print(f"{escape_control(str(output))}: {_totals(summary)}")
    if found.left_out:
        names = ", ".join(escape_control(str(path)) for path in found.left_out[:LISTED_FILES])
        more = ", …" if len(found.left_out) > LISTED_FILES else ""
        print(f"files left out, by their suffix: {len(found.left_out):,} ({names}{more})")
    for total in bad.totals():
        print(total)
    print(_config_lines(outputs, recipe))


def _totals(summary: Summary) -> str:
    per_token = summary.text_bytes / summary.tokens if summary.tokens else 0
    prompts = f", of which {summary.prompt_tokens:,} of prompts" if summary.prompt_tokens else ""
    return (
        f"{summary.samples:,} samples, {summary.tokens:,} tokens{prompts}, {summary.text_bytes:,} bytes of text, "
        f"{per_token:.2f} bytes per token"
    )


def _config_lines(outputs: Sequence[Path], recipe: Recipe) -> str:
    """Return the lines of a config that fit the data."""
    keys = {key: str(output.parent) for key, output in zip(("train_folder", "valid_folder"), outputs, strict=False)}
    keys["tokenizer_path"] = recipe.tokenizer_path
    data = ", ".join(f"{key}={value!r}" for key, value in keys.items())
    return (
        "for the config (or the parent folder, each of whose sub-folders is a dataset type):\n"
        f"    model = dict(vocab_size={recipe.vocab_size}, ...)\n"
        f"    data = dict({data}, ...)"
    )
