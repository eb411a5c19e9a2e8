"""Arguments of ``internlm ckpt``, whose commands examine and delete checkpoints without a run or a GPU."""

from __future__ import annotations

import argparse

from internlm.cli.parsers import count

#: Sections of a checkpoint that ``diff`` can be limited to.
SECTIONS = ("model", "optimizer", "rng", "state")
_FOLDER = "folder of checkpoints, such as local:llm_ckpts/first or s3://bucket/first"
_CHECKPOINT = "checkpoint, such as llm_ckpts/first/step-1000"


def ls(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm ckpt ls``."""
    parser.description = (
        "List the checkpoints of a folder, newest first, with those of unfinished saves. Only manifests and states are "
        "read. Exit code: 0, or 2 for an error."
    )
    parser.add_argument("folder", metavar="FOLDER", help=_FOLDER)
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm ckpt show``."""
    parser.description = "Show what a checkpoint contains. Exit code: 0, or 2 for an error."
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--config", action="store_true", help="print the resolved config of the run as JSON")
    shown.add_argument("--tensors", action="store_true", help="list each tensor with its dtype, shape and pieces")
    parser.add_argument("--json", action="store_true", help="print JSON")


def verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm ckpt verify``."""
    parser.description = (
        "Read all bytes of a checkpoint, or of all checkpoints of a folder, and compare them with their checksums. "
        "Print the first bad bytes of each file. Exit code: 0 if all verify, 2 otherwise."
    )
    parser.add_argument("path", metavar="CHECKPOINT|FOLDER", help="checkpoint, or folder of checkpoints")
    parser.add_argument("--jobs", type=count, metavar="N", help="threads (default: one per core, at most 8)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def diff(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm ckpt diff``."""
    parser.description = (
        "Compare two checkpoints, also of different layouts: which tensors and values differ, and by how much. Exit "
        "code: 0 if they are bitwise equal, 1 if they differ, 2 for an error."
    )
    parser.add_argument("first", metavar="A", help=_CHECKPOINT)
    parser.add_argument("second", metavar="B", help="another one")
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, metavar="SECTION", help="compare only %(choices)s; repeatable"
    )
    parser.add_argument(
        "--bitwise",
        action="store_true",
        help="say only whether tensors are equal: fast, since stored checksums are compared where they can be",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def prune(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm ckpt prune``."""
    parser.description = (
        "Delete old checkpoints of a folder. The newest one that verifies is read and kept in any case, and so are "
        "snapshots. Without --yes, the list is shown, and on a terminal you are asked. Exit code: 0, or 2 for an error."
    )
    parser.add_argument("folder", metavar="FOLDER", help=_FOLDER)
    parser.add_argument("--keep-last", type=count, required=True, metavar="K", help="keep the K newest checkpoints")
    parser.add_argument("--keep-every", type=count, metavar="M", help="also keep each whose step is a multiple of M")
    parser.add_argument("--unfinished", action="store_true", help="also delete what unfinished saves left")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.add_argument("--json", action="store_true", help="print JSON, and delete only with --yes")
