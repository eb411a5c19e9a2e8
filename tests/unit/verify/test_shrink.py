"""The smallest layout that still differs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace

import pytest

from internlm.cli import parsers
from internlm.config import Config
from internlm.utils.errors import ConfigError, Problem
from internlm.verify.configs import HOST_CORES, Devices, Plan
from internlm.verify.shrink import Attempt, smallest
from tests.unit.config.test_cli import SFT

LARGE = Attempt(
    source=SFT,
    overrides=(
        *("parallel.tensor.size=4", "parallel.tensor.mode=msp", "parallel.pipeline.size=2", "model.num_chunks=2"),
        *("parallel.pipeline.mode=ZBV", "data.micro_num=4", "model.checkpoint=True", "model.num_layers=8"),
    ),
    world_size=16,
    steps=3,
    dtype="float64",
    shrink=True,
    devices=HOST_CORES,
    seed=1,
)

Needs = Callable[[Config, Plan], bool]


@pytest.mark.parametrize(
    ("needs", "world", "rest"),
    [
        (lambda c, plan: c.parallel.tensor.size > 1, 2, {"tensor": 2, "stages": 1, "layers": 1, "micro": 1}),
        (lambda c, plan: c.parallel.pipeline.size > 1, 2, {"tensor": 1, "stages": 2, "layers": 2, "micro": 2}),
        (lambda c, plan: c.model.num_chunks > 1, 2, {"tensor": 1, "stages": 2, "layers": 4, "micro": 2}),
        (lambda c, plan: plan.data_size > 1, 2, {"tensor": 1, "stages": 1, "layers": 1, "micro": 1}),
        (lambda c, plan: c.data.micro_num > 1, 1, {"tensor": 1, "stages": 1, "layers": 1, "micro": 2}),
        (
            lambda c, plan: plan.steps > 1 and c.parallel.tensor.mode == "msp",
            2,
            {"tensor": 2, "stages": 1, "layers": 1, "micro": 1},
        ),
        (lambda c, plan: plan.world_size == 16, 16, {"tensor": 4, "stages": 2, "layers": 2, "micro": 2}),
    ],
)
def test_what_the_mistake_needs_is_kept(needs: Needs, world: int, rest: dict[str, int]) -> None:
    found = smallest(LARGE, lambda plan: needs(plan.config, plan))
    plan = found.plan()
    c = plan.config
    sizes = {"tensor": c.parallel.tensor.size, "stages": c.parallel.pipeline.size, "layers": c.model.num_layers}
    assert needs(c, plan)
    assert plan.world_size == world
    assert {**sizes, "micro": c.data.micro_num} == rest


def test_a_smaller_layout_that_fails_is_left_out() -> None:
    def only_as_large(plan: Plan) -> bool:
        if plan.world_size < 16:
            raise ConfigError(Problem("here", "is too small", "Grow"))
        return False

    assert smallest(LARGE, only_as_large) == LARGE


def test_compilation_and_offloading_are_taken_away() -> None:
    overrides = ("model.compile=True", "model.cpu_offloading=1")
    model = smallest(replace(LARGE, overrides=overrides, world_size=1), lambda plan: True).plan().config.model
    assert not model.compile
    assert model.cpu_offloading == 0


def test_the_search_ends_in_time() -> None:
    assert smallest(LARGE, lambda plan: True, limit=0.0) == LARGE


@pytest.mark.parametrize(("differs_in_float64", "dtype"), [(True, "float64"), (False, "bfloat16")])
def test_half_precision_is_left_if_float64_differs_too(differs_in_float64: bool, dtype: str) -> None:
    def differs(plan: Plan) -> bool:
        return differs_in_float64 or str(plan.config.model.dtype) == "torch.bfloat16"

    assert smallest(replace(LARGE, dtype="bfloat16"), differs).dtype == dtype


def test_the_command_is_quoted_for_a_shell() -> None:
    overrides = ("job_name='it is'", 'data.train_folder="a b"', "model.lora={'rank': 2}", "a=$HOME", "b=`c`;d!", "e=\\")
    attempt = replace(LARGE, source="my configs/a.py", overrides=overrides, devices=Devices("cuda", 8), shrink=False)
    words = ["internlm", "verify", "my configs/a.py", "--world", "16", "--steps", "3", "--seed", "1"]
    words += ["--device", "cuda", *(word for each in overrides for word in ("--set", each))]
    assert shlex.split(attempt.command()) == words


def test_the_command_leads_to_the_same_plan() -> None:
    found = smallest(LARGE, lambda plan: plan.config.parallel.tensor.mode == "msp")
    words = shlex.split(found.command())
    assert words[:3] == ["internlm", "verify", SFT]
    parser = argparse.ArgumentParser()
    parsers.verify(parser)
    options = parser.parse_args(words[2:])
    again = Attempt(
        source=options.config,
        overrides=tuple(options.set),
        world_size=options.world,
        steps=options.steps,
        dtype=options.dtype,
        shrink=options.debug_size,
        devices=HOST_CORES,
        seed=options.seed,
    )
    assert again.plan().config == found.plan().config
