"""A config as scripts for InternEvo read it: like a dict, with the variables of its file."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm.config import load_config
from internlm.core.context import Config
from internlm.utils.errors import ConfigError, UserError

KEYS = """
VOCAB_SIZE, NESTED = 512, dict(sizes=[1, 2])
THIS = [1]
THIS.append(THIS)
ACT = len
JOB_NAME = "a_job"
model = dict(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=VOCAB_SIZE)
data = dict(seq_len=16, micro_bsz=2, total_steps=3)
adam = dict(lr=0.001)
parallel = dict(zero1=-1, tensor=1)
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "config.py"
    file.write_text(KEYS)
    return load_config(file, (), 1, "cpu")


IDIOMS: dict[str, tuple[Callable[[Config], Any], Any]] = {
    "an item": (lambda c: c["model"]["hidden_size"], 64),
    "an item of an attribute": (lambda c: c.data["micro_bsz"], 2),
    "a derived value": (lambda c: c.data["packed_length"], 32),
    "get": (lambda c: (c.get("JOB_NAME"), c.get("use_fp32_norm", True)), ("a_job", False)),
    "get with a default": (lambda c: (c.get("nothing"), c.data.get("nothing", 3)), (None, 3)),
    "in": (lambda c: ("model" in c, "num_layers" in c.model, "packed_length" in c.data), (True, True, True)),
    "not in": (lambda c: ("generation" in c, "nothing" in c.model), (False, False)),
    "items": (lambda c: dict(c.parallel.zero1.items()), {"size": -1, "fsdp": False}),
    "keys and values": (
        lambda c: dict(zip(c.parallel.zero1.keys(), c.parallel.zero1.values(), strict=True)),
        {"size": -1, "fsdp": False},
    ),
    "iteration over keys": (lambda c: list(c.parallel.zero1), ["size", "fsdp"]),
    "len": (lambda c: len(c.parallel.zero1), 2),
    "keywords": (lambda c: dict(**c.parallel.zero1), {"size": -1, "fsdp": False}),
    "setdefault of a key that is there": (lambda c: c.model.setdefault("num_layers", 7), 2),
    "a variable": (lambda c: (c.VOCAB_SIZE, c["VOCAB_SIZE"], c.get("NESTED")), (512, 512, {"sizes": [1, 2]})),
    "a variable that is there": (lambda c: ("VOCAB_SIZE" in c, "ACT" in c, "THIS" in c), (True, False, False)),
    "hasattr": (
        lambda c: (hasattr(c, "VOCAB_SIZE"), hasattr(c, "MISSING"), hasattr(c.model, "x")),
        (True, False, False),
    ),
    "a copy": (lambda c: (copy.deepcopy(c) == c, copy.deepcopy(c).VOCAB_SIZE), (True, 512)),
    "a config of a dict of sections": (lambda c: Config(dict(c)) == c, True),
    "sent to another process": (lambda c: pickle.loads(pickle.dumps(c)).VOCAB_SIZE, 512),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_config_reads_like_a_dict(idiom: str, config: Config) -> None:
    read, expected = IDIOMS[idiom]
    assert read(config) == expected


def test_an_unknown_name_is_an_error_of_a_dict(config: Config) -> None:
    with pytest.raises(KeyError, match="nothing"):
        config.model["nothing"]
    with pytest.raises(AttributeError, match="nothing"):
        config.nothing  # noqa: B018


def _set(section: Any, name: str) -> None:
    setattr(section, name, 8)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda c: _set(c.model, "num_layers"),
    "new attribute": lambda c: _set(c, "num_layers"),
    "item": lambda c: c.model.__setitem__("num_layers", 8),
    "setdefault": lambda c: c.data.setdefault("num_layers", 8),
    "update": lambda c: c.model.update({"num_layers": 8}),
    "update by keyword": lambda c: c.model.update(num_layers=8),
    "pop": lambda c: c.model.pop("num_layers"),
    "del": lambda c: c.model.__delattr__("num_layers"),
    "del of an item": lambda c: c.model.__delitem__("num_layers"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_and_the_replacement_named(change: str, config: Config) -> None:
    before = copy.deepcopy(config)
    with pytest.raises(UserError, match=r"^config key num_layers: cannot be .* frozen\. Set it in the config file, "):
        CHANGES[change](config)
    assert config == before


def test_a_config_is_made_of_a_dict_or_a_file(config: Config, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(KEYS, namespace)
    keys = {name: value for name, value in namespace.items() if name not in ("__builtins__", "ACT", "THIS")}
    assert Config(keys).data == Config.from_file(tmp_path / "config.py").data == config.data
    assert Config(keys).VOCAB_SIZE == 512
    assert Config(keys).parallel.zero1.size == -1  # an old spelling, normalised


def test_a_wrong_dict_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"model\.hiden_size: unknown key\. Did you mean 'hidden_size'"):
        Config({"model": dict(num_layers=1, hiden_size=4, num_attention_heads=1, vocab_size=3)})
