"""Turn an instruction data set into tokenized files for training and validation.

``python tools/alpaca_tokenizer.py data.json OUTPUT tokenizer.model --split_ratio 0.1`` writes
``OUTPUT/train/en/dataset.bin`` and ``OUTPUT/valid/en/dataset.bin``, as ``internlm tokenize --format alpaca`` does, with
the bos and eos tokens that the tokenizer has.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from internlm.cli.parsers import share
from internlm.cli.tokenizing import write_samples
from internlm.data.bad_rows import BadRows
from internlm.data.instructions import TEMPLATE, read_instructions
from internlm.data.text_encoder import make_recipe
from internlm.data.text_files import RECORDS, find_texts
from internlm.utils.common import FriendlyParser
from internlm.utils.errors import exit_on_user_error


@exit_on_user_error
def tokenize(arguments: Namespace) -> None:
    """Write the files for training and, with a ratio above 0, those for validation."""
    found, bad = find_texts([arguments.dataset_path], RECORDS), BadRows()
    folders = ("train", "valid") if arguments.split_ratio else ("train",)
    outputs = [Path(arguments.output_path, folder, "en", "dataset.bin") for folder in folders]
    samples = read_instructions(found.files, TEMPLATE, bad)
    recipe = make_recipe(arguments.tokenizer_path, bos=None)
    write_samples(samples, outputs, recipe, 1, second_share=arguments.split_ratio, found=found, bad=bad)


if __name__ == "__main__":
    parser = FriendlyParser(description="Turn an instruction data set into tokenized files.")
    parser.add_argument("dataset_path", help="file of records with instruction, input and output: .json, .jsonl, …")
    parser.add_argument("output_path", help="folder to write train/en/dataset.bin and valid/en/dataset.bin to")
    parser.add_argument("tokenizer_path", help="sentencepiece .model or Hugging Face tokenizer folder")
    parser.add_argument(
        "--split_ratio",
        "--split-ratio",
        type=share,
        default=0.1,
        metavar="R",
        help="share of the samples for validation (default: %(default)s)",
    )
    tokenize(parser.parse_args())
