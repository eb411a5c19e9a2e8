"""``internlm tokenize``: text files to a tokenized ``.bin`` and its ``.meta``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

DESCRIPTION = "Turn text files into a tokenized .bin file and its .bin.meta, to be put below data.train_folder."


def add_parser(subparsers: Any) -> None:
    """Add ``tokenize`` to the subcommands of a parser."""
    parser = subparsers.add_parser("tokenize", help="turn text files into tokenized data", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=main)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``tokenize``."""
    parser.add_argument(
        "--text_input_path",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files (.txt, .json, .jsonl, .parquet) or folders",
    )
    parser.add_argument(
        "--bin_output_path", required=True, metavar="X.bin", type=Path, help="file to write; X.bin.meta goes beside"
    )
    parser.add_argument(
        "--tokenizer_path",
        required=True,
        metavar="PATH",
        help="a sentencepiece .model or a Hugging Face tokenizer folder",
    )
    parser.add_argument("--text_key", default="text", help="key or column that holds the text (default: text)")
    parser.add_argument(
        "--whole_file", action="store_true", help="a .txt file is one sample, rather than each of its lines"
    )
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, default=False, help="begin each sample with the bos token"
    )
    parser.add_argument(
        "--eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end each sample with the eos token (default: if any)",
    )
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )


def main(args: argparse.Namespace) -> None:
    """Tokenize. Raises :class:`UserError` for what the user can mend."""
    from internlm.data.texts import find_texts, read_texts
    from internlm.data.tokenized_writer import make_recipe, tokenize_texts

    files = find_texts(args.text_input_path)
    recipe = make_recipe(args.tokenizer_path, args.bos, args.eos)
    texts = read_texts(files, args.text_key, args.whole_file)
    summary = tokenize_texts(texts, args.bin_output_path, recipe, args.num_workers, progress=True)
    print(f"{args.bin_output_path}: {summary.samples} samples, {summary.tokens} tokens")
