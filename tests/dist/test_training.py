"""What a run does beside learning: the same thing twice, nothing with a bad gradient, and stop when a hook asks."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from internlm.checkpoint.logical_tensors import model_tensors
from internlm.core.parallel import place_replicated
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator
from internlm.verify.record import ShardsByName
from tests.dist.tiny import TINY, Plain
from tests.dist.whole_runs import assert_same_tensors, fit, recorded_warnings, saving, shards_of, whole_tensors
from tests.harness.pool import run_ranks


def _overrides(folder: Path, total: int, *more: str) -> list[str]:
    return [f"data.total_steps={total}", f"log_folder={folder / 'logs'}", "model.dtype=torch.float32", *more]


# -- the same thing twice


#: Steps, of which a hundred are several epochs of the readers' buffers.
TWICE = 100


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.wide), 2])
def test_twice(ranks: int, tmp_path: Path) -> None:
    """The loss log and the parameters of two runs are equal bit by bit."""
    overrides = _overrides(tmp_path, TWICE, "data.num_worker=2", "data.micro_num=1", "model.num_layers=1")
    one, other = (fit(ranks, overrides) for _ in range(2))
    assert [rank.log for rank in one.ranks] == [rank.log for rank in other.ranks]
    assert len(one.log) == TWICE
    assert_same_tensors(one.tensors, other.tensors)


# -- main parameters


@pytest.mark.parametrize(("ranks", "zero1"), [(1, 1), (2, -1), (4, 2)])
def test_bf16_parameters_are_the_main_ones_rounded(ranks: int, zero1: int, tmp_path: Path) -> None:
    overrides = _overrides(tmp_path, 8, "model.dtype=torch.bfloat16", f"parallel.zero1.size={zero1}")
    start, end = fit(ranks, overrides, stop_after=1), fit(ranks, overrides)
    main = {name.removeprefix("optimizer/main/"): x for name, x in end.tensors.items() if "/main/" in name}
    assert main.keys() == {name.removeprefix("model/") for name in end.tensors if name.startswith("model/")}
    for name, values in main.items():
        assert values.dtype == torch.float32
        assert torch.equal(end.tensors[f"model/{name}"], values.bfloat16()), name
        assert not torch.equal(values, values.bfloat16().float()), name
        assert not torch.equal(end.tensors[f"model/{name}"], start.tensors[f"model/{name}"]), name


# -- a model that draws its own values


def _drawn(rank: int, world_size: int) -> ShardsByName:
    initialize_distributed_env(TINY)
    torch.rand(rank)
    one, other = create_model("PLAIN"), create_model("PLAIN")
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    return shards_of(model_tensors(one))


def test_a_model_type_is_drawn_from_the_seed() -> None:
    assert_same_tensors(*(whole_tensors(run_ranks(ranks, _drawn)) for ranks in (1, 2)))


def _brought(rank: int, world_size: int) -> ShardsByName:
    initialize_distributed_env(TINY)
    torch.manual_seed(rank)
    model, _ = initialize_model_and_parallel_communicator(place_replicated(Plain(vocab_size=8, hidden_size=4)))
    return shards_of(model_tensors(model))


def test_a_model_made_elsewhere_becomes_the_same_on_all_ranks() -> None:
    assert len(whole_tensors(run_ranks(2, _brought))) == 7


# -- a bad gradient


class _Spoil(Hook):
    """Make one value of one rank's activations ``value`` in each of ``steps``."""

    def __init__(self, value: float, rank: int, steps: Sequence[int]) -> None:
        self.value, self.rank, self.steps = value, rank, steps
        self.spoiling = False

    def before_run(self, trainer: Trainer) -> None:
        trainer.model.norm.register_forward_hook(self._spoiled)

    def before_step(self, trainer: Trainer) -> None:
        self.spoiling = trainer.state.step in self.steps and os.environ["RANK"] == str(self.rank)

    def _spoiled(self, module: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        if self.spoiling:
            x = x.clone()
            x[:, 0] = self.value
        return x


class _Updates(Hook):
    """Note in the log folder which steps changed the parameters, on every rank."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "updates"
        self.before: list[Tensor] = []

    def before_step(self, trainer: Trainer) -> None:
        self.before = [p.detach().clone() for p in trainer.model.parameters()]

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        same = all(map(torch.equal, self.before, trainer.model.parameters()))
        assert same != report.update.updated
        with self.file.with_name(f"updates-{os.environ['RANK']}").open("a") as file:
            file.write("-" if same else "u")


@pytest.mark.parametrize(
    ("value", "ranks", "zero1", "steps", "expected"),
    [
        (math.nan, 2, -1, (2,), "uu-uuu"),
        (math.inf, 4, 2, (0, 3, 4, 5), "-uu---"),
        pytest.param(math.inf, 2, -1, (2,), "uu-uuu", marks=pytest.mark.wide),
        pytest.param(math.nan, 4, 2, (0, 3, 4, 5), "-uu---", marks=pytest.mark.wide),
    ],
)
def test_a_bad_gradient_on_one_rank(
    value: float, ranks: int, zero1: int, steps: Sequence[int], expected: str, tmp_path: Path
) -> None:
    """No rank updates, and the counter is exact."""
    hooks = [_Spoil(value, ranks - 1, steps), _Updates(tmp_path)]
    outcome = fit(ranks, _overrides(tmp_path, 6, f"parallel.zero1.size={zero1}"), hooks=hooks)
    assert [(tmp_path / f"updates-{rank}").read_text() for rank in range(ranks)] == [expected] * ranks
    assert (outcome.state["step"], outcome.state["inf_nan_skip_batches"]) == (6, len(steps))
    assert outcome.ranks[0].steps == [6 - len(steps)]
    assert all(x.isfinite().all() for x in outcome.tensors.values())


# -- a stop


def test_a_variation_from_copied_checkpoints_has_records_of_its_own(tmp_path: Path) -> None:
    fit(1, saving(tmp_path, total=2))
    shutil.copytree(tmp_path / "ckpts", tmp_path / "copy")
    fit(1, saving(tmp_path, f"ckpt.save_ckpt_folder={tmp_path / 'copy'}", total=3))
    first, second = sorted((tmp_path / "logs" / "internlm").iterdir())
    assert [path.read_text().count("tgs_all") for path in (first / "metrics.jsonl", second / "metrics.jsonl")] == [2, 1]


class _Deterministic(Hook):
    """Find deterministic kernels asked for, and ask for the usual ones at the end."""

    def before_run(self, trainer: Trainer) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic

    def after_run(self, trainer: Trainer) -> None:
        torch.use_deterministic_algorithms(False)


def test_deterministic_kernels_are_enough_for_training() -> None:
    """Torch raises an error for an operation that has none; dropout, recompute and both kinds of linears have one."""
    overrides = ["model.drop_rate=0.1", "model.checkpoint=0.5", "model_type=INTERNLM", "data.total_steps=2"]
    found = fit(1, [*overrides, "cudnn_deterministic=True"], hooks=[_Deterministic()])
    assert len(found.log) == 2
    assert found.log == fit(1, overrides).log


class _Stop(Hook):
    """Asks for a stop, as a user's hook may."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        trainer.stop_requested |= trainer.state.step == 4


def test_a_hook_that_asks_for_a_stop_loses_nothing(tmp_path: Path) -> None:
    stopped = fit(2, saving(tmp_path, every=3, total=8), hooks=[_Stop()])
    assert (stopped.state["step"], sorted(path.name for path in (tmp_path / "ckpts").glob("step-*"))) == (
        4,
        ["step-3", "step-4"],
    )


def test_a_run_that_is_past_its_end_says_so(tmp_path: Path) -> None:
    fit(1, saving(tmp_path, every=3, total=6))
    again = fit(1, saving(tmp_path, every=3, total=5))
    assert again.ranks[0].warnings == ["already at step 6, and data.total_steps is 5: nothing to train"]


def test_a_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    done, again = (fit(2, saving(tmp_path)) for _ in range(2))
    assert again.log == []
    assert again.state == done.state
    assert_same_tensors(again.tensors, done.tensors)


def _told(rank: int, world_size: int, *overrides: str) -> list[str]:
    with recorded_warnings() as warnings:
        initialize_distributed_env(TINY, overrides=overrides)
        create_model()
    return warnings


def test_keys_that_a_model_of_ones_own_must_heed_are_told() -> None:
    keys = ("model.checkpoint=True", "model.drop_rate=0.1")
    told = "model.checkpoint, model.drop_rate: ignored, unless the model 'PLAIN' implements this itself"
    assert run_ranks(2, _told, "model_type=PLAIN", *keys) == [[told], []]
    assert run_ranks(2, _told, *keys) == [[], []]
