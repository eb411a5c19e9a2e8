"""Seeds and random streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.profiler import ProfilerActivity

from internlm import accelerator
from internlm.core.context.layout import ParallelMode
from internlm.core.context.random import RandomStreams, derived_seed, mode_seeds

DATA, TENSOR = ParallelMode.DATA, ParallelMode.TENSOR


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def streams(seed: int = 1) -> RandomStreams:
    return RandomStreams(mode_seeds(seed, data_rank=0, pipeline_rank=0, tensor_rank=0))


def draw(source: RandomStreams, mode: ParallelMode) -> list[float]:
    with source.use(mode):
        return torch.rand(3).tolist()


def test_a_derived_seed_is_the_same_everywhere() -> None:
    assert derived_seed(1024, "parameter", "norm.weight") == 2979569348348730351


def test_a_derived_seed_depends_on_every_label() -> None:
    labels = [(1,), (2,), (1, "a"), (1, "b"), (1, "a", "b"), (1, "ab"), (11,)]
    seeds = {derived_seed(*some) for some in labels}
    assert len(seeds) == len(labels)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changed", "data_stream_differs"), [("data_rank", True), ("pipeline_rank", True), ("tensor_rank", False)]
)
def test_which_ranks_draw_alike(changed: str, data_stream_differs: bool) -> None:
    """Ranks of one tensor group hold the same activations, so they share the DATA stream; TENSOR is each one's own."""
    place = {"data_rank": 0, "pipeline_rank": 0, "tensor_rank": 0}
    here, there = mode_seeds(1, **place), mode_seeds(1, **{**place, changed: 1})
    assert (here[DATA] != there[DATA]) == data_stream_differs
    assert here[TENSOR] != there[TENSOR]


@pytest.mark.parametrize("mode", [DATA, TENSOR])
def test_streams_are_reproducible(mode: ParallelMode) -> None:
    assert draw(streams(), mode) == draw(streams(), mode)
    assert draw(streams(1), mode) != draw(streams(2), mode)


def test_streams_of_two_modes_differ() -> None:
    both = streams()
    assert draw(both, DATA) != draw(both, TENSOR)


def test_a_stream_goes_on_where_it_was_left() -> None:
    once, twice = streams(), streams()
    with once.use(TENSOR):
        expected = torch.rand(6).tolist()
    assert draw(twice, TENSOR) + draw(twice, TENSOR) == expected


def test_using_another_stream_does_not_disturb_the_data_stream() -> None:
    source = streams()
    undisturbed = torch.rand(2).tolist()
    source = streams()
    first = torch.rand(1).tolist()
    draw(source, TENSOR)
    assert first + torch.rand(1).tolist() == undisturbed


def test_outside_use_the_data_stream_is_drawn_from() -> None:
    source = streams()
    inside_and_outside = draw(source, DATA) + torch.rand(3).tolist()
    streams()
    assert inside_and_outside == torch.rand(3).tolist() + torch.rand(3).tolist()


def test_use_can_be_nested() -> None:
    source = streams()
    with source.use(TENSOR):
        expected = torch.rand(2).tolist()
    source = streams()
    with source.use(TENSOR):
        first = torch.rand(1).tolist()
        draw(source, DATA)
        second = draw(source, TENSOR)[:1]
    assert first + second == expected


def test_an_error_inside_use_restores_the_data_stream() -> None:
    expected = (streams(), torch.rand(1).item())[1]
    source = streams()
    with pytest.raises(RuntimeError, match="inside"), source.use(TENSOR):
        raise RuntimeError("inside")
    assert torch.rand(1).item() == expected


def test_a_saved_state_continues_every_stream() -> None:
    source = streams()
    draw(source, TENSOR)
    torch.rand(5)
    saved = source.state_dict()
    expected = draw(source, TENSOR) + draw(source, DATA)
    other = streams(seed=7)
    other.load_state_dict(saved)
    assert draw(other, TENSOR) + draw(other, DATA) == expected


def test_a_saved_state_is_a_copy() -> None:
    source = streams()
    saved = source.state_dict()
    before = {name: state.clone() for name, state in saved.items()}
    draw(source, TENSOR)
    torch.rand(1)
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_a_run_on_the_cpu_of_a_machine_with_gpus_leaves_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(accelerator.DEVICE_VARIABLE, "cpu")
    assert accelerator.device_type() == "cpu"
    assert accelerator.device_rng_state() == {}
    assert accelerator.profiler_activities() == [ProfilerActivity.CPU]
    streams = RandomStreams({ParallelMode.DATA: 1, ParallelMode.TENSOR: 2})
    assert "cuda" not in streams.state_dict()
    streams.load_state_dict({**streams.state_dict(), "cuda": torch.empty(0, dtype=torch.uint8)})
    with accelerator.fork_rng():
        torch.manual_seed(3)
