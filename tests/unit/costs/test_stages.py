"""Stage assignment: every layer is on one stage, balanced as the config says, under the schedule it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from internlm.config import Config, load_config
from internlm.core.parallel.sharding import StageLayers
from internlm.core.scheduler.table import make_table, write_table
from internlm.core.scheduler.validate import ScheduleError
from internlm.costs.stages import own_table, partition_of, stage_layers_of
from tests.unit.config.samples import config_of


def config(layers: int, stages: int, chunks: int = 1, mode: str = "1F1B", **keys: Any) -> Config:
    pipeline = {"size": stages, "mode": mode, "partition": keys.pop("partition", "uniform")}
    model = {f"model.{name}": value for name, value in keys.items()}
    more = {"model.num_layers": layers, "model.num_chunks": chunks, "parallel.pipeline": pipeline}
    return load_config(config_of({**more, "data.micro_num": 2 * stages, **model}))


def parts(config: Config) -> list[StageLayers]:
    return [stage_layers_of(config, stage) for stage in range(config.parallel.pipeline.size)]


LOOP, V = (2, "1F1B"), (2, "ZBV")


@pytest.mark.parametrize("partition", ["uniform", "parameters", "flops"])
@pytest.mark.parametrize(("chunks", "mode"), [(1, "1F1B"), (1, "GPIPE"), (1, "ZBH1"), LOOP, (3, "1F1B"), V])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_layer_is_somewhere_once(stages: int, chunks: int, mode: str, partition: str) -> None:
    ours = parts(config(11, stages, chunks, mode, partition=partition))
    held = sorted((numbers.start, numbers.stop) for part in ours for numbers in part.chunks)
    assert [start for start, _ in held] == [0, *(stop for _, stop in held[:-1])]
    assert held[-1][1] == 11
    assert all(start < stop for start, stop in held)
    assert [sum(getattr(part, end) for part in ours) for end in ("has_embedding", "has_head")] == [1, 1]
    assert all(part.layers == 11 for part in ours)


@pytest.mark.parametrize(
    ("chunks", "mode", "expected"),
    [
        (1, "1F1B", [[range(2)], [range(2, 6)], [range(6, 12)]]),
        (*LOOP, [[range(1), range(6, 7)], [range(1, 3), range(7, 9)], [range(3, 6), range(9, 12)]]),
        (*V, [[range(1), range(9, 12)], [range(1, 3), range(7, 9)], [range(3, 6), range(6, 7)]]),
    ],
)
def test_numbers_are_given_in_the_order_of_the_model(chunks: int, mode: str, expected: list[list[range]]) -> None:
    """Chunk 1 begins anew at the first stage, or where the V turns."""
    partition = (2, 4, 6) if chunks == 1 else (1, 2, 3, 1, 2, 3)
    assert parts(config(12, 3, chunks, mode, partition=partition)) == [
        StageLayers(12, tuple(each)) for each in expected
    ]


def test_a_run_without_a_pipeline_is_whole() -> None:
    assert parts(config(5, 1)) == [StageLayers.whole(5)]


def test_uniform_spares_the_last() -> None:
    assert partition_of(config(10, 4, partition="uniform")) == [2, 3, 3, 2]


def test_by_parameters_both_tables_count() -> None:
    """A layer of the smallest config has 12 · 64² parameters or some; a table as many as two of them."""
    ours = config(12, 4, partition="parameters", vocab_size=1600)
    assert partition_of(ours) == [2, 4, 4, 2]


def test_by_flops_the_head_counts_and_the_embedding_does_not() -> None:
    ours = config(12, 4, partition="flops", vocab_size=1600)
    first, *_, last = partition_of(ours)
    assert first >= 3
    assert last < 3


# -- schedules in files of the user's


def test_a_schedule_in_a_file_is_read(tmp_path: Path) -> None:
    table = make_table("zbh1", 2, 1, 4)
    write_table(table, tmp_path / "mine.csv")
    read = own_table(load_config(config_of({"parallel.pipeline": {"size": 2, "table": str(tmp_path / "mine.csv")}})))
    assert read is not None
    assert read(4).actions == table.actions
    with pytest.raises(ScheduleError) as caught:
        read(5)
    assert str(caught.value.problems[-1]).endswith(
        "mine.csv: expected an action table for parallel.pipeline.size = 2, model.num_chunks = 1 and "
        "data.micro_num = 5. Change the file or these keys"
    )


def test_without_a_file_there_is_none() -> None:
    assert own_table(config(4, 2)) is None


@pytest.mark.parametrize(
    ("kind", "mode", "cuts"),
    [("zbv", "1F1B", ("V-shaped", "round-robin")), ("interleaved", "ZBV", ("round-robin", "V-shaped"))],
)
def test_a_schedule_for_a_model_that_is_cut_otherwise(
    kind: str, mode: str, cuts: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.csv"
    write_table(make_table(kind, 2, 2, 4), path)
    pipeline = {"size": 2, "mode": mode, "table": str(path)}
    read = own_table(load_config(config_of({"parallel.pipeline": pipeline, "model.num_chunks": 2})))
    assert read is not None
    with pytest.raises(ScheduleError) as caught:
        read(4)
    assert str(caught.value) == (
        f"{path}: expected a {cuts[1]} stage layout, as in the config, got a {cuts[0]} one. "
        f"{'Add' if mode == 'ZBV' else 'Remove'} the line V before the ranks, or change parallel.pipeline.mode"
    )


def test_a_schedule_without_backward_would_teach_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write_table(make_table("1f1b", 2, 1, 4).forward_only(), path)
    read = own_table(load_config(config_of({"parallel.pipeline": {"size": 2, "table": str(path)}})))
    assert read is not None
    with pytest.raises(ScheduleError, match=r"has no backward action \(B\), so no gradient .* Add a B for every F"):
        read(4)
