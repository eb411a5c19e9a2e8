"""TrainerBuilder follows the config that the run was initialised with."""

from __future__ import annotations

import pytest

from internlm.config import load_config
from internlm.core.context import global_context as gpc
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from internlm.utils.errors import UserError
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks


def _built(rank: int, world_size: int) -> str:
    initialize_distributed_env(TINY)
    model, (loader, _) = create_model(), build_train_loader_with_data_type()
    other = load_config(TINY, ("adam.lr=0.123",), 1, "cpu")
    with pytest.raises(UserError) as caught:
        TrainerBuilder(model, loader, config=other)
    assert TrainerBuilder(model, loader, config=gpc.config).config is gpc.config
    return str(caught.value)


def test_another_config_is_refused() -> None:
    (message,) = run_ranks(1, _built)
    assert message.startswith("TrainerBuilder(config=…): differs from the config that initialize_distributed_env res")
