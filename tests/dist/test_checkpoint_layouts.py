"""Any parallel layout loads what another one saved, bit by bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.whole_runs import Outcome, assert_same_tensors, fit, resume, saving

#: (ranks, overrides); the vocabulary is one that no size divides.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "data": (2, ()),
    "mtp": (2, ("parallel.tensor.mode=mtp", "parallel.tensor.size=2", "model.embed_split_hidden=False")),
    "msp": (4, ("parallel.tensor.mode=msp", "parallel.tensor.size=2")),
    "isp": (4, ("parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.weight.size=4")),
    "pipeline": (4, ("parallel.pipeline.size=2", "parallel.pipeline.partition=[3,1]")),
    "V": (4, ("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "parallel.tensor.size=2")),
}
WRITERS = ("mtp", "msp", "isp", "pipeline", "V")
COMMON = ("model.num_layers=4", "model.vocab_size=67", "model_type=INTERNLM", "model.num_kv_attention_heads=2")


def _overrides(folder: Path, layout: str) -> tuple[int, list[str]]:
    ranks, own = LAYOUTS[layout]
    return ranks, saving(folder, *COMMON, *own, total=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    """A folder with a checkpoint of step 2 for each layout that saves, and the run that made it."""
    runs = {}
    for layout in WRITERS:
        folder = tmp_path_factory.mktemp(layout)
        ranks, overrides = _overrides(folder, layout)
        runs[layout] = folder, fit(ranks, overrides, stop_after=2)
    return runs


def _pairs() -> Iterator[object]:
    """Yield writer and reader: one process reads all, every other layout two of them; wide, every layout all."""
    for i, writer in enumerate(WRITERS):
        for j, reader in enumerate(LAYOUTS):
            wide = reader != "one process" and (i - j) % len(WRITERS) > 1
            yield pytest.param(writer, reader, marks=[pytest.mark.wide] if wide else [])


@pytest.mark.parametrize(("writer", "reader"), list(_pairs()))
def test_any_layout_loads_what_another_saved(writer: str, reader: str, saved: dict[str, tuple[Path, Outcome]]) -> None:
    folder, run = saved[writer]
    loaded = resume(*_overrides(folder, reader))
    assert_same_tensors(loaded.tensors, run.tensors)
    assert (loaded.state, set(loaded.ranks[0].steps)) == (run.state, set(run.ranks[0].steps))


@pytest.mark.parametrize(
    "layout", ["msp", "isp", "V", *(pytest.param(layout, marks=pytest.mark.wide) for layout in ("mtp", "pipeline"))]
)
def test_resumed_is_straight(layout: str, tmp_path: Path, saved: dict[str, tuple[Path, Outcome]]) -> None:
    straight = fit(*_overrides(tmp_path / "straight", layout))
    folder, run = saved[layout]
    own = shutil.copytree(folder, tmp_path / "own")
    resumed = fit(*_overrides(own, layout))
    assert run.log + resumed.log == straight.log
    assert_same_tensors(resumed.tensors, straight.tensors)


def test_a_tied_embedding_is_saved_once(tmp_path: Path) -> None:
    """The first and the last stage have a copy each; one process goes on from it, and they from what that saves."""
    tied, stages = ("model.tie_word_embeddings=True", "model.vocab_size=67"), ("parallel.pipeline.size=2",)
    run = fit(2, saving(tmp_path, *tied, *stages), stop_after=2)
    assert_same_tensors(resume(1, saving(tmp_path, *tied)).tensors, run.tensors)
    shutil.rmtree(tmp_path / "ckpts")
    alone = fit(1, saving(tmp_path, *tied), stop_after=2)
    assert_same_tensors(resume(2, saving(tmp_path, *tied, *stages)).tensors, alone.tensors)
