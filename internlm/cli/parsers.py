"""Arguments of each subcommand of ``internlm``; shared options are defined once."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

#: Names of the schedules, repeated from ``core/scheduler/table.py``, which imports torch. A test compares both.
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbh1", "zbv")
#: Bounds of a duration other than 0, in the unit of time that the user chooses.
LONGEST = 1e9
SHORTEST = 1e-9


# -- values -----------------------------------------------------------------------------------------------------------
def count(text: str) -> int:
    """Parse an integer of at least 1."""
    # str.isdecimal alone accepts digits of other scripts.
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Parse an integer of at least 0."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Parse a number from 0 to 1, without 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return number


def duration(text: str) -> float:
    """Parse the duration of a simulated action or send: 0, or a number from :data:`SHORTEST` to :data:`LONGEST`.

    The user chooses the unit of time, which must be the same for all durations.
    """
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not (number == 0 or SHORTEST <= number <= LONGEST):  # false for nan too
        bounds = f"{SHORTEST:g} to {LONGEST:g}"
        raise argparse.ArgumentTypeError(
            f"expected 0 or a number from {bounds} (all times in one unit of your choice), got {text!r}"
        )
    return number


def file_to_write(text: str) -> Path:
    """Parse the path of a file to write, in a folder that exists."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"the parent folder of {text!r} does not exist")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    return Path(text)


# -- options that several commands share ------------------------------------------------------------------------------
def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the config file as a positional argument, and ``--set``."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?" if optional else None, help="Python config file; it is executed"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key; repeatable"
    )


def add_run(
    parser: argparse.ArgumentParser,
    world: str,
    device: str,
    *,
    world_required: bool = False,
    default_device: str | None = None,
) -> None:
    """Add ``--world`` and ``--device``, with ``world`` and ``device`` as their help texts."""
    parser.add_argument("--world", type=count, metavar="N", required=world_required, help=world)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help=device)


# -- commands ---------------------------------------------------------------------------------------------------------
def config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm config``."""
    parser.description = (
        "Resolve and check a config file, and print each value with its source as JSON: file, override, derived (from "
        "other values) or default. Warnings go to stderr."
    )
    add_config(parser)
    add_run(parser, "check the parallel sizes for N processes", "check and derive what depends on the device")


def memory(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm memory``."""
    parser.description = (
        "Estimate, by formula, the memory of each part of a run on the rank with the most memory in each pipeline "
        "stage. Nothing is started. Exit code: 0, or 2 for a mistake in config or arguments."
    )
    add_config(parser)
    add_run(
        parser,
        "number of processes",
        "device of the run (default: %(default)s)",
        world_required=True,
        default_device="cuda",
    )


