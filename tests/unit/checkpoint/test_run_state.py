"""The state file is refused as a whole where a value is of a wrong type or without meaning."""

from __future__ import annotations

import copy
import json
import os
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.checkpoint.run_state import LARGEST_STATE, RunState, check_saveable, parse_run_state
from internlm.data.batch_plan import Position
from internlm.utils.errors import CheckpointError
from tests.unit.checkpoint.samples import run_state

WHERE, TODO = "step-3/state.json", "Choose another checkpoint"


def put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    *outer, last = path
    for name in outer:
        tree = tree[name]
    tree[last] = value


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    content = run_state()
    put(content, path, value)
    return json.dumps(content).encode()


def problems_of(text: bytes, **more: Any) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        parse_run_state(text, WHERE, 1, **more)
    return list(map(str, caught.value.problems))


# -- what is read


def test_all_values_are_read() -> None:
    state = parse_run_state(json.dumps(run_state()).encode(), WHERE, 1, step=3)
    assert state.position == Position(3, 4, 16)
    assert state.model_dump() == run_state()


def test_what_is_written_is_read() -> None:
    state = RunState(**run_state())
    assert parse_run_state(state.to_bytes(), WHERE, 1) == state
    assert state.to_bytes().startswith(b'{\n "config": {\n')


@pytest.mark.parametrize(
    "values",
    [
        {"save_folder": os.fsdecode(b"/runs/\xe9t\xe9"), "run_folder": os.fsdecode(b"/runs/\xe9t\xe9/1")},
        {"seed": 10**45},
        {"config": {"model": {}, "data": {"train_folder": os.fsdecode(b"\xe9t\xe9"), "valid_every": 10**299}}},
    ],
    ids=["a path that is not in UTF-8", "a long seed", "the config"],
)
def test_what_a_run_may_have_is_read_as_it_was(values: dict[str, Any]) -> None:
    state = RunState(**run_state() | values)
    assert parse_run_state(state.to_bytes(), WHERE, 1) == state


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"seed": 10**300}, "a number has 301 digits"),
        ({"config": {"JOB_NAME": "\ud800"}}, "no text in UTF-8"),
        ({"config": {"a": "x" * LARGEST_STATE}}, "larger than 4194304 bytes"),
    ],
)
def test_what_could_not_be_read_is_not_written(values: dict[str, Any], reason: str) -> None:
    """Nor does a run start with it."""
    state = RunState(**run_state() | values)
    for check in (state.to_bytes, partial(check_saveable, values)):
        with pytest.raises(CheckpointError) as caught:
            check()
        assert str(caught.value).startswith(f"state.json: could not be read again ({reason})")


@pytest.mark.parametrize("name", ["world_size", "cpu_kernels", "save_folder", "run_folder", "launcher", "versions"])
def test_what_is_only_informative_may_be_missing(name: str) -> None:
    content = run_state()
    del content[name]
    assert parse_run_state(json.dumps(content).encode(), WHERE, 1).train_state.step == 3


@pytest.mark.parametrize("path", [("host",), ("train_state", "epoch"), ("optimizer", "note"), ("config", "new")])
def test_unknown_keys_are_kept(path: tuple[str, ...]) -> None:
    """A later version of the same format may add information."""
    text = changed(path, "x")
    assert parse_run_state(text, WHERE, 1).model_dump() == json.loads(text)


# -- wrong values

STEP = ("train_state", "step")
SCALE = ("optimizer", "loss_scale", "scale")

