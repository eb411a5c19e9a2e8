"""Values of flags: what a word on the command line must be."""

from __future__ import annotations

import argparse
from pathlib import Path

LONGEST = 1e9


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def duration(text: str) -> float:
    """A number from 0 to :data:`LONGEST`."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= number <= LONGEST:  # nor nan
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 0 to {LONGEST:g}")
    return number


def file_to_write(text: str) -> Path:
    """A file in a folder that exists."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} lies in no folder that exists")
    return Path(text)
