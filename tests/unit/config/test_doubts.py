"""Warnings about settings that were hardly meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from internlm.config import resolve
from tests.unit.config.samples import config_of

PACKED_ONLY = "data.pack_sample_into_one: without effect, since data.use_packed_dataset is False"
NOTHING_TO_VALIDATE = "data.valid_every: nothing is validated, since data.valid_folder is not given"
ROWS: tuple[tuple[Mapping[str, Any], list[str]], ...] = (
    ({}, []),
    ({"data.pack_sample_into_one": True}, []),
    ({"data.pack_sample_into_one": True, "data.use_packed_dataset": False}, [PACKED_ONLY]),
    ({"data.valid_every": 10}, []),  # random data validate on random data
    ({"data.valid_every": 10, "data.train_folder": "x"}, [NOTHING_TO_VALIDATE]),
    ({"data.valid_every": 10, "data.train_folder": "x", "data.valid_folder": "y"}, []),
)


@pytest.mark.parametrize(("keys", "warnings"), ROWS)
def test_warnings(keys: Mapping[str, Any], warnings: list[str]) -> None:
    assert resolve(config_of(keys)).warnings == warnings
