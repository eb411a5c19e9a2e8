"""Every command of the docs is accepted by its program, with the files it names; cheap ones of internlm run.

Nothing trains, measures or installs here: such commands are parsed, by the parsers of torchrun and of the script.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

from internlm.cli.main import get_parser, main
from internlm.config import load_config
from internlm.initialize import get_default_parser
from tests.dist.test_doc_blocks import PAGES, REST, ROOT, blocks
from tests.unit.checkpoint.samples import in_ranges, save


def commands() -> list[str]:
    """Return the lines of all blocks of commands, and the commands within sentences that can be checked."""
    lines = "\n".join(block for page in PAGES for block in (*blocks("bash", page), *blocks("console", page)))
    found = [line.removeprefix("$ ").partition("  #")[0].strip() for line in lines.replace("\\\n", " ").splitlines()]
    for page in PAGES:
        found += re.findall(r"`((?:make |python -m bench\.|python bench/)[^`]+)`", page.read_text())
    return sorted({line for line in found if line and not line.startswith("#")})


class ParsedError(Exception):
    """Ends a script after it has parsed its arguments."""


def internlm(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    get_parser().parse_args(arguments)
    # The others start processes or read data.
    if arguments[0] not in ("convert", "data", "dryrun", "eval", "generate", "verify", "tokenize", "train"):
        assert not main(arguments)


def make(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        variable, is_set, _ = word.partition("=")
        assert re.search(rf"^{variable} \?=" if is_set else rf"^{word}:.*##", makefile, re.M), word


def python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script to the end of its command line."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise ParsedError

    run: Callable[..., Any] = runpy.run_path
    if arguments[0] == "-m":
        run, arguments = runpy.run_module, arguments[1:]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", arguments)
    name = arguments[0] if run is runpy.run_module else str(ROOT / arguments[0])
    with pytest.raises((ParsedError, SystemExit)) as caught:
        run(name, run_name="__main__")
    assert caught.type is ParsedError or caught.value.code == 0  # type: ignore[union-attr] # of --help


def train(arguments: list[str], world_size: int) -> None:
    args = get_default_parser().parse_args(arguments)
    assert load_config(args.config, args.set, world_size, "cuda")


def torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = get_args_parser().parse_args(arguments)
    assert args.training_script == "train.py"
    train(args.training_script_args, int(args.nproc_per_node))


def srun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options, script = arguments[: arguments.index("python")], arguments[arguments.index("python") + 1 :]
    sizes = dict(option.removeprefix("--").split("=") for option in options)
    assert sizes.keys() == {"ntasks", "ntasks-per-node", "gpus-per-task"}
    assert script[0] == "train.py"
    train(script[1:], int(sizes["ntasks"]))


def pip(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments[0] == "install"
    files = [file for option, file in pairwise(arguments) if option in ("-r", "-c")]
    assert all((ROOT / file).is_file() for file in files)
    known = {"install", "-r", "-c", *files, "--no-deps", "--editable", "."}
    assert set(arguments) <= known


def source(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"VENV ?= {arguments[0].removesuffix('/bin/activate')}\n" in (ROOT / "Makefile").read_text()


#: How the arguments of each program are checked.
PROGRAMS = {check.__name__: check for check in (internlm, make, python, torchrun, srun, pip, source)}


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command)
    for name in ("first.py", "my.py", "my_config.py"):
        (tmp_path / name).write_text(REST)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    if "internlm ckpt" in command:
        for step in (500, 1000):
            (folder := tmp_path / "llm_ckpts" / "first").mkdir(parents=True, exist_ok=True)
            save(folder / f"step-{step}", {"model/w": in_ranges(torch.zeros(3), [])}, step)
    (tmp_path / "mine.csv").write_text(blocks("text", ROOT / "doc" / "pipeline.md")[1])
    monkeypatch.chdir(tmp_path)
    PROGRAMS[program](arguments, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "make tests", "make demo STEPS=2", "python -m bench.peers float16", "python -m bench.ops --cores 1",
        "torchrun --processes 2 train.py --config first.py", "torchrun --nproc_per_node 2 train.py --config none.py",
        "torchrun --nproc_per_node 2 train.py --config first.py --set adam.rate=1", "pip install -r requirements.txt",
        "srun --ntasks=2 --ntasks-per-node=2 --gpus-per-task=1 python train.py --config first.py --launcher lsf",
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        test_a_command_of_the_docs_is_accepted(command, tmp_path, monkeypatch)


def test_a_schedule_is_drawn_as_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # set in the processes of pytest-xdist
    page = ROOT / "doc" / "pipeline.md"
    _, *arguments = shlex.split(blocks("bash", page)[0].splitlines()[0])
    assert not main(arguments)
    assert capsys.readouterr().out.strip() == blocks("text", page)[0].strip()
