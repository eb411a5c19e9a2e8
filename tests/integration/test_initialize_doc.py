"""The code in doc/initialize.md runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from internlm.config import load_config
from tests.integration.jobs import ROOT, metrics, records, script_on_pool

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "doc" / "initialize.md").read_text(), re.S)


def block(start: str) -> str:
    """Return the one block with a line that starts like this."""
    (found,) = [text for text in BLOCKS if re.search(rf"^{re.escape(start)}", text, re.M)]
    return found


OVERRIDES = ("model_type=MY_MODEL", "data.total_steps=4", "model.checkpoint=True")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [(1, ("model.cpu_offloading=1",)), (2, ("parallel.zero1.fsdp=True", "data.micro_num=1"))],
    ids=["offloaded", "fully sharded"],
)
def test_a_model_of_ones_own_trains(ranks: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(block("class MyModel") + block("    TrainerBuilder("))
    job = script_on_pool(str(file), ranks, "configs/debug/llama2.py", tmp_path, *OVERRIDES, *overrides)
    assert job.returncode == 0, job.stderr
    assert "ignored, unless the model" not in job.stderr
    (record,) = records(tmp_path)
    assert len(metrics(record)) == 4


def test_own_arguments_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script.py", "--config", "x.py", "--user_arg", "3"])
    names: dict[str, object] = {}
    exec(block("parser = get_default_parser()"), names)
    assert names["user_arg"] == 3


def test_the_config_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(block("data = dict(") + block("model_type = ") + block("adam = dict("))
    config = load_config(file, (), 1, "cpu")
    assert (config.model_type, config.model.num_layers, config.adam.lr) == ("INTERNLM", 32, 1e-4)


#: The workers of the pool share one screen, so the loop prints to a file.
LOGGING = """
def log(*words):
    with open("log", "a") as file:
        print(*words, file=file)

"""


def test_a_loop_of_ones_own_trains(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(LOGGING + block("    for batch in train_dl:").replace(" print(", " log("))
    job = script_on_pool(str(file), 2, "configs/debug/llama2.py", tmp_path, "data.total_steps=4", "data.micro_num=1")
    assert job.returncode == 0, job.stderr
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == ["1", "2", "3", "4"]


def test_every_block_is_run() -> None:
    assert len(BLOCKS) == 7
