"""Models that cannot fit are refused before they are built."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm import accelerator
from internlm.accelerator import device
from internlm.config import load_config
from internlm.costs import memory_plan
from internlm.train.inventory import build_inventory
from internlm.train.memory_check import TOLERANCE, check_memory
from internlm.utils.errors import ConfigError
from internlm.utils.registry import MODEL_INITIALIZER
from tests.dist.tiny import TINY


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=4000000",
        "model.vocab_size=10000000000000",
        "data.seq_len=4000000000",
        "data.micro_bsz=300000000",
    ],
)
def test_what_needs_more_memory_than_is_free_is_refused(override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^model: a rank needs [\d.]+ GiB of memory, but only [\d.]+ GiB are free\. Use"
    ):
        check_memory(load_config(TINY, [override], 1, "cpu"), world_size=1, stage=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.hidden_size", "4000000000"),
        ("model.hidden_size", "1000000000000"),
        ("model.vocab_size", "10000000000000000000"),
        ("model.mlp_ratio", "1e+300"),
    ],
)
def test_sizes_beyond_64_bits_are_refused(key: str, value: str) -> None:
    config = load_config(TINY, [f"{key}={value}"], 1, "cpu")
    with pytest.raises(ConfigError) as caught:
        check_memory(config, world_size=1, stage=0)
    message = f"{key}: {value} makes a parameter with more bytes than a 64-bit integer can count. Use a smaller model"
    assert str(caught.value) == message


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY, (), 1, "cpu")
    check_memory(config, world_size=1, stage=0)
    alone = accelerator.free_memory()
    assert alone is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000000")
    shared = accelerator.free_memory()
    assert shared is not None
    assert 0 < shared < 2**20 < alone
    with pytest.raises(ConfigError, match=r"MiB of memory, but only 0\.0 MiB are free"):
        check_memory(config, world_size=1, stage=0)


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("6000000", "5000000", 3_000_000), ("4000000", "5000000", 1_000_000), ("max", "5000000", None), (None, "1", None)],
)
def test_a_container_limits_the_memory(
    limit: str | None, used: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached files count as used, but are dropped where memory is short."""
    monkeypatch.setattr(device, "CGROUP", tmp_path / "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    without = accelerator.free_memory()
    assert without is not None
    stat = "anon 1\nactive_file 1500000\ninactive_file 500000"
    files = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    found = accelerator.free_memory()
    assert found == expected if expected else found > without / 2


def test_a_rank_is_checked_for_the_memory_that_it_needs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Muon a matrix has one owner, so that ranks of a zero group hold different states."""
    config = load_config(TINY, ["optimizer.type=Muon", "model.num_layers=1"], 4, "cpu")
    inventory = build_inventory(config, 4)
    needed = [sum(memory_plan(inventory, zero_rank=rank, device_type="cpu").values()) for rank in range(4)]
    least, most = needed.index(min(needed)), needed.index(max(needed))
    assert needed[least] * 1.01 < needed[most]
    monkeypatch.setattr(accelerator, "free_memory", lambda: (needed[least] + needed[most]) / 2 / TOLERANCE)
    check_memory(config, 4, 0, zero_rank=least)
    for zero_rank in (most, None):
        with pytest.raises(ConfigError, match=r"^model: a rank needs"):
            check_memory(config, 4, 0, zero_rank=zero_rank)


def test_a_model_that_only_its_own_function_can_build_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: object) -> None:
        raise ValueError("not on the meta device")

    monkeypatch.setitem(MODEL_INITIALIZER._modules, "OWN", build)
    config = load_config(TINY, ["model_type=OWN", "model.hidden_size=4000000"], 1, "cpu")
    check_memory(config, world_size=1, stage=0)
