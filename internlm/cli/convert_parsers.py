"""Arguments of ``internlm convert``, whose commands turn checkpoints into those of other software, and back."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}


def size(text: str) -> int:
    """Parse a size in bytes, such as ``5GB`` or ``500MB``."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(MB|GB|MiB|GiB)", text, re.ASCII | re.IGNORECASE)
    number = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, got {text!r}")
    return number


def to_hf(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm convert to-hf``."""
    parser.description = (
        "Write the model of a checkpoint as a Hugging Face folder: config.json, safetensors files, and the tokenizer. "
        "Tensors are converted one by one. Exit code: 0, or 2 for an error; then nothing is left."
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint, such as llm_ckpts/first/step-1000")
    add("target", metavar="OUT", help="folder or s3:// address to write, which must not exist")
    add("--config", metavar="CONFIG", help="config of the model (default: the one that the checkpoint holds)")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        help="dtype of all tensors (default: as saved)",
    )
    add("--shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="size limit of a file (default: 5GB)")
    add(
        "--tokenizer", type=Path, metavar="FOLDER", help="folder with tokenizer files to copy, or a sentencepiece model"
    )


_IMPORTS = (
    "as a checkpoint that runs of any layout load, and print the model section of a config for it. Exit code: 0, or 2 "
    "for an error; then nothing is left."
)


def from_hf(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm convert from-hf``."""
    parser.description = f"Write the model of a Hugging Face folder {_IMPORTS}"
    parser.add_argument("source", metavar="HF_FOLDER", help="folder or s3:// address with config.json and safetensors")
    _add_target(parser)


def from_internevo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm convert from-internevo``."""
    parser.description = (
        f"Write the model of a checkpoint of InternEvo's earlier versions, or of InternLM, {_IMPORTS} Optimizer state "
        "is left behind."
    )
    add = parser.add_argument
    add("source", metavar="FOLDER", help="folder with model_tp0_pp0.pt, … or model_wp0_pp0.pt, …")
    _add_target(parser)
    add("--config", metavar="CONFIG", type=Path, help="config of the run (default: the folder's model_config.pt)")
    add("--model-type", metavar="NAME", help="model type, if there is no config: model_config.pt does not hold it")
    add(
        "--trust",
        action="store_true",
        help="unpickle files that hold more than tensors, which runs any code that they name",
    )


def from_llama(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``internlm convert from-llama``."""
    parser.description = f"Write the model of a release of Meta {_IMPORTS}"
    add = parser.add_argument
    add("source", metavar="LLAMA_FOLDER", help="folder with params.json and consolidated.00.pth, …")
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="OUT", help="path or s3:// address of the checkpoint, which must not exist")
