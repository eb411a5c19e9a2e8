"""Saving and loading checkpoints in the layout that wrote them and in others, wholly and in part."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.dist.whole_runs import Outcome, assert_goes_on, assert_same_tensors, fit, resume, saving

# -- another layout


#: ((ranks, parallel.zero1.size) of the writer, of the reader, model.dtype)
LAYOUTS = [
    ((2, -1), (1, 1), "torch.float32"),
    ((1, 1), (4, 2), "torch.bfloat16"),
    ((2, 1), (2, -1), "torch.float32"),
    ((4, -1), (2, 1), "torch.bfloat16"),
    ((4, 2), (4, -1), "torch.float32"),
]
MORE_LAYOUTS = [
    ((2, -1), (1, 1), "torch.bfloat16"),
    ((2, -1), (4, -1), "torch.float32"),
    ((1, 1), (4, 2), "torch.float32"),
    ((4, 2), (4, -1), "torch.bfloat16"),
]


@pytest.mark.parametrize(
    ("writer", "reader", "dtype"), [*LAYOUTS, *(pytest.param(*row, marks=pytest.mark.wide) for row in MORE_LAYOUTS)]
)
def test_another_layout(writer: tuple[int, int], reader: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    (ranks, zero1), (other_ranks, other_zero1) = writer, reader
    common = [f"model.dtype={dtype}", "adam.decay_norm_and_bias=False"]  # shards of the small group may be mere padding
    saved = fit(ranks, saving(tmp_path, f"parallel.zero1.size={zero1}", *common), 2)
    loaded = resume(other_ranks, saving(tmp_path, f"parallel.zero1.size={other_zero1}", *common))
    assert loaded.message.endswith("step-2 at step 2")
    assert_goes_on(loaded, saved)


def test_a_number_of_ranks_that_divides_nothing(tmp_path: Path) -> None:
    saved = fit(2, saving(tmp_path, "data.micro_num=3"), 2)
    assert_goes_on(resume(3, saving(tmp_path, "data.micro_num=2")), saved)


def test_four_then_two_then_one_is_one(tmp_path: Path) -> None:
    """With dropout, whose masks depend neither on the layout nor on the step from which a run continues."""
    dropout = "model.drop_rate=0.2"
    straight = fit(1, saving(tmp_path / "straight", dropout))
    parts = [fit(ranks, saving(tmp_path / "parts", dropout), stop) for ranks, stop in ((4, 2), (2, 4), (1, None))]
    log = [entry[:3] for part in parts for entry in part.log]
    for (step, loss, norm), (wanted_step, wanted_loss, wanted_norm, *_) in zip(log, straight.log, strict=True):
        assert step == wanted_step
        assert loss == pytest.approx(wanted_loss, rel=1e-12)
        assert norm == pytest.approx(wanted_norm, rel=1e-10)


# -- a part of a checkpoint


def _loading(folder: Path, content: Sequence[str], *more: str) -> list[str]:
    """Overrides of a new run that starts from the checkpoint in ``folder``."""
    path = f"ckpt.load_ckpt_info.path=local:{folder / 'ckpts' / 'step-2'}"
    return saving(folder / "new", path, f"ckpt.load_ckpt_info.content={tuple(content)}", *more)


def _part(outcome: Outcome, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in outcome.tensors.items() if name.startswith(prefix)}


@pytest.fixture
def bf16(tmp_path: Path) -> tuple[Path, Outcome]:
    """A folder with a checkpoint of step 2, and the run that saved it."""
    return tmp_path, fit(2, saving(tmp_path, "model.dtype=torch.bfloat16"), 2)


def test_the_model_alone(bf16: tuple[Path, Outcome]) -> None:
    folder, saved = bf16
    loaded = resume(2, _loading(folder, ["model"], "model.dtype=torch.bfloat16"))
    fresh = resume(2, saving(folder / "fresh", "model.dtype=torch.bfloat16"))
    assert loaded.message.startswith("nothing to resume; loaded model from")
    assert_same_tensors(_part(loaded, "model/"), _part(saved, "model/"))
    widened = {name: x.float() for name, x in _part(saved, "model/").items()}
    assert_same_tensors(_part(loaded, "optimizer/main/"), widened)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not any(x.any() for x in _part(loaded, f"optimizer/{moment}/").values())
    assert (loaded.state, loaded.ranks[0].steps) == (fresh.state, [0])
    assert all(map(torch.equal, loaded.samples, fresh.samples))


def test_the_model_alone_into_another_type(bf16: tuple[Path, Outcome]) -> None:
    folder, saved = bf16
    loaded = resume(1, _loading(folder, ["model"], "model.dtype=torch.float32"))
    assert_same_tensors(_part(loaded, "model/"), {name: x.float() for name, x in _part(saved, "model/").items()})


#: content: (steps done, updates that Adam counts)
PARTS = [
    (("model", "optimizer"), 0, 2),
    (("model", "scheduler"), 2, 0),
    (("model", "sampler"), 2, 0),
    (("optimizer",), 0, 2),
    (("all",), 2, 2),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder with a checkpoint of step 2, and the run that saved it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(2, saving(folder), 2)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that has nothing to resume."""
    return resume(2, saving(tmp_path_factory.mktemp("fresh")))


@pytest.mark.parametrize(("content", "steps", "updates"), PARTS)
def test_parts(
    content: tuple[str, ...], steps: int, updates: int, whole: tuple[Path, Outcome], fresh: Outcome, tmp_path: Path
) -> None:
    folder, saved = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    loaded = resume(2, _loading(tmp_path, content))
    assert (loaded.state["step"], loaded.ranks[0].steps) == (steps, [updates])
    moments = _part(loaded, "optimizer/exp_avg/")
    if updates:
        assert_same_tensors(moments, _part(saved, "optimizer/exp_avg/"))
    else:
        assert not any(x.any() for x in moments.values())
    assert all(map(torch.equal, loaded.samples, (saved if steps else fresh).samples))


def test_a_checkpoint_of_the_run_comes_before_load_ckpt_info(tmp_path: Path) -> None:
    fit(1, saving(tmp_path), 2)
    fit(1, saving(tmp_path / "new"), 2)
    assert resume(1, _loading(tmp_path, ["model"])).message.startswith("resumed from")
    assert resume(1, _loading(tmp_path, ["model"], "ckpt.auto_resume=False")).message.startswith("nothing to resume;")


def test_a_checkpoint_is_loaded_by_any_path_to_it(whole: tuple[Path, Outcome], tmp_path: Path) -> None:
    """With a slash at its end, through a link, and under a name of the user's own; not as another step."""
    folder, saved = whole
    original, root = folder / "ckpts" / "step-2", tmp_path / "ckpts"
    for name in ("good", "step-7"):
        shutil.copytree(original, root / name)
    (root / "latest").symlink_to(original)

    def load(path: str) -> Outcome:
        source = [f"ckpt.load_ckpt_info.path={path}", "ckpt.load_ckpt_info.content=('all',)"]
        return resume(1, saving(tmp_path / "new", *source))

    for path in (f"{original}/", f"local:{root}/latest", f"{root}/good"):
        loaded = load(path)
        assert loaded.message == f"nothing to resume; loaded all from {path}"
        assert_goes_on(loaded, saved)
    assert "is the manifest of step-2, not of step-7" in load(f"{root}/step-7").message
