"""Warnings about settings that were hardly meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from internlm.config import resolve
from tests.unit.config.samples import config_of

PACKED_ONLY = "data.pack_sample_into_one: without effect, since data.use_packed_dataset is False"
NOTHING_TO_VALIDATE = "data.valid_every: nothing is validated, since data.valid_folder is not given"
NOTHING_TO_FILL = (
    "parallel.pipeline.mode: a pipeline of one stage has nothing to fill, since parallel.pipeline.size is 1"
)
ROWS: tuple[tuple[Mapping[str, Any], list[str]], ...] = (
    ({}, []),
    ({"data.pack_sample_into_one": True}, []),
    ({"data.pack_sample_into_one": True, "data.use_packed_dataset": False}, [PACKED_ONLY]),
    ({"parallel.pipeline.mode": "zbh1"}, [NOTHING_TO_FILL]),
    ({"parallel.pipeline": {"size": 1, "mode": "ZBV"}}, [NOTHING_TO_FILL]),
    ({"parallel.pipeline": {"size": 2, "mode": "ZBV"}}, []),
    ({"parallel.pipeline.mode": "1f1b"}, []),
    ({"data.valid_every": 10}, []),  # random data validate on random data
    ({"data.valid_every": 10, "data.train_folder": "x"}, [NOTHING_TO_VALIDATE]),
    ({"data.valid_every": 10, "data.train_folder": "x", "data.valid_folder": "y"}, []),
)


@pytest.mark.parametrize(("keys", "warnings"), ROWS)
def test_warnings(keys: Mapping[str, Any], warnings: list[str]) -> None:
    assert resolve(config_of(keys)).warnings == warnings