def dryrun(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm dryrun``."""
    parser.description = (
        "Run the training path of single ranks on a pretended device, without a GPU, without the memory of the model "
        "and without other processes. Print memory, traffic, FLOPs, kernels and host syncs beside their formulas. "
        "Exit code: 0 if all agree, 1 if they differ or a step would stall a device, 2 for a mistake in config or "
        "arguments."
    )
    add = parser.add_argument
    add_config(parser)
    add("--world", type=count, metavar="N", required=True, help="number of processes")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument(
        "--rank", type=natural, action="append", metavar="R", help="rank to run (default: 0); repeatable"
    )
    ranks.add_argument("--stages", action="store_true", help="run the first rank of each pipeline stage")
    add("--steps", type=count, default=2, metavar="K", help="steps; figures are of the last (default: %(default)s)")
    add("--seed", type=natural, default=1024, help="seed of the run (default: %(default)s)")
    add("--json", type=file_to_write, metavar="FILE", help="write all numbers to FILE")


def schedule(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm schedule``."""
    parser.description = (
        "Simulate a pipeline schedule and print the timeline of each rank. The schedule comes from a config, a "
        "name or a CSV file; options take precedence over the config. Actions of a chunk: F (forward), B (gradient of "
        "the input), W (gradient of the weights). Times are per action, in any unit. Exit code: 0 if the schedule can "
        "run, 2 if it cannot or for a mistake in the arguments."
    )
    add = parser.add_argument
    add_config(parser, optional=True)
    add_run(parser, "check the config's parallel sizes for N processes", "check what depends on the device")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--kind", choices=SCHEDULES, help="schedule: %(choices)s", metavar="KIND")
    source.add_argument("--csv", type=Path, metavar="FILE", help="CSV file of a custom schedule: one line per rank")
    add("--stages", type=count, metavar="P", help="ranks of the pipeline")
    add("--micro-batches", type=count, metavar="M", help="micro-batches per step")
    add("--chunks", type=count, metavar="V", help="model chunks per rank (2 for interleaved and zbv, else 1)")
    add("--forward", type=duration, default=1.0, metavar="T", help="time of F (default: %(default)g)")
    add("--backward", type=duration, default=1.0, metavar="T", help="time of B, without W (default: %(default)g)")
    add("--weight", type=duration, default=1.0, metavar="T", help="time of W (default: %(default)g)")
    add("--transfer", type=duration, default=0.0, metavar="T", help="time of one send (default: %(default)g)")
    add("--write-csv", type=file_to_write, metavar="FILE", help="write the schedule, to change it and pass it as --csv")
    add("--svg", type=file_to_write, metavar="FILE", help="write the timeline as an SVG picture")
    add("--html", type=file_to_write, metavar="FILE", help="write the timeline as HTML that describes each action")
    add("--trace", type=file_to_write, metavar="FILE", help="write the timeline as a trace for ui.perfetto.dev")


def tokenize(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm tokenize``, whose names have underscores for compatibility with older scripts."""
    parser.description = (
        "Turn text files into a tokenized .bin file and its .bin.meta, to be put below data.train_folder. Exit code: "
        "0, or 2 for a mistake in the arguments or a bad row."
    )
    add = parser.add_argument
    add(
        "--text_input_path",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files (.txt, .json, .jsonl, each also with .gz or .zst, .parquet, .arrow) or folders",
    )
    add(
        "--bin_output_path",
        required=True,
        metavar="X.bin",
        type=Path,
        help="file to write; X.bin.meta is written beside it",
    )
    add("--overwrite", action="store_true", help="replace the files to write if they exist (default: an error)")
    add(
        "--tokenizer_path",
        required=True,
        metavar="PATH",
        help="sentencepiece .model or Hugging Face tokenizer folder",
    )
    add("--text_key", default="text", help="key or column that holds the text (default: %(default)s)")
    add("--whole_file", action="store_true", help="treat a .txt file, rather than each of its lines, as one sample")
    add("--bos", action=argparse.BooleanOptionalAction, default=False, help="begin each sample with the bos token")
    add(
        "--eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end each sample with the eos token (default: if the tokenizer has one)",
    )
    _add_rows(parser)
    add("--num_workers", type=natural, default=os.cpu_count() or 1, help="processes (default: one per core)")


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm tokenize`` for the rows of texts: what they are, and what may be wrong."""
    add = parser.add_argument
    add(
        "--parse-special-tokens",
        "--parse_special_tokens",
        action="store_true",
        help="encode the name of a special token in a text, such as </s>, as that token (default: as text)",
    )
    add(
        "--on-error",
        "--on_error",
        choices=["fail", "skip"],
        default="fail",
        help="at a row that cannot be used: fail, or skip and count it (default: %(default)s)",
    )
    add(
        "--format",
        choices=["text", "alpaca"],
        default="text",
        help="text, or records with instruction, input and output, of which only the output is trained on (default: "
        "%(default)s)",
    )
    add(
        "--prompt-template",
        "--prompt_template",
        metavar="TEXT",
        help="prompt of --format alpaca: {prompt} stands for instruction and input, \\n for a line end",
    )
    add(
        "--split-ratio",
        "--split_ratio",
        type=share,
        default=0.0,
        metavar="R",
        help="write this share of the samples to valid/X.bin, and the others to train/X.bin (default: all to X.bin)",
    )


def verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm verify``."""
    parser.description = (
        "Train a few steps on several processes of this machine, and the same model on one, from one seed and one "
        "global batch; compare loss, gradients, parameters, outputs of modules, and bytes sent. If they differ, find "
        "the smallest layout that still differs, and the module with the first tensor that does. Nothing is saved. "
        "Exit code: 0 if both agree, 1 if they differ or a process failed, 2 for a mistake in config or arguments."
    )
    add = parser.add_argument
    add_config(parser)
    add_run(
        parser,
        "number of processes (default: twice the smallest that the parallel sizes allow)",
        "device of both runs: cpu, connected by gloo, or cuda, a GPU for each process, connected by NCCL (default: "
        "%(default)s)",
        default_device="cpu",
    )
    add("--steps", type=count, default=3, metavar="K", help="steps to train (default: %(default)s)")
    add(
        "--dtype",
        choices=["float64", "float32", "bfloat16", "float16"],
        default="float64",
        help="dtype of parameters and activations (default: %(default)s)",
    )
    add("--seed", type=natural, default=1024, help="seed of parameters and data (default: %(default)s)")
    add("--debug-size", action="store_true", help="shrink model and data, keep the architecture; data are random")
    add(
        "--no-locate",
        action="store_true",
        help="do not search for the smallest layout that differs and the first tensor that differs in it",
    )
    add(
        "--timeout",
        type=count,
        default=600,
        metavar="S",
        help="seconds for each run (default: %(default)s)",
    )
    add("--json", type=file_to_write, metavar="FILE", help="write all numbers to FILE")
