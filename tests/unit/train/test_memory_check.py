"""Models that cannot fit are refused before they are built."""

from __future__ import annotations

import pytest

from internlm import accelerator
from internlm.config import load_config
from internlm.train.memory_check import check_memory
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


@pytest.mark.parametrize("override", ["model.hidden_size=4000000000", "model.mlp_ratio=1e300"])
def test_sizes_beyond_64_bits_are_refused(override: str) -> None:
    config = load_config(TINY, [override], 1, "cpu")
    with pytest.raises(ConfigError, match=r"^model: a parameter has more bytes than a 64-bit integer can count\. Use"):
        check_memory(config, world_size=1, stage=0)


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


def test_a_model_that_only_its_own_function_can_build_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: object) -> None:
        raise ValueError("not on the meta device")

    monkeypatch.setitem(MODEL_INITIALIZER._modules, "OWN", build)
    config = load_config(TINY, ["model_type=OWN", "model.hidden_size=4000000"], 1, "cpu")
    check_memory(config, world_size=1, stage=0)
