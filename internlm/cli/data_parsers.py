"""Arguments of ``internlm data``, whose commands examine and convert data without a GPU."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internlm.cli.launch_options import add_launcher_options
from internlm.cli.parsers import add_config, count, natural
from internlm.utils.common import add_process_arguments


def convert(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm data convert``."""
    parser.description = (
        "Convert a folder of token files to another format. Each file is read again and compared before it gets its "
        "name. A run can continue with the converted folder. Exit code: 0, or 2 for a damaged file or a mistake in the "
        "arguments."
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="folder of token files, or a file without its suffix")
    add("target", metavar="DST", type=Path, help="folder to write")
    add(
        "--to",
        choices=("binary", "json"),
        default="binary",
        help="binary: X.tokens, small and fast; json: X.bin and X.bin.meta (default: %(default)s)",
    )
    add(
        "--from",
        dest="reads",
        choices=("tokenized", "megatron"),
        default="tokenized",
        help="tokenized: X.bin with X.bin.meta, and X.tokens; megatron: X.bin with X.idx (default: %(default)s)",
    )
    add("--num-workers", type=count, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")


def show(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm data show``."""
    parser.description = (
        "Show which files, samples and tokens each micro-batch of a step was read from, without a process group. The "
        "data position is that of the run's checkpoints, and its log or the next checkpoint confirms it. Exit code: 0, "
        "or 2 for an error."
    )
    add = parser.add_argument
    add_config(parser)
    _add_step(parser)
    add("--world", type=count, metavar="W", help="number of processes (default: as the run that saved)")
    add("--rank", type=natural, metavar="R", help="show only what this rank has read")
    add("--micro-batch", type=natural, metavar="K", help="show only this micro-batch of each rank")
    add("--text", action="store_true", help="print the text of each piece, or its token ids without a tokenizer")
    add("--tokenizer", metavar="PATH", help="tokenizer for --text (default: data.tokenizer_path)")
    add("--seed", type=natural, help="seed of the run (default: as saved in its checkpoints, else 1024)")
    add("--json", action="store_true", help="print JSON, with token ids if --text is given")


def replay(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm data replay``."""
    parser.description = (
        "Run each micro-batch of a step by itself, with the parameters of the newest checkpoint at or before the step, "
        "and print its loss and the norm of its gradient. Nothing is updated or saved. Processes are started as by "
        "internlm train. Exit code: 0, or 2 for an error that you can fix."
    )
    add_config(parser)
    _add_step(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_process_arguments(parser)
    add_launcher_options(parser)


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=natural, required=True, metavar="N", help="step, counted from 0 as in the log")
    parser.add_argument(
        "--ckpt",
        metavar="FOLDER|CHECKPOINT",
        help="checkpoints of the run, or one saved at or before the step (default: ckpt.save_ckpt_folder)",
    )
