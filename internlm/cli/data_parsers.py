"""Arguments of ``internlm data``, whose commands examine and convert data without a run or a GPU."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internlm.cli.parsers import count


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
