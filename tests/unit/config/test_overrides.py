"""``--set a.b=c``."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.config import keys, load_config
from internlm.config.load import parse_override
from tests.unit.config.samples import config_of, found

NAMES = st.lists(st.text(string.ascii_letters + "_", min_size=1), min_size=1, max_size=4).map(".".join)
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def failures(*overrides: str) -> list[str]:
    return list(map(str, found({}, overrides)))


@given(NAMES, LITERALS)
def test_literals_come_through(key: str, value: Any) -> None:
    assert parse_override(f"{key}={value!r}") == (key, value)


@given(NAMES, st.text(string.ascii_letters + "/:.- ").map(str.strip))
def test_what_is_no_literal_is_text(key: str, text: str) -> None:
    known = text in ("None", "True", "False") or text.replace(".", "") == ""
    assert known or parse_override(f"{key} = {text}") == (key, text)


@given(st.text() | st.text("a.= "))
def test_any_text_parses_or_is_malformed(text: str) -> None:
    key, equals, _ = text.partition("=")
    if equals and all(key.strip().split(".")):
        assert parse_override(text)[0] == key.strip()
    else:
        with pytest.raises(ValueError, match="expected KEY=VALUE, got"):
            parse_override(text)


@given(st.sampled_from([*keys.fields(), "parallel.sequence_parallel", "moe", "model.moe_layer_kwargs.x"]), LITERALS)
def test_any_value_at_any_key_resolves_or_is_reported(key: str, value: Any) -> None:
    problems = found({}, [f"{key}={value!r}"], world_size=8, device_type="cpu")
    assert all(problem.where and problem.message and problem.todo for problem in problems)


def test_later_overrides_win() -> None:
    assert load_config(config_of({}), ["data.micro_num=2", "data.micro_num=3"]).data.micro_num == 3


def test_override_of_a_short_form_keeps_the_rest() -> None:
    config = load_config(config_of({"parallel": {"tensor": 2, "zero1": 4}}), ["parallel.tensor.mode=isp"])
    assert (config.parallel.tensor.size, config.parallel.tensor.mode, config.parallel.zero1.size) == (2, "isp", 4)


def test_override_in_the_short_form() -> None:
    changes = {"parallel.tensor": {"size": 2, "mode": "isp"}}
    assert load_config(config_of(changes), ["parallel.tensor=4"]).parallel.tensor.size == 4


def test_override_under_an_old_name_replaces_the_new_one() -> None:
    assert load_config(config_of({"model.top_k": 2}), ["model.moe_gate_k=1"]).model.top_k == 1


def test_override_of_a_key_that_is_wrong_in_the_file() -> None:
    assert load_config(config_of({"data.micro_num": "two"}), ["data.micro_num=2"]).data.micro_num == 2


def test_override_makes_the_sections_it_needs() -> None:
    config = load_config(config_of({}), ["ckpt.load_ckpt_info.path=local:x", "model.moe_layer_kwargs.capacity=1.5"])
    assert config.ckpt.load_ckpt_info is not None
    assert config.ckpt.load_ckpt_info.path == "local:x"
    assert config.model.moe_layer_kwargs == {"capacity": 1.5}


def test_override_with_none_unsets() -> None:
    assert load_config(config_of({"data.train_folder": "x"}), ["data.train_folder=None"]).data.train_folder is None


@pytest.mark.parametrize("text", ["data.micro_num", "=2", "data..micro_num=2", ".=1", ""])
def test_malformed(text: str) -> None:
    assert failures(text) == [f"--set: expected KEY=VALUE, got {text!r}. Example: --set model.num_layers=4"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.micronum=2", "--set data.micronum: unknown key. Did you mean 'data.micro_num'?"),
        ("dat.micro_num=2", "--set dat.micro_num: unknown key. Did you mean 'data.micro_num'?"),
        ("parallel.fsdp=True", "--set parallel.fsdp: unknown key. Set parallel.zero1.fsdp instead"),
        ("optimizer.lr=1", "--set optimizer.lr: unknown key. Set adam.lr instead"),
        ("lr=1", "--set lr: unknown key. Set adam.lr instead"),
        ("model.type=1", "--set model.type: unknown key. Did you mean 'model.dtype'?"),
        ("moddle={}", "--set moddle: unknown key. Did you mean 'model'?"),
        ("model.num_layers.x=2", "--set model.num_layers.x: unknown key. Did you mean 'model.num_layers'?"),
        ("model.gate_k=8", "--set model.gate_k: unknown key. Did you mean 'model.top_k'?"),
        ("data.micro_num=two", "data.micro_num: 'two' is a string. Set it to an integer of at least 1"),
        (
            "ckpt.load_ckpt_info=dict(path='x', content=('model',))",
            "--set ckpt.load_ckpt_info: \"dict(path='x...t=('model',))\" is an expression, but only literals are "
            "evaluated. Write it as --set \"ckpt.load_ckpt_info={'path': 'x', 'content': ('model',)}\"",
        ),
        (
            "monitor.alert=dict(feishu_alert_address='https://host/hook/token')",
            '--set monitor.alert: "dict(feishu_...://host/***\')" is an expression, but only literals are evaluated. '
            "Write it as --set \"monitor.alert={'feishu_alert_address': 'https://host/***'}\"",
        ),
        (
            "adam.lr=1/3",
            "--set adam.lr: '1/3' is an expression, but only literals are evaluated. Set it to a number of more than 0",
        ),
        (
            "data.micro_num=int('4')",
            "--set data.micro_num: \"int('4')\" is an expression, but only literals are evaluated. Set it to an",
        ),
        ("model.dtype=torch.float8", "model.dtype: 'torch.float8' is unknown. Set it to "),
    ],
)
def test_unknown_keys_and_bad_values(override: str, expected: str) -> None:
    (problem,) = failures(override)
    assert problem.startswith(expected)


def test_all_bad_overrides_are_reported_together() -> None:
    assert len(failures("a", "moddle={}", "data.micro_num=0", "adam.lr=-1")) == 4


@pytest.mark.parametrize(("text", "value"), [("7", "7"), ("1,5", "1,5"), ("0-9,20", "0-9,20"), ("'3'", "3")])
def test_batches_to_skip_may_look_like_numbers(text: str, value: str) -> None:
    assert load_config(config_of({}), [f"data.skip_batches={text}"]).data.skip_batches == value
