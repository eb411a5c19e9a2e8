"""Keywords of TrainerBuilder: those that are documented, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from internlm.core.trainer import Hook
from internlm.core.trainer_builder import TrainerBuilder, TrainerOptions
from internlm.initialize.launch import parse_args
from internlm.utils.errors import UserError


def test_all_built_in_arguments_are_taken() -> None:
    args = vars(parse_args(["--config", "x.py", "--ledger", "--profiling", "--set", "data.seed=1"]))
    hooks = (Hook(),)
    options = TrainerOptions.from_keywords({**args, "dataset_types": ["en"], "extra_hooks": hooks})
    assert options == TrainerOptions(ledger=True, profiling=True, dataset_types=["en"], extra_hooks=hooks)


@pytest.mark.parametrize(
    ("keywords", "messages"),
    [
        ({"profilling": True}, [r"TrainerBuilder\(profilling=…\): unknown keyword\. Did you mean 'profiling'\?"]),
        ({"hooks": [], "types": []}, [r"TrainerBuilder\(hooks=…\)", r"TrainerBuilder\(types=…\)"]),
        ({"user_arg": 3}, [r"TrainerBuilder\(user_arg=…\): unknown keyword"]),
    ],
)
def test_unknown_keywords_are_refused_before_anything_is_built(keywords: dict[str, Any], messages: list[str]) -> None:
    model: Any = nn.Linear(1, 1)
    with pytest.raises(UserError) as caught:
        TrainerBuilder(model, model, **keywords)
    for message in messages:
        assert caught.match(message)