#: Path of a value, the value, and the message.
WRONG: list[tuple[tuple[str | int, ...], Any, str]] = [
    (STEP, -3, "train_state.step: must be at least 0, got -3"),
    (STEP, 10**18, "train_state.step: must be at most 1000000000000, got 1000000000000000000"),
    (STEP, "24", "train_state.step: expected an integer, got '24'"),
    (STEP, 3.0, "train_state.step: expected an integer, got 3.0"),
    (STEP, True, "train_state.step: expected an integer, got True"),
    (STEP, None, "train_state.step: expected an integer, got None"),
    (STEP, 4, "sampler[0]: expected train_state.step, 4, got 3"),
    (("train_state", "num_consumed_tokens"), -1, "train_state.num_consumed_tokens: must be at least 0, got -1"),
    (("train_state", "inf_nan_skip_batches"), [], "train_state.inf_nan_skip_batches: expected an integer, got []"),
    (("train_state",), 3, "train_state: expected an object, got 3"),
    (("optimizer",), [], "optimizer: expected an object, got []"),
    (("optimizer", "updates"), -1, "optimizer.updates: must be at least 0, got -1"),
    (("optimizer", "skipped_in_a_row"), 0.5, "optimizer.skipped_in_a_row: expected an integer, got 0.5"),
    (("optimizer", "loss_scale"), 65536, "optimizer.loss_scale: expected an object, got 65536"),
    (SCALE, 0, "optimizer.loss_scale.scale: must be greater than 0, got 0"),
    (SCALE, -1.5, "optimizer.loss_scale.scale: must be greater than 0, got -1.5"),
    (SCALE, "1", "optimizer.loss_scale.scale: expected a number, got '1'"),
    (("optimizer", "loss_scale", "good_steps"), -1, "optimizer.loss_scale.good_steps: must be at least 0, got -1"),
    (("sampler",), [], "sampler: expected 3 numbers, got []"),
    (("sampler",), [3, 4], "sampler: expected 3 numbers, got [3, 4]"),
    (("sampler",), [3, 4, 16, 0], "sampler: expected 3 numbers, got [3, 4, 16, 0]"),
    (("sampler",), {}, "sampler: expected a list, got {}"),
    (("sampler", 1), -4, "sampler[1]: must be at least 0, got -4"),
    (("sampler", 2), "16", "sampler[2]: expected an integer, got '16'"),
    (("data",), None, "data: expected a string, got None"),
    (("seed",), -1, "seed: must be at least 0, got -1"),
    (("seed",), "24", "seed: expected an integer, got '24'"),
    (("world_size",), 0, "world_size: must be at least 1, got 0"),
    (("config",), None, "config: expected an object, got None"),
    (("config",), {}, "config.model: expected an object, got None"),
    (("config", "data"), [], "config.data: expected an object, got []"),
    (("cpu_kernels",), ["x"], "cpu_kernels: expected an object, got ['x']"),
    (("cpu_kernels", "a processor"), "torch", "cpu_kernels.a processor: expected an object, got 'torch'"),
    (("cpu_kernels", "a processor", "linear"), 1, "cpu_kernels.a processor.linear: expected a string, got 1"),
    (("cpu_kernels",), {"a\nb": 1}, "cpu_kernels.'a\\nb': expected an object, got 1"),
    (("save_folder",), 1, "save_folder: expected a string, got 1"),
    (("run_folder",), [], "run_folder: expected a string, got []"),
    (("versions",), {"torch": 2}, "versions.torch: expected a string, got 2"),
    (("format",), 0, "format: must be at least 1, got 0"),
    (("format",), "one", "format: expected an integer, got 'one'"),
    (("format",), True, "format: expected an integer, got True"),
]


