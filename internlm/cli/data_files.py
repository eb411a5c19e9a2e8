"""Commands on files of tokens: ``internlm data convert``."""

from __future__ import annotations

import argparse
import sys

from internlm.data.convert import convert_folder

#: Names of the formats that are read, by the value of ``data.type``.
READS = {"tokenized": ("json", "binary"), "megatron": ("megatron",)}


def convert(arguments: argparse.Namespace) -> None:
    """Convert a folder of token files, and print the sizes before and after.

    Raises:
        UserError: A file is damaged, exists already, or cannot be written.
    """
    a = arguments
    files = samples = tokens = before = after = 0
    for done in convert_folder(a.source, a.target, a.to, READS[a.reads], a.num_workers):
        files, samples, tokens = files + 1, samples + done.samples, tokens + done.tokens
        before, after = before + done.bytes_before, after + done.bytes_after
        if sys.stderr.isatty():
            print(f"\r{files} files, {tokens} tokens", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    sizes = f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB now"
    print(f"{a.target}: {files} files, {samples} samples, {tokens} tokens, {sizes}")
