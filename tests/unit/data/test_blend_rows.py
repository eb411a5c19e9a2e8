"""Training on a mixture of dataset types, from the config to batches."""

from __future__ import annotations

import logging
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
LENGTHS = np.random.default_rng(1).integers(2, LONGEST, sum(SIZES.values()))
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


def test_a_position_without_a_state_follows_the_sequence_from_its_beginning(folder: str) -> None:
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


def change(key: str, index: int, value: int) -> Callable[[dict[str, list[int]]], None]:
    """A change of one number of a state."""
    return lambda state: state[key].__setitem__(index, value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("blend/en"),
        lambda state: state["blend"].pop(),
        lambda state: state["blend"].clear(),
        lambda state: state["blend/en"].pop(),
        lambda state: state.update({"blend": [0] * 4, "blend/en": [0] * 4, "blend/code": [0] * 4}),
        change("blend", 1, 10**6),
        change("blend", 2, 3),  # a phase that the mixture lacks
        change("blend", 3, -1),
        change("blend", 0, 10**300),
        change("blend/en", 0, -1),
        change("blend/en", 0, 10**30),
        change("blend/en", 1, 99),
        change("blend/en", 2, 10**300),
        change("blend/en", 3, 7),  # a count of other samples
    ],
)
def test_a_position_that_does_not_fit_is_refused(folder: str, damage: Callable[[dict[str, list[int]]], object]) -> None:
    made = loader(folder, weights={"en": 1, "code": 1})
    position = made.position(5)
    state = {key: list(numbers) for key, numbers in position.state.items()}
    damage(state)
    with pytest.raises(
        DataError, match=r"^state.json(: the position of the blend does not fit 2|: 'blend/en': is dam)"
    ):
        made.resume(position._replace(state=state))


#: Mixtures that follow one another in one run: each type has its own tokens in other shares, and types come and go.
MIXTURES = (
    {"en": 1.0, "code": 1.0},
    {"en": 1.0, "code": 6.0, "math": 2.0},
    {"math": 1.0, "en": 3.0},
    {"code": 2.0, "en": 1.0},
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("steps", [3, 5])
def test_other_weights_go_on_with_the_samples_that_are_unused(one_token_each: str, layout: str, steps: int) -> None:
    """Three resumptions with other weights: epochs of a type have each of its tokens once, in the new shares."""
    counts = np.zeros(sum(SIZES.values()), int)
    position = Position()
    for number, weights in enumerate(MIXTURES):
        made, straight = (loader(one_token_each, weights=weights, **LAYOUTS[layout]) for _ in range(2))
        made.resume(position, has_changed=number > 0)
        ids = [made.read(step)[0]["input_ids"].flatten() for step in range(position.step, position.step + steps)]
        new = torch.cat(ids).bincount(minlength=len(counts) + 1)[1:].numpy()
        counts += new
        by_type = np.array([part.sum() for part in np.split(new, np.cumsum([*SIZES.values()])[:-1])])
        shares = np.array([weights.get(name, 0.0) for name in SIZES]) / sum(weights.values())
        # The sample that was begun before the change is counted with its type; the last one may be unfinished.
        assert (abs(by_type - by_type.sum() * shares) <= 3 * (32 if layout == "best_fit" else LONGEST)).all()
        # A checkpoint of the resumed run goes on as that run does, also within the first sample.
        for step in (position.step, position.step + 1):
            straight.resume(made.position(step))
            assert straight.read(step)[0]["input_ids"].flatten().tolist() == ids[step - position.step].tolist()
        position = made.position(position.step + steps)
    lengths, begin = LENGTHS if layout != "padded" else np.minimum(LENGTHS, 16), 0
    for size in SIZES.values():
        some = slice(begin, begin + size)
        # Of whole epochs, each sample has its tokens once; of the last one, some have them once more, and of the sample
        # in progress a part. The rest of a sample whose type lost its weight is left out.
        epochs = counts[some] / lengths[some]
        assert epochs.max() - epochs.min() <= 1 + 1e-9, epochs
        begin += size


@pytest.fixture(scope="module")
def one_token_each(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Samples of which each has a token of its own, of the lengths in LENGTHS."""
    root, first = tmp_path_factory.mktemp("distinct"), 0
    for name, size in SIZES.items():
        samples = [[first + i + 1] * int(LENGTHS[first + i]) for i in range(size)]
        write_bin(root / name / "a.bin", samples)
        first += size
    return str(root)


def test_the_log_says_what_each_type_goes_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="internlm")
    for token, name in enumerate(("code", "en", "math"), 1):
        write_bin(tmp_path / name / "a.bin", [[token] * 16] * 20)
    before = loader(str(tmp_path), weights={"en": 1, "code": 1}, global_batch=4)
    position = before.position(3)
    write_bin(tmp_path / "code" / "b.bin", [[1] * 16] * 4)
    after = loader(str(tmp_path), weights={"en": 1, "code": 1, "math": 2}, global_batch=4)
    after.resume(position, has_changed=True)
    line = "data.weights: the shares are counted from row 6 on; samples of each dataset type used before: "
    assert f"{line}code 0 (other samples, or another order), en 6 (0.3 epochs), math 0 (has no count)" in caplog.text
    after.resume(Position(4, 4, 8), has_changed=True)
    line = "the checkpoint counts no dataset types, so each begins with its first epoch"
    assert f"data.weights: the shares are counted from row 8 on; {line}" in caplog.text


def test_other_weights_that_need_too_many_epochs_are_refused_at_the_resume(tmp_path: Path) -> None:
    """After 50 steps of 4 samples, 25 of 100 samples of code are left for the other 50 steps: 12.5% of the tokens."""
    for token, name in enumerate(("en", "code"), 1):
        write_bin(tmp_path / name / "a.bin", [[token] * 16] * 100)
    settings = {"max_epochs": {"code": 1}, "global_batch": 4}
    position = loader(str(tmp_path), weights={"en": 5, "code": 3}, **{**settings, "total_steps": 50}).position(50)
    assert position.state["blend/code"][0] == 75
    loader(str(tmp_path), weights={"en": 7, "code": 1}, **settings).resume(position, has_changed=True)
    made = loader(str(tmp_path), weights={"en": 4, "code": 1}, **settings)
    with pytest.raises(DataError, match=r"^data.max_epochs: 1 for 'code', but the 100 steps need 1.15\. Allow more"):
        made.resume(position, has_changed=True)


def test_a_type_without_a_weight_for_some_time_goes_on(folder: str) -> None:
    position = loader(folder, weights={"en": 1, "math": 1}).position(3)
    used = position.state["blend/math"]
    without = loader(folder, weights={"en": 1})
    without.resume(position, has_changed=True)
    again = loader(folder, weights={"math": 1})
    again.resume(without.position(5), has_changed=True)
    # Where it was begun, the rest of a sample is left out.
    assert again.position(5).state["blend/math"][0] == used[0] + (used[1] > 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"weights": {"en": 1}},
            "data.weights: needs tokenized files with dataset types, got data.type = ",
        ),
        ({"weights": {"en": 0}, "train_folder": "x"}, "data.weights: all weights are 0. Give at least one"),
        (
            {"weights": {"en": 1e308, "code": 1e308}, "train_folder": "x"},
            "data.weights: the weights add up to inf. Divide",
        ),
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