@pytest.mark.parametrize(("path", "value", "expected"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_values(path: tuple[str | int, ...], value: Any, expected: str) -> None:
    assert problems_of(changed(path, value))[0] == f"{WHERE}: {expected}. {TODO}"


@pytest.mark.parametrize("name", ["format", "config", "train_state", "optimizer", "sampler", "data", "seed"])
def test_missing_keys(name: str) -> None:
    content = run_state()
    del content[name]
    assert problems_of(json.dumps(content).encode()) == [f"{WHERE}: {name}: is missing. {TODO}"]


def test_all_wrong_values_are_listed() -> None:
    content = run_state()
    put(content, STEP, -3)
    put(content, SCALE, 0)
    put(content, ("sampler",), [])
    assert len(problems_of(json.dumps(content).encode())) == 3


def test_the_step_is_that_of_the_folder() -> None:
    expected = f"{WHERE}: train_state.step: expected 40, as the folder is named, got 3. {TODO}"
    assert problems_of(json.dumps(run_state()).encode(), step=40) == [expected]


def test_a_newer_format_is_named_whatever_else_it_has() -> None:
    assert problems_of(b'{"format": 7}') == [
        f"{WHERE}: expected a format version of at most 1, got 7. Update InternEvo"
    ]


def test_an_older_format_than_the_files_have() -> None:
    with pytest.raises(CheckpointError, match=r"format: expected 2, got 1\. Choose"):
        parse_run_state(json.dumps(run_state()).encode(), WHERE, 2)


# -- what is no JSON, or hostile

#: Text, and the reason.
UNREADABLE: list[tuple[bytes, str]] = [
    (b"", "Expecting value: line 1 column 1 (char 0)"),
    (b'{"format": 1, "train_st', "Unterminated string starting at: line 1 column 15 (char 14)"),
    (b"\x00", "Expecting value: line 1 column 1 (char 0)"),
    (b"[]", "expected an object, got []"),
    (b"null", "expected an object, got None"),
    (b"\xff\xfe\x00", "no text in UTF-8"),
    ("\ufeff{}".encode(), "Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"),
    ('{"format": 1}'.encode("utf-16"), "no text in UTF-8"),
    (b'{"data": "\\ud800"}', "no text in UTF-8"),
    (b'{"\\udfff": 1}', "no text in UTF-8"),
    (b'{"seed": NaN}', "the number NaN is not finite"),
    (b'{"seed": -Infinity}', "the number -Infinity is not finite"),
    (b'{"seed": 1e999}', "the number 1e999 is not finite"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "a number has 5000 digits"),
    (b'{"seed": 1.' + b"9" * 5000 + b"}", "a number has 5002 digits"),
    (b'{"seed": 1, "data": "", "seed": 1}', "the key 'seed' occurs twice"),
    (b'{"config": {"model": {"a": 1, "a": 2}}}', "the key 'a' occurs twice"),
    (b'{"config": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 32 deep"),
    (b'{"config": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested more than 32 deep"),
    (b"[" * 1_000_000, "nested more than 32 deep"),
    (b" " * (LARGEST_STATE + 1), "larger than 4194304 bytes"),
]


@pytest.mark.parametrize(("text", "reason"), UNREADABLE, ids=[f"{i} {why}" for i, (_, why) in enumerate(UNREADABLE)])
def test_unreadable_files(text: bytes, reason: str) -> None:
    assert problems_of(text) == [f"{WHERE}: cannot be read ({reason}). {TODO}"]


def test_many_values_are_read_in_time() -> None:
    """A file within the limit can't hold up a run: no check takes time quadratic in its size."""
    keys = ",".join(f'"{number}":0' for number in range(250_000))
    assert problems_of(f'{{{keys},"0":0}}'.encode()) == [f"{WHERE}: cannot be read (the key '0' occurs twice). {TODO}"]


def _paths(tree: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [inner for key, value in items for inner in ((*path, key), *_paths(value, (*path, key)))]


NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**40, 10**400])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(_paths(run_state())), JSON)
def test_any_value_is_read_or_refused(path: tuple[str | int, ...], value: Any) -> None:
    """What is read comes out again as it was; the errors of what is refused can be printed, one on a line."""
    content = copy.deepcopy(run_state())
    put(content, path, value)
    try:
        state = parse_run_state(json.dumps(content).encode(), WHERE, 1)
    except CheckpointError as error:
        problems = error.problems
    else:
        assert state.model_dump() == content
        assert state.position.step == state.train_state.step >= 0
        return
    assert all(str(problem).isprintable() for problem in problems)


@given(JSON | st.dictionaries(st.sampled_from(sorted(run_state())), JSON), st.binary(max_size=3), st.integers(0, 100))
def test_any_file_is_read_or_refused(content: Any, noise: bytes, position: int) -> None:
    text = json.dumps(content).encode()
    with pytest.raises(CheckpointError):
        parse_run_state(text[:position] + noise + text[position:], WHERE, 1)
