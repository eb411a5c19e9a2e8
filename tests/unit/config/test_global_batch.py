"""The batch of a step, given for all ranks together, and the layout by the number of processes."""

from __future__ import annotations

from typing import Any

import pytest

from internlm.config import load_config
from tests.unit.config.samples import SMALLEST, config_of, problems_of

#: A step of 12 sequences, which are 6 rows.
TWELVE = {"data.micro_num": None, "data.global_batch": 12}


@pytest.mark.parametrize(
    ("changes", "world_size", "micro_num"),
    [
        ({}, 1, 6),
        ({}, 2, 3),
        ({}, 4, 2),  # two rows of padding
        ({}, 5, 2),
        ({}, 8, 1),
        ({"parallel.tensor.size": 2}, 4, 3),
        ({"parallel.pipeline.size": 2, "model.num_chunks": 2}, 2, 6),
        ({"parallel.pipeline.size": 2, "model.num_chunks": 2}, 4, 4),  # rounds of two
        ({"parallel.pipeline.size": 2}, 4, 3),
    ],
)
def test_micro_num_follows(changes: dict[str, Any], world_size: int, micro_num: int) -> None:
    config = load_config(config_of({**TWELVE, **changes}), world_size=world_size)
    assert config.data.micro_num == config.data.valid_micro_num == micro_num
    assert config.data.step_rows(world_size) == 6
    assert load_config(config.model_dump(), world_size=world_size) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data.global_batch": 12},
            "data.micro_num: 4, but data.global_batch = 12 implies 3 here. Remove one of the two keys",
        ),
        (
            {**TWELVE, "data.global_batch": 11},
            "data.global_batch: 11 is not divisible by data.micro_bsz = 2. Use 10, or another micro_bsz",
        ),
        (
            {**TWELVE, "data.rampup_batch_size": "14 2 1"},
            "data.rampup_batch_size: start = 14 is more than data.global_batch = 12, where the ramp-up ends. Start at "
            "12 or less",
        ),
        (
            {**TWELVE, "data.rampup_batch_size": "2 1 1"},
            "data.rampup_batch_size: start = 2 and increment = 1 are not both divisible by data.micro_bsz = 2. With "
            "data.global_batch they are numbers of sequences",
        ),
        (
            {**TWELVE, "parallel.pipeline.size": 2, "data.global_batch": 2},
            "data.micro_num: 1 is less than parallel.pipeline.size = 2. Use at least 2",
        ),
    ],
)
def test_wrong_batches(changes: dict[str, Any], said: str) -> None:
    assert problems_of(changes, world_size=2) == [said]


ELASTIC = {
    **TWELVE,
    "parallel.tensor": {"size": 4, "mode": "msp"},
    "parallel.elastic": [
        {"worlds": [2, 6], "layout": {"tensor.size": 2}},
        {"worlds": (3, 1), "layout": {"tensor.size": 1, "tensor.mode": "mtp"}},
    ],
}


@pytest.mark.parametrize(("world_size", "layout"), [(8, (4, "msp")), (6, (2, "msp")), (3, (1, "mtp"))])
def test_the_layout_follows_from_the_number_of_processes(world_size: int, layout: tuple[int, str]) -> None:
    config = load_config(config_of(ELASTIC), world_size=world_size)
    assert (config.parallel.tensor.size, config.parallel.tensor.mode) == layout
    assert load_config(config.model_dump(), world_size=world_size) == config


def test_an_override_wins_over_a_layout() -> None:
    config = load_config(config_of(ELASTIC), ["parallel.tensor.size=1"], world_size=6)
    assert (config.parallel.tensor.size, config.parallel.tensor.mode) == (1, "msp")


@pytest.mark.parametrize(
    ("elastic", "world_size", "said"),
    [
        ([], 6, "parallel: world size 6 is not divisible by pipeline.size · tensor.size = 1 · 4 = 4. Start a multiple"),
        ([{"worlds": [6], "layout": {"tensr.size": 2}}], 6, "parallel.tensr: unknown key. Did you mean"),
        (
            [{"worlds": [7], "layout": {"tensr.size": 2}}],
            4,
            "parallel.elastic: 'tensr.size' is no key of parallel. Example: 'tensor.size'",
        ),
        ([{"worlds": [6], "layout": {"tensor.size": "2"}}], 6, "parallel.tensor.size: '2' is a string. Set it to"),
        ([{"worlds": [], "layout": {}}], 4, "parallel.elastic.worlds: [] is out of range. Set it to"),
        ([{"world": [6]}], 4, "parallel.elastic.world: unknown key. Did you mean 'worlds'?"),
        ({"6": 2}, 4, "parallel.elastic: "),
    ],
)
def test_wrong_layouts(elastic: Any, world_size: int, said: str) -> None:
    problems = problems_of({**ELASTIC, "parallel.elastic": elastic}, world_size=world_size)
    assert any(problem.startswith(said) for problem in problems), problems


def test_without_a_global_batch_nothing_follows() -> None:
    assert load_config(SMALLEST, world_size=2).data.step_rows(2) == 8
