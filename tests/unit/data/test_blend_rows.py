"""Training on a mixture of dataset types, from the config to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internlm.config import load_config
from internlm.config.schema import DataConfig
from internlm.config.schema.root import WeightChange
from internlm.core.parallel.sharding import GroupPosition
from internlm.data import blend
from internlm.data.batch_plan import Position
from internlm.data.build import build_train_loader
from internlm.data.loader import TrainLoader
from internlm.utils.errors import DataError
from tests.unit.config.samples import config_of, problems_of
from tests.unit.data.files import write_bin

SIZES = {"en": 40, "code": 9, "math": 5}
LONGEST = 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "windows": {"pack_sample_into_one": True},
    "best_fit": {"pack": "best_fit"},
    "padded": {"use_packed_dataset": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three types; a sample of type t repeats a token of t's own."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for number, (name, size) in enumerate(SIZES.items()):
        samples = [[10 * number + 1 + i % 9] * int(random.integers(2, LONGEST)) for i in range(size)]
        write_bin(root / name / "a.bin", samples)
    return str(root)


@pytest.fixture(autouse=True)
def short_blocks() -> Iterator[None]:
    """Blocks of few samples, as the types have few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "BLOCK", 64)
        yield


def loader(folder: str, rank: int = 0, size: int = 1, **settings: Any) -> TrainLoader:
    data = {"seq_len": 16, "micro_bsz": 2, "global_batch": 8, "total_steps": 100, "num_worker": 0, **settings}
    config = DataConfig(train_folder=folder, **data)
    return build_train_loader(config, 100, seed=3, replica=GroupPosition(rank, size))[0]


def changes(*rows: tuple[int, dict[str, float]]) -> dict[str, Any]:
    """A mixture that changes: (step, weights)."""
    return {"weights": rows[0][1], "weight_changes": tuple(WeightChange(step=s, weights=w) for s, w in rows[1:])}


