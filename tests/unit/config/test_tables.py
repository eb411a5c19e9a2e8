"""The tables name keys that exist, and rules read what they declare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from internlm.config import keys, load_config
from internlm.config.legacy import OLD_KEYS, RENAMED, RESPELLED, SHORT_FORMS
from internlm.config.resolve import DERIVATIONS
from internlm.config.rules import ALL_RULES, Rule, RunInfo
from internlm.config.rules.rule import DEVICE_TYPE, WORLD_SIZE
from internlm.config.schema.fields import Section
from internlm.config.support import (
    CHECKPOINT_FOLDERS,
    DUBIOUS_SETTINGS,
    LOCAL_PATHS,
    NO_EFFECT,
    SUPPORTED_VALUES,
    UNREAD,
)
from tests.unit.config.samples import BUSIEST, config_of

RUN = RunInfo(world_size=8, device_type="cpu")
TABLES = {
    "rules": [key for rule in ALL_RULES for key in rule.reads],
    "derivations": [key for row in DERIVATIONS for key in (row.target, *row.reads)],
    "short forms": [f"{section}.{key}" for section, key in SHORT_FORMS.items()],
    "renamed": [new.key for new in RENAMED.values()],
    "respelled": list(RESPELLED),
    "dubious settings": [key for setting in DUBIOUS_SETTINGS for key in setting.keys],
    "supported values": [*SUPPORTED_VALUES, *LOCAL_PATHS, *CHECKPOINT_FOLDERS],
    "no effect": [row.key for row in NO_EFFECT],
    "unread": [key for setting, inner in UNREAD.items() for key in (setting, *inner)],
}


class Recorder:
    """Wraps a section or the run info, and records the keys that are read through it."""

    def __init__(self, wrapped: Any, seen: set[str], prefix: str = "") -> None:
        self._wrapped, self._seen, self._prefix = wrapped, seen, prefix

    def __getattr__(self, name: str) -> Any:
        described = getattr(type(self._wrapped), name, None)
        if isinstance(described, property):
            assert described.fget is not None
            return described.fget(self)
        value = getattr(self._wrapped, name)
        if isinstance(value, Section):
            return Recorder(value, self._seen, f"{self._prefix}{name}.")
        self._seen.add(f"{self._prefix}{name}")
        return value


def read_by(rule: Rule) -> set[str]:
    """Return keys and facts that ``rule`` reads, over configs in which it reads all of them."""
    seen: set[str] = set()
    plain_isp = {"parallel.tensor.mode": "isp", "parallel.weight.size": 2}
    blend = {"data.weights": {"en": 1.0}, "data.train_folder": "data", "data.pack": "best_fit"}
    for changes in ({}, BUSIEST, plain_isp, {"parallel.pipeline.mode": "ZBV"}, blend):
        config = load_config(config_of(changes), device_type="cpu")
        uneven = config.model_copy(update={"model": config.model.model_copy(update={"head_dim": None})})
        for example in (config, uneven):
            list(rule.check(Recorder(example, seen), Recorder(RUN, seen)))  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("table", TABLES)
def test_tables_name_keys_that_exist(table: str) -> None:
    assert set(TABLES[table]) <= {*keys.fields(), WORLD_SIZE, DEVICE_TYPE}


def test_old_keys_are_not_keys_any_more() -> None:
    assert not OLD_KEYS & set(keys.fields())


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.check.__name__)
def test_rules_read_what_they_declare(rule: Rule) -> None:
    assert read_by(rule) == set(rule.reads)


def test_the_busiest_config_keeps_every_rule() -> None:
    assert load_config(config_of(BUSIEST), world_size=8, device_type="cpu").parallel.sequence_2D.enable


def undocumented() -> Iterator[str]:
    return (key for key, field in keys.fields().items() if not (field.description or "").endswith("."))


def test_every_key_is_documented() -> None:
    assert list(undocumented()) == []


def test_defaults_hold_what_keys_take() -> None:
    """pydantic doesn't check defaults; written out as given values, all must pass."""
    config = load_config(config_of({}))
    assert type(config).model_validate(config.model_dump()) == config
