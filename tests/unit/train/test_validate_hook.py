"""The hook of validations says once what it cannot report."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from internlm.monitor import MetricsWriter
from internlm.train.hooks import Validate, periodic


@pytest.mark.parametrize(
    ("every", "has_loaders", "logs", "has_tokenizer", "messages"),
    [
        (2, True, True, False, ["valid/bits_per_byte is not reported, since data.tokenizer_path is not set"]),
        (2, True, True, True, []),
        (2, True, False, False, []),
        (2, False, True, False, []),
        (0, True, True, False, []),
    ],
)
def test_missing_bits_per_byte_are_explained(
    every: int,
    has_loaders: bool,
    logs: bool,
    has_tokenizer: bool,
    messages: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(periodic.log, "propagate", True)
    caplog.set_level(logging.INFO, "internlm")
    loaders: Any = {"en": []} if has_loaders else {}
    hook = Validate(loaders, every, 4, MetricsWriter([]) if logs else None, torch.ones(3) if has_tokenizer else None)
    trainer: Any = None
    hook.before_run(trainer)
    # Once each: the handler of the fixture may be at both loggers.
    assert [*dict.fromkeys(caplog.messages)] == messages