def tokens_by_type(made: TrainLoader, steps: range) -> np.ndarray:
    """Tokens of each type of SIZES in some steps."""
    counts = np.zeros(3, int)
    for step in steps:
        ids = made.read(step)[0]["input_ids"].flatten().numpy()
        counts += np.bincount((ids[ids > 0] - 1) // 10, minlength=3)
    return counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_have_their_shares(folder: str, layout: str) -> None:
    made = loader(folder, weights={"en": 2, "code": 5, "math": 1}, **LAYOUTS[layout])
    counts = tokens_by_type(made, range(50))
    expected = counts.sum() * np.array([2, 5, 1]) / 8
    # In the best-fit layout a row counts as a sample; samples in part of a row at the end add another.
    assert (abs(counts - expected) <= 2 * (32 if layout == "best_fit" else LONGEST)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_runs_go_on_on_any_number_of_ranks(folder: str, layout: str) -> None:
    settings = {
        **changes((0, {"en": 1, "code": 1}), (6, {"math": 1}), (11, {"en": 1, "math": 3})),
        **LAYOUTS[layout],
    }
    straight = loader(folder, **settings)
    expected = [straight.read(step)[0]["input_ids"].flatten(1) for step in range(16)]
    position = Position()
    for begin, end, size in ((0, 4, 1), (4, 6, 3), (6, 12, 4), (12, 16, 2)):
        ranks = [loader(folder, rank, size, **settings) for rank in range(size)]
        for rank in ranks:
            rank.resume(position)
        for step in range(begin, end):
            rows = [row for rank in ranks for row in rank.read(step)[0]["input_ids"].flatten(1)]
            assert [row.tolist() for row in rows[:4]] == expected[step].tolist()
        assert len({str(rank.position(end)) for rank in ranks}) == 1
        position = ranks[-1].position(end)


def test_a_mixture_changes_at_its_step(folder: str) -> None:
    made = loader(folder, **changes((0, {"en": 1}), (5, {"code": 1}), (8, {"math": 1})))
    en, code, math = (tokens_by_type(made, steps) for steps in (range(5), range(5, 8), range(8, 12)))
    # A sample that is cut at the end of a step continues in the next.
    assert (en[1:].sum(), code[2], math[0]) == (0, 0, 0)
    assert max(code[0], math[1]) <= LONGEST


@pytest.mark.parametrize("step", range(1, 6))
def test_a_sample_longer_than_a_step_ends_after_a_change(tmp_path: Path, step: int) -> None:
    """The weights change twice within the first sample, of 100 tokens in steps of 32."""
    for token, name, length in ((1, "en", 100), (2, "code", 7), (3, "math", 5)):
        write_bin(tmp_path / name / "a.bin", [[token] * length] * 9)
    mixture = changes((0, {"en": 1}), (1, {"math": 1}), (2, {"code": 1}), (4, {"math": 2, "code": 1}))
    straight, resumed = (loader(str(tmp_path), **mixture, global_batch=2) for _ in range(2))
    expected = [straight.read(number)[0]["input_ids"].tolist() for number in range(8)]
    resumed.resume(straight.position(step))
    assert [resumed.read(number)[0]["input_ids"].tolist() for number in range(step, 8)] == expected[step:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_as_many_epochs_as_allowed_ends_with_a_checkpoint(tmp_path: Path, layout: str) -> None:
    """In 12 steps of 64 tokens each; in the padded layout, of 4 samples that have half as many tokens."""
    length = 8 if layout == "padded" else 16
    for token, name in enumerate(("en", "code"), 1):
        write_bin(tmp_path / name / "a.bin", [[token] * length] * 24)
    settings = {**LAYOUTS[layout], "weights": {"en": 3, "code": 1}, "max_epochs": {"en": 1.5, "code": 0.5}}
    made = loader(str(tmp_path), **settings, global_batch=4, total_steps=12)
    ids = torch.cat([made.read(step)[0]["input_ids"].flatten() for step in range(12)])
    assert ids.bincount().tolist()[1:] == [36 * length, 12 * length]
    assert made.position(12).row == 24
    with pytest.raises(DataError, match=r"^data.max_epochs: 1.5 for 'en', but the 13 steps need 1.625\. "):
        loader(str(tmp_path), **settings, global_batch=4, total_steps=13)


def test_the_last_checkpoint_needs_no_sample_after_it(tmp_path: Path) -> None:
    write_bin(tmp_path / "en" / "a.bin", [[1] * 16] * 100)
    made = loader(str(tmp_path), weights={"en": 1}, max_epochs={"en": 1}, global_batch=2, total_steps=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "TOLERANCE", -0.01)  # the samples are used up at the very end
        assert [made.read(step) for step in range(50)]
        assert made.position(50).state["blend"][:2] == [100, 1600]


def test_a_run_whose_data_have_changed_follows_the_sequence_from_its_beginning(folder: str) -> None:
    made = loader(folder, weights={"en": 1, "code": 1})
    again = loader(folder, weights={"en": 1, "code": 1})
    again.resume(made.position(5)._replace(state={}))
    assert again.read(5)[0]["input_ids"].tolist() == made.read(5)[0]["input_ids"].tolist()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"weights": {"de": 1}},
            "data.weights: 'de' is no dataset type of data.train_folder, only code, en",
        ),
        ({"weights": {"en": 1}, "max_epochs": {"en": 0.5}}, "data.max_epochs: 0.5 for 'en', but the 100 steps need "),
        (
            {"weights": {"en": 1}, "max_epochs": {"jp": 2}},
            "data.weights: 'jp' is no dataset type of data.train_folder, only",
        ),
    ],
)
def test_wrong_mixtures(folder: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        loader(folder, **settings)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "change",
    [
        lambda numbers: [],
        lambda numbers: numbers[:-1],
        lambda numbers: [0] * 8,  # the position of another row
        lambda numbers: [numbers[0], 10**6, *numbers[2:]],
        lambda numbers: [*numbers[:2], 3, *numbers[3:]],  # a phase that the mixture lacks
        lambda numbers: [*numbers[:2], -1, *numbers[3:]],
        lambda numbers: [*numbers[:4], -1, numbers[5] + numbers[4] + 1, *numbers[6:]],
        lambda numbers: [*numbers[:4], 10**30, *numbers[5:]],
        lambda numbers: [*numbers[:6], *[10**300] * 2],
    ],
)
def test_a_position_that_does_not_fit_is_refused(folder: str, change: Callable[[list[int]], list[int]]) -> None:
    made = loader(folder, weights={"en": 1, "code": 1})
    numbers = change(made.position(5).state["blend"])
    with pytest.raises(DataError, match=r"^state.json: the position of the blend does not fit 2 dataset types and row"):
        made.resume(Position(5, 5, 20, {"blend": numbers}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"weights": {"en": 1}},
            "data.weights: needs tokenized files with dataset types, got data.type = ",
        ),
        ({"weights": {"en": 0}, "train_folder": "x"}, "data.weights: all weights are 0. Give at least one"),
        ({"weights": {"en": -1}, "train_folder": "x"}, "data.weights: -1 is out of range"),
        ({"weights": ["en"], "train_folder": "x"}, "data.weights: ['en'] is of type list"),
        (
            {"weights": [("en", 1), ("en", 2)], "train_folder": "x"},
            "data.weights: [('en', 1), ('en', 2)] is of type list",
        ),
        (
            {
                "weights": [(0, {"en": 1}), (5, {"en": 2})],
                "train_folder": "x",
                "weight_changes": [{"step": 9, "weights": {"en": 1}}],
            },
            "data.weights: [(0, {'en': 1}), (5, {'en': 2})] is of type list",
        ),
        ({"weights": [(1, {"en": 1})], "train_folder": "x"}, "data.weights: [(1, {'en': 1})] is of type list"),
        (
            {"weights": {"en": 1}, "train_folder": "x", "weight_changes": [{"stp": 5, "weights": {"en": 1}}]},
            "data.weight_changes.stp: unknown key. Did you mean 'step'?",
        ),
        (
            {"weights": {"en": 1}, "train_folder": "x", "weight_changes": [{"step": 5, "weights": 7}]},
            "data.weight_changes.weights: 7 is an integer. Set it to",
        ),
        ({"max_epochs": {"en": 1}}, "data.max_epochs: needs data.weights, which is empty. Give the weights"),
        (
            {"weights": [(0, {"en": 1}), (5, {"en": 1}), (5, {"en": 2})], "train_folder": "x"},
            "data.weight_changes: the steps [5, 5] are not ascending. Sort the changes by step",
        ),
        ({"pack": "best_fit", "pack_sample_into_one": True}, "data.pack: 'best_fit' does not go with data.pack_sample"),
    ],
)
def test_wrong_configs(settings: dict[str, Any], said: str) -> None:
    problems = problems_of({f"data.{key}": value for key, value in settings.items()})
    assert any(problem.startswith(said) for problem in problems), problems


@pytest.mark.parametrize(
    ("weights", "split"),
    [
        ([("en", 0.7, 2), ["code", 0.3]], ({"en": 0.7, "code": 0.3}, {"en": 2.0}, ())),
        ([(0, {"en": 1}), (5, {"code": 1})], ({"en": 1.0}, {}, ((5, {"code": 1.0}),))),
    ],
)
def test_spellings_of_weights(weights: list[Any], split: tuple[Any, ...]) -> None:
    data = load_config(config_of({"data.weights": weights, "data.train_folder": "x"})).data
    found = tuple((change.step, change.weights) for change in data.weight_changes)
    assert (data.weights, data.max_epochs, found) == split
