"""Every Python block of the docs runs as it is printed.

Those of doc/initialize.md and doc/new_model.md run in tests/integration. Commands are checked in
tests/unit/test_doc_commands.py.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.config import check_runnable, load_config
from internlm.core.parallel import attach
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks
from tests.unit.checkpoint.samples import rewrite_manifest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "doc").glob("*.md")])

#: Sections that a fragment of a config needs to be complete.
REST = """
model = dict(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=128)
data = dict(seq_len=32, micro_bsz=1, micro_num=8, total_steps=2000)
adam = dict(lr=1e-3)
"""


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


# -- Python


def config(text: str, folder: Path) -> None:
    """The block is a config, or the sections of one that its page is about."""
    (folder / "complete.py").write_text(REST + text)
    check_runnable(load_config(folder / "complete.py", world_size=8, device_type="cuda"))


def config_with_base(text: str, folder: Path) -> None:
    base = folder / "configs" / "_base_" / "models" / "small.py"
    base.parent.mkdir(parents=True)
    base.write_text(REST)
    (folder / "built_on_it.py").write_text(text)
    assert load_config(folder / "built_on_it.py").model.num_layers == 4


def with_values(text: str, folder: Path) -> None:
    """Comments at the ends of lines are the values of these lines."""
    names: dict[str, Any] = {}
    exec(text, names)
    values = re.findall(r"^(\S.*?)  # (.+)$", text, re.M)
    assert values
    for expression, value in values:
        assert eval(expression, names) == ast.literal_eval(value)


def memory(text: str, folder: Path) -> None:
    (folder / "config.py").write_text(REST)
    names: dict[str, Any] = {"config": load_config(folder / "config.py", (), 2, "cpu"), "world_size": 2, "stage": 0}
    exec(text, names)
    assert sum(names["plan"].values()) > 0


def as_printed(text: str, folder: Path) -> list[str]:
    """Run a block that prints lines of its page, and return them."""
    printed: list[str] = []
    exec(text, {"print": lambda *words: printed.append(" ".join(words))})
    return printed


def tables(page: str) -> Callable[[str, Path], None]:
    def run(text: str, folder: Path) -> None:
        printed, lines = as_printed(text, folder), (ROOT / "doc" / page).read_text().splitlines()
        assert len(printed) > 20
        assert [line for line in printed if line and line not in lines] == []

    return run


def communicator(text: str, folder: Path) -> None:
    table, roles = dict(attach.TABLE), dict(attach.CUSTOM_ROLES)
    try:
        names: dict[str, Any] = {}
        exec(text, names)
        assert names["out"](torch.zeros(2, 512)).shape == (2, 256)
    finally:
        for registry, before in ((attach.TABLE, table), (attach.CUSTOM_ROLES, roles)):
            registry.clear()
            registry.update(before)


def _call_in_block(rank: int, world_size: int, text: str, name: str, *args: Any) -> Any:
    names: dict[str, Any] = {}
    exec(text, names)
    return names[name](rank, world_size, *args)


def distributed_test(text: str, folder: Path) -> None:
    """The workers can't import a block, so they run it instead."""
    names: dict[str, Any] = {}
    exec(text, names)
    names["run_ranks"] = lambda ranks, function, *args: run_ranks(ranks, _call_in_block, text, function.__name__, *args)
    names["test_sum"]()


def plain(text: str, folder: Path) -> None:
    exec(text, {})


def _steps_and_weights(rank: int, world_size: int, step: str, load: str, folder: Path) -> None:
    os.chdir(folder)
    ckpt = {"enable_save_ckpt": True, "save_ckpt_folder": "local:llm_ckpts/first", "checkpoint_every": 1}
    initialize_distributed_env({**TINY, "ckpt": ckpt, "data": {**TINY["data"], "micro_num": 4, "total_steps": 1}})
    loader, _ = build_train_loader_with_data_type()
    builder = TrainerBuilder(create_model(), loader)
    builder.fit()
    checkpoint = (folder / "llm_ckpts/first/step-1").rename(folder / "llm_ckpts/first/step-1000")
    rewrite_manifest(checkpoint, lambda manifest: {"checkpoint": "step-1000"})
    saved = {name: value.clone() for name, value in builder.trainer.model.state_dict().items()}
    loader.seek(0)
    names: dict[str, Any] = {
        "trainer": builder.trainer,
        "optimizer": builder.trainer.optimizer,
        "batches": iter(loader),
    }
    exec(step, names)
    assert names["update"].updated
    model = create_model()
    assert not any(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if "norm" not in name)
    exec(load, {"model": model})
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])


def elsewhere(text: str, folder: Path) -> None:
    """Run by test_a_step_and_weights_by_hand, test_generate_command.py or test_new_model_doc.py."""


#: How each block runs, by page and number.
HOW: dict[tuple[str, int], Callable[[str, Path], None]] = {
    ("README.md", 0): config,
    ("activations.md", 0): tables("activations.md"),
    ("checkpoint.md", 0): config,
    ("checkpoint.md", 1): elsewhere,
    ("config.md", 0): config,
    ("config.md", 1): config_with_base,
    ("config.md", 2): with_values,
    ("data.md", 0): config,
    ("data.md", 1): config,
    ("data.md", 2): config,
    ("data.md", 3): config,
    ("faults.md", 0): plain,
    ("generation.md", 0): elsewhere,
    ("memory.md", 0): memory,
    ("models.md", 0): config,
    ("new_model.md", 0): elsewhere,
    ("new_model.md", 1): elsewhere,
    ("new_model.md", 2): config,
    ("optimizer.md", 0): elsewhere,
    ("optimizer.md", 1): config,
    ("parallel.md", 0): communicator,
    ("pipeline.md", 0): config,
    ("testing.md", 0): distributed_test,
    ("traffic.md", 0): tables("traffic.md"),
    ("huggingface.md", 0): config,
    ("usage.md", 0): config,
    ("usage.md", 1): config,
    ("usage.md", 2): config,
    ("verify.md", 0): plain,
}


@pytest.mark.parametrize(("page", "number"), HOW, ids=str)
def test_a_python_block_runs(page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / page if page == "README.md" else ROOT / "doc" / page
    monkeypatch.chdir(ROOT)  # examples name the repository's configs
    HOW[page, number](blocks("python", path)[number], tmp_path)


def test_a_step_and_weights_by_hand(tmp_path: Path) -> None:
    step, load = (blocks("python", ROOT / "doc" / page)[n] for page, n in (("optimizer.md", 0), ("checkpoint.md", 1)))
    run_ranks(1, _steps_and_weights, step, load, tmp_path)


def test_every_python_block_runs() -> None:
    found = {(page.name, number) for page in PAGES for number in range(len(blocks("python", page)))}
    assert found - {("initialize.md", number) for number in range(7)} == HOW.keys()
