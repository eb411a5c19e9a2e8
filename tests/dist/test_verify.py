"""The equivalence oracle passes what is equal, and tells where planted faults lie."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import internlm.verify.run
from internlm.core.context import ParallelMode
from internlm.core.context.group import Group
from internlm.core.parallel.collectives import Pending, all_reduce
from internlm.core.parallel.isp import IspModel
from internlm.core.parallel.placement import ParamPlacement
from internlm.core.parallel.sharding import Sharding
from internlm.core.parallel.tensor_parallel import MtpColumn, MtpRow
from internlm.core.scheduler import executor
from internlm.core.scheduler.actions import BACKWARD, Message
from internlm.core.scheduler.channels import Channels
from internlm.core.scheduler.micro_batches import MicroBatches
from internlm.core.scheduler.schedulers import Scheduler
from internlm.solver.optimizer import ProcessGroups
from internlm.solver.optimizer.flat_buffers import FlatParamGroup
from internlm.verify.compare import Report, compare
from internlm.verify.configs import make_plan
from internlm.verify.culprit import Culprit, find_culprit
from internlm.verify.record import RankRecord
from internlm.verify.run import run_rank
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

MODULES_OF_LAYER = 9  # 2 norms, 4 linears, attention, feed-forward, block
OTHER_MODULES = 4  # embedding, norm, the head, the model


@functools.cache
def located(world_size: int, *overrides: str, fault: str = "", dtype: str = "float64") -> tuple[Report, Culprit | None]:
    """What the oracle says of :data:`TINY` with overrides, a fault planted in the ranks."""
    plan = make_plan(TINY, ("data.micro_num=2", *overrides), world_size, steps=2, dtype=dtype)
    (alone,) = run_ranks(1, _run, "", plan.reference, plan.seed, plan.steps, plan.data_size, 0)
    ranks = run_ranks(world_size, _run, fault, plan.config, plan.seed, plan.steps, 1, 0)
    report = compare(plan.config, alone, ranks)
    return report, find_culprit(report, alone, ranks)


def verify(world_size: int, *overrides: str, fault: str = "", dtype: str = "float64") -> Report:
    """The report alone."""
    return located(world_size, *overrides, fault=fault, dtype=dtype)[0]


def culprit(world_size: int, *overrides: str, fault: str) -> tuple[str, str]:
    """What is named, and what is said of it."""
    found = located(world_size, *overrides, fault=fault)[1]
    assert found is not None
    return f"{found.module}, {found.phase}", found.explanation


def _run(rank: int, world_size: int, fault: str, *args: Any) -> RankRecord:
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault](patch, rank)
        return run_rank(rank, world_size, *args)


def layout(mode: str, tensor: int = 2, weight: int = 1, zero1: int = -1) -> tuple[str, ...]:
    sizes = {"tensor": tensor, "weight": weight, "zero1": zero1}
    return (f"parallel.tensor.mode={mode}", *(f"parallel.{name}.size={size}" for name, size in sizes.items()))


def pipeline(stages: int, mode: str = "1F1B", chunks: int = 1, layers: int = 2) -> tuple[str, ...]:
    sizes = {"parallel.pipeline.size": stages, "model.num_chunks": chunks, "model.num_layers": layers}
    return (f"parallel.pipeline.mode={mode}", *(f"{key}={value}" for key, value in sizes.items()))


#: One of each kind; every layout is in :mod:`tests.dist.test_parallel` and :mod:`tests.dist.test_pipeline`.
LAYOUTS = {
    "data parallel": (2, ()),
    "msp and data": (4, layout("msp", zero1=1)),
    "isp, more tensor than kv heads": (4, (*layout("isp", 4, 2), "model.checkpoint=0.5")),
    "pipeline": (2, pipeline(2)),
    "pipeline and isp, recomputed, in a V": (
        4,
        (*pipeline(2, "ZBV", 2, 4), *layout("isp", 2, 2), "model.checkpoint=True", "data.micro_num=3"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_runs_pass(name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    report = verify(world_size, *overrides)
    assert report.failures == []
    assert report.forward.first is None
    assert report.backward.first is None
    assert located(world_size, *overrides)[1] is None
    modules = MODULES_OF_LAYER * (4 if "model.num_layers=4" in overrides else 2) + OTHER_MODULES
    assert len(report.forward.compared) == len(report.forward.differences) == modules
    assert len(report.backward.compared) == len(report.backward.differences) == modules - 2  # all but the two losses
    assert report.shared or name == "pipeline"  # whose stages hold nothing in common
    assert report.traffic == []
    assert min(row.reference or 0 for row in report.norms) > TINY["hybrid_zero_optimizer"]["clip_grad_norm"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types(dtype: str) -> None:
    mode = layout("msp") if dtype == "float32" else ()
    assert verify(2, *mode, dtype=dtype).failures == []


def test_a_model_without_formula() -> None:
    report = verify(2, "model_type=PLAIN")
    assert report.passed
    assert report.traffic is None
    assert report.forward.compared


# -- planted faults
Fault = Callable[[pytest.MonkeyPatch, int], None]
FAULTS: dict[str, Fault] = {}


def planted(fault: Fault) -> Fault:
    FAULTS[fault.__name__] = fault
    return fault


@planted
def row_keeps_its_part(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(MtpRow, "reduce_output", lambda self, y: y)


def test_row_keeps_its_part() -> None:
    report = verify(2, *layout("mtp"), fault="row_keeps_its_part")
    assert report.forward.first == "layers.0.attention.wo"
    assert report.forward.last_equal == "layers.0.attention.wqkv"
    assert not report.losses[0].passed
    named, said = culprit(2, *layout("mtp"), fault="row_keeps_its_part")
    assert named == "layers.0.attention.wo, forward"
    assert "an all-reduce over tensor is missing" in said


@planted
def column_keeps_its_part(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(MtpColumn, "reduce_grad_input", lambda self, dx: Pending(dx))


def test_column_keeps_its_part() -> None:
    report = verify(2, *layout("mtp"), fault="column_keeps_its_part")
    assert report.forward.first is None
    assert report.backward.first == "layers.1.ffn_norm"
    assert report.backward.last_equal == "layers.1.feed_forward.w13"
    assert "gradient of layers.1.ffn_norm.weight" in {row.name for row in report.gradients if not row.passed}
    named, said = culprit(2, *layout("mtp"), fault="column_keeps_its_part")
    assert named == "layers.1.feed_forward.w13, backward"
    assert "an all-reduce over tensor is missing" in said


@planted
def norms_stay_partial(patch: pytest.MonkeyPatch, rank: int) -> None:
    def replicated(self: Sharding, shape: tuple[int, ...], init: Any) -> ParamPlacement:
        return ParamPlacement(shape, init, is_matrix=False)

    patch.setattr(Sharding, "replicated", replicated)


def test_norms_stay_partial() -> None:
    report = verify(2, *layout("msp"), fault="norms_stay_partial")
    assert report.forward.first is None
    assert report.backward.first is None
    norms = {f"layers.{i}.{kind}_norm.weight" for i in range(2) for kind in ("attention", "ffn")} | {"norm.weight"}
    assert {row.name for row in report.gradients if not row.passed} == {f"gradient of {name}" for name in norms}
    assert {each.name for each in report.disagreements} >= {f"gradient of {name}" for name in norms}
    assert {error.collective for error in report.traffic or ()} == {"all-reduce"}
    named, said = culprit(2, *layout("msp"), fault="norms_stay_partial")
    assert named == "norm, gradients"
    assert "not summed over tensor" in said


@planted
def one_rank_is_perturbed(patch: pytest.MonkeyPatch, rank: int) -> None:
    make = internlm.verify.run.initialize_optimizer

    def perturbed(model: nn.Module, communicator: Any) -> Any:
        made = make(model, communicator)
        if rank == 1:
            model.get_parameter("layers.1.ffn_norm.weight").data[3] += 1e-3
        return made

    patch.setattr(internlm.verify.run, "initialize_optimizer", perturbed)


def test_one_rank_is_perturbed() -> None:
    report = verify(2, *layout("mtp", zero1=1), fault="one_rank_is_perturbed")
    assert report.forward.first == "layers.1.ffn_norm"
    wrong = report.disagreements[
        [each.name for each in report.disagreements].index("parameter layers.1.ffn_norm.weight")
    ]
    assert wrong.rank == 1
    assert wrong.largest >= 1e-3 / 2
    named, said = culprit(2, *layout("mtp", zero1=1), fault="one_rank_is_perturbed")
    assert named == "layers.1.ffn_norm, initial values"
    assert "rank 1 differs" in said


@planted
def loss_counts_own_tokens(patch: pytest.MonkeyPatch, rank: int) -> None:
    def own(self: Scheduler, micro_batches: MicroBatches) -> tuple[Tensor, Tensor]:
        counts = micro_batches.valid_tokens().double()
        return torch.ones_like(counts), counts.sum()

    patch.setattr(Scheduler, "_token_weights", own)


def test_loss_counts_own_tokens() -> None:
    report = verify(2, fault="loss_counts_own_tokens")
    assert report.losses[0].passed  # it is the gradients that are divided
    assert report.forward.first is None
    assert report.backward.first == "norm"
    assert not any(row.passed for row in report.gradients)
    assert all(row.difference == pytest.approx(1, rel=0.1) for row in report.gradients)
    named, said = culprit(2, fault="loss_counts_own_tokens")
    assert named == "the loss, loss"
    assert "multiplied by 1.9" in said


@planted
def norm_counts_twice(patch: pytest.MonkeyPatch, rank: int) -> None:
    make = FlatParamGroup.__init__

    def split(self: FlatParamGroup, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.key = replace(self.key, split_over=ParallelMode.TENSOR)

    patch.setattr(FlatParamGroup, "__init__", split)


def test_norm_counts_twice() -> None:
    report = verify(2, *layout("mtp"), fault="norm_counts_twice")
    assert not report.norms[0].passed
    assert all(row.passed for row in report.gradients)  # clipping by the wrong norm comes after them
    assert not all(row.passed for row in report.parameters)
    named, said = culprit(2, *layout("mtp"), fault="norm_counts_twice")
    assert (named, said) == ("the gradient norm, norm", "every gradient that several ranks hold counts 2 times")


@planted
def positions_start_anew(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(IspModel, "whole_positions", lambda self, positions: positions.repeat(self.group.size))


def test_positions_start_anew() -> None:
    report = verify(2, *layout("isp", 2, 2), "data.micro_bsz=1", fault="positions_start_anew")
    assert report.forward.first == "layers.0.attention.wo"
    assert "all-gather over tensor" in str(report.traffic[0] if report.traffic else "")
    named, _ = culprit(2, *layout("isp", 2, 2), "data.micro_bsz=1", fault="positions_start_anew")
    assert named == "layers.0.attention, forward"


@planted
def last_micro_batch_is_dropped(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(MicroBatches, "__len__", lambda self: len(self._labels) - 1)


def test_last_micro_batch_is_dropped() -> None:
    report = verify(2, fault="last_micro_batch_is_dropped")
    assert not report.losses[0].passed
    assert report.forward.first is None  # of the first micro-batch
    assert culprit(2, fault="last_micro_batch_is_dropped")[0] == "the schedule, forward"


@planted
def speaks_too_often(patch: pytest.MonkeyPatch, rank: int) -> None:
    def twice(self: MtpRow, y: Tensor) -> Tensor:
        all_reduce(y.clone(), self.group)
        return all_reduce(y, self.group)

    patch.setattr(MtpRow, "reduce_output", twice)


def test_speaks_too_often() -> None:
    report = verify(2, *layout("mtp"), fault="speaks_too_often")
    assert all(row.passed for row in report.rows)
    assert report.failures[0].startswith("traffic: all-reduce over tensor, step 1, rank 0: ")
    assert not report.passed
    named, said = culprit(2, *layout("mtp"), fault="speaks_too_often")
    assert named == "layers.0.attention.wo, communication"
    assert "it sends what is sent twice" in said


# -- in a pipeline
@planted
def last_stage_keeps_its_part(patch: pytest.MonkeyPatch, rank: int) -> None:
    if rank >= 2:
        row_keeps_its_part(patch, rank)


@pytest.mark.parametrize("mode", ["1F1B", "ZBH1"])
def test_last_stage_keeps_its_part(mode: str) -> None:
    report = verify(4, *pipeline(2, mode, layers=4), *layout("mtp"), fault="last_stage_keeps_its_part")
    assert report.forward.first == "layers.2.attention.wo"
    assert report.forward.last_equal == "layers.2.attention.wqkv"
    assert not report.losses[0].passed
    named, _ = culprit(4, *pipeline(2, mode, layers=4), *layout("mtp"), fault="last_stage_keeps_its_part")
    assert named == "layers.2.attention.wo, forward"


@planted
def gradients_are_halved_on_their_way(patch: pytest.MonkeyPatch, rank: int) -> None:
    send = Channels.send

    def halved(self: Channels, target: int, message: Message, tensor: Tensor, announced: bool) -> None:
        to_the_middle = message.type == BACKWARD and message.virtual == 1
        send(self, target, message, tensor / 2 if to_the_middle else tensor, announced)

    patch.setattr(Channels, "send", halved)


def test_gradients_are_halved_on_their_way() -> None:
    report = verify(2, *pipeline(2, "1F1B", 2, 4), fault="gradients_are_halved_on_their_way")
    assert report.forward.first is None
    assert report.backward.first == "layers.1"
    assert report.backward.last_equal in ("layers.2", "layers.2.attention_norm")
    wrong = {row.name for row in report.gradients if not row.passed}
    assert "gradient of layers.1.attention.wo.weight" in wrong
    assert "gradient of layers.2.attention.wo.weight" not in wrong
    named, said = culprit(2, *pipeline(2, "1F1B", 2, 4), fault="gradients_are_halved_on_their_way")
    assert (named, said) == ("the pipeline between layers.1 and layers.2, backward", "it is multiplied by 0.5")


@planted
def weights_are_put_off_for_ever(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(executor, "weight_gradients", lambda kept: None)


def test_weights_are_put_off_for_ever() -> None:
    report = verify(2, *pipeline(2, "ZBH1"), fault="weights_are_put_off_for_ever")
    assert (report.forward.first, report.backward.first) == (None, None)
    wrong = {row.name for row in report.gradients if not row.passed}
    assert wrong >= {f"gradient of layers.{i}.feed_forward.w2.weight" for i in range(2)}
    assert "gradient of layers.0.ffn_norm.weight" not in wrong
    named, said = culprit(2, *pipeline(2, "ZBH1"), fault="weights_are_put_off_for_ever")
    assert (named, said) == ("layers.1.feed_forward.w2, gradients", "it is zero on rank 1")


@planted
def ends_forget_one_another(patch: pytest.MonkeyPatch, rank: int) -> None:
    of_partial = ProcessGroups.of_partial

    def forgetful(self: ProcessGroups, mode: ParallelMode) -> Group:
        return Group(mode) if mode is ParallelMode.PIPELINE else of_partial(self, mode)

    patch.setattr(ProcessGroups, "of_partial", forgetful)


def test_ends_forget_one_another() -> None:
    report = verify(2, *pipeline(2), "model.tie_word_embeddings=True", fault="ends_forget_one_another")
    assert "gradient of embedding.weight" in {each.name for each in report.disagreements}
    assert "gradient of embedding.weight" in {row.name for row in report.gradients if not row.passed}
    tied = (*pipeline(2), "model.tie_word_embeddings=True")
    named, said = culprit(2, *tied, fault="ends_forget_one_another")
    assert named == "embedding, gradients"
    assert "not summed over pipeline" in said
