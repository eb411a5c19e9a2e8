"""Parameters and gradients shared by the zero group change nothing: a run is that of one process, what was sent is that
of the formula, and checkpoints are the same as without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from internlm.checkpoint.logical_tensors import model_tensors
from internlm.core.context import global_context as gpc
from internlm.core.parallel import place_replicated
from internlm.core.parallel.fully_sharded import is_fully_sharded, local_shard
from internlm.core.parallel.ledger import LEDGER, Traffic
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.costs import expected_traffic
from internlm.data import build_train_loader_with_data_type
from internlm.data.loader import Batch
from internlm.eval import generate
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.profiler.reports import held_between_steps
from internlm.train import build_inventory, initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.utils.errors import ConfigError, UserError
from internlm.verify.compare import Report
from internlm.verify.record import ShardsByName
from tests.dist.oracle import verify
from tests.dist.tiny import TINY
from tests.dist.whole_runs import Outcome, assert_same_tensors, fit, resume, saving, shards_of, whole_tensors
from tests.harness.pool import run_ranks

STEPS = 3
FSDP = "parallel.zero1.fsdp=True"
BF16 = "model.dtype=torch.bfloat16"
MSP, FSP = (("parallel.tensor.size=2", f"parallel.tensor.mode={mode}") for mode in ("msp", "fsp"))
BIASES = ("model_type=INTERNLM", "model.norm_type=layernorm")

#: Ranks, overrides, type.
ROWS: dict[str, tuple[int, tuple[str, ...], str]] = {
    "two ranks": (2, (), "float64"),
    "four ranks, uneven rows": (4, ("model.vocab_size=67", "model.num_layers=3", *BIASES), "float64"),
    "replicas": (4, ("parallel.zero1.size=2", "optimizer.type=Lion", "adam.lr=1e-4"), "float64"),
    "mtp": (4, ("parallel.tensor.size=2", "parallel.zero1.size=2", "model.checkpoint=selective"), "float64"),
    "msp, recomputed, tied": (4, (*MSP, *BIASES, "model.checkpoint=True", "model.tie_word_embeddings=True"), "float64"),
    "fsp": (4, (*FSP, "model.checkpoint=0.5", "model.embed_split_hidden=False", "model.cpu_offloading=1"), "float64"),
    "unpacked": (2, ("data.use_packed_dataset=False", "hybrid_zero_optimizer.overlap_sync_param=True"), "float64"),
    "a user's own model": (2, ("model_type=PLAIN",), "float64"),
    "bfloat16": (4, ("parallel.zero1.size=2", "model.tie_word_embeddings=True"), "bfloat16"),
    "float16": (2, ("model.checkpoint=True", "hybrid_zero_optimizer.overlap_sync_grad=True"), "float16"),
}


def report_of(ranks: int, case: tuple[str, ...], dtype: str) -> Report:
    report, _ = verify(ranks, (FSDP, *case), steps=STEPS, dtype=dtype)
    return report


@pytest.mark.parametrize("row", ROWS)
def test_every_row(row: str) -> None:
    assert report_of(*ROWS[row]).failures == []


NARROW_GRADS = "hybrid_zero_optimizer.fp32_grad_accum=False"


@pytest.mark.parametrize(
    "case",
    [(NARROW_GRADS,), ("reduce_comm_dtype=torch.bfloat16",), (NARROW_GRADS, "reduce_comm_dtype=torch.float32")],
    ids=str,
)
def test_gradients_in_half_precision(case: tuple[str, ...]) -> None:
    """Traffic equals the formula, and gradients those of one process but for their rounding."""
    report = report_of(2, case, "bfloat16")
    assert (report.traffic, report.disagreements, report.holes) == ([], [], [])
    assert 1e-5 < max(row.difference for row in report.gradients) < 2e-2
    assert max(row.difference for row in report.losses) < 1e-3


def _with_frozen(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[ShardsByName, list[float]]:
    initialize_distributed_env(TINY, overrides=overrides)
    model = create_model()
    model.norm.requires_grad_(False)
    model.layers["0"].attention.requires_grad_(False)
    trainer, batches = _trainer(*initialize_model_and_parallel_communicator(model))
    losses = [trainer.train_step(batches).result.loss for _ in range(STEPS)]
    return shards_of(model_tensors(model)), losses


def test_dropout_and_frozen_parameters() -> None:
    """Equal to flat buffers, which other tests compare with one process."""
    overrides = ("model.drop_rate=0.2", "model.checkpoint=0.5", "model.qkv_bias=True")
    shared, flat = (run_ranks(2, _with_frozen, (*overrides, *more)) for more in ((FSDP,), ()))
    tensors = whole_tensors(shards for shards, _ in shared)
    for name, tensor in whole_tensors(shards for shards, _ in flat).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-9, atol=1e-12)
    assert shared[0][1] == pytest.approx(flat[0][1], rel=1e-12)


# -- what overflows


@dataclass
class _Poison(Hook):
    """Makes the first gradient that one rank has of a group infinite in some steps."""

    rank: int
    steps: tuple[int, ...]

    def before_step(self, trainer: Trainer) -> None:
        optimizer = trainer.optimizer
        begin = optimizer.begin_step

        def poisoned(micro_batches: int | None = None) -> None:
            begin(micro_batches)
            if torch.distributed.get_rank() == self.rank and trainer.state.step in self.steps:
                optimizer.groups[0].grads[0] = math.inf

        optimizer.begin_step = poisoned  # type: ignore[method-assign]

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        vars(trainer.optimizer).pop("begin_step")


def test_a_skipped_step_changes_nothing() -> None:
    overrides = [FSDP, BF16, "data.total_steps=6", "parallel.zero1.size=2"]
    clean = fit(4, overrides, stop_after=2)
    bad = fit(4, overrides, stop_after=3, hooks=[_Poison(1, (2,))])
    assert_same_tensors(bad.tensors, clean.tensors)
    assert bad.ranks[0].steps == clean.ranks[0].steps
    assert (bad.state["step"], bad.state["inf_nan_skip_batches"]) == (3, 1)


def test_a_streak_ends_the_run() -> None:
    overrides = [FSDP, "data.total_steps=9", "hybrid_zero_optimizer.max_skipped_steps=2"]
    run = fit(2, overrides, hooks=[_Poison(1, (1, 3, 4))])
    where = "(first in embedding.weight on rank 1)"
    assert run.message.startswith(
        f"step 4: 2 steps in a row were skipped, since the loss or gradients were inf or NaN {where}"
    )


# -- checkpoints

#: Ranks and overrides; the vocabulary is one that no size divides.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "shared by two": (2, (FSDP,)),
    "shared by two of four": (4, (FSDP, *MSP)),
    "flat": (2, ()),
}


@pytest.mark.wide  # test_checkpoint_layouts.py and test_resume.py have rows of it
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_loads_what_another_saved(dtype: str, tmp_path: Path) -> None:
    """Bit by bit; and a run that goes on is the run that was not cut."""
    common = (f"model.dtype=torch.{dtype}", "model.vocab_size=67", "model.tie_word_embeddings=True")

    def overrides(folder: str, layout: str) -> tuple[int, list[str]]:
        ranks, own = LAYOUTS[layout]
        return ranks, saving(tmp_path / folder, *common, *own, total=4)

    for writer in LAYOUTS:
        saved = fit(*overrides(writer, writer), stop_after=2)
        for reader in LAYOUTS:
            _assert_same_state(resume(*overrides(writer, reader)), saved)
    straight = fit(*overrides("straight", "shared by two"))
    rest = fit(*overrides("shared by two", "shared by two"))
    assert rest.log == straight.log[2:]
    assert_same_tensors(rest.tensors, straight.tensors)


def _assert_same_state(loaded: Outcome, saved: Outcome) -> None:
    assert_same_tensors(loaded.tensors, saved.tensors)
    assert (loaded.state, set(loaded.ranks[0].steps)) == (saved.state, set(saved.ranks[0].steps))


@pytest.mark.parametrize(("writer", "reader"), [(FSDP, ""), ("", FSDP), (FSDP, FSDP)])
def test_the_model_alone_makes_the_main_parameters(writer: str, reader: str, tmp_path: Path) -> None:
    saved = fit(2, saving(tmp_path, BF16, *filter(None, [writer])), stop_after=2)
    new = saving(tmp_path / "new", BF16, f"ckpt.load_ckpt_info.path=local:{tmp_path}/ckpts/step-2")
    loaded = resume(2, [*new, "ckpt.load_ckpt_info.content=('model',)", *filter(None, [reader])])
    for name, tensor in saved.tensors.items():
        if name.startswith("model/"):
            assert torch.equal(loaded.tensors[name], tensor)
            assert torch.equal(loaded.tensors[name.replace("model/", "optimizer/main/")], tensor.float())


# -- beside training


class _Batches:
    """An iterator that knows where it came from."""

    def __init__(self) -> None:
        self.loader, types = build_train_loader_with_data_type()
        self.types, self._batches = len(types), iter(self.loader)

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)


def _trainer(model: nn.Module, communicator: Any) -> tuple[Trainer, _Batches]:
    batches = _Batches()
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    return initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=batches.types), batches


@dataclass
class _Seen:
    traffic: dict[str, tuple[Traffic, Traffic]]
    tokens: list[int]
    memory: dict[str, int]
    numel: int


def _beside(rank: int, world_size: int, overrides: tuple[str, ...]) -> _Seen:
    """Train, validate, draw tokens, train and validate again."""
    initialize_distributed_env(TINY, overrides=overrides)
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    trainer, batches = _trainer(model, communicator)
    assert is_fully_sharded(model) == (world_size > 1)
    traffic = {}

    def note(what: str, action: Callable[[], object], step: int, **options: Any) -> None:
        before = LEDGER.snapshot()
        action()
        counted = [int((labels != -100).sum()) for labels in batches.loader.read(step)[1]]
        expected = expected_traffic(build_inventory(gpc.config, world_size), counted, types=batches.types, **options)
        traffic[what] = LEDGER.since(before), expected

    def validate() -> None:
        trainer.eval()
        trainer.execute_schedule(batches, forward_only=True)
        trainer.train()

    note("training", lambda: trainer.train_step(batches), 0)
    note("validation", validate, 1, forward_only=True)
    tokens = generate(model, [3, 1, 4], 5, temperature=0)
    note("training again", lambda: trainer.train_step(batches), 2)
    note("validation again", validate, 3, forward_only=True)
    numel = sum(len(local_shard(parameter).flat) for parameter in model.parameters())
    return _Seen(
        traffic, [*tokens, *generate(model, [3], 5, temperature=0)], held_between_steps(model, trainer.optimizer), numel
    )


def test_beside_training() -> None:
    (one,) = run_ranks(1, _beside, ("data.micro_num=4",))
    ranks = run_ranks(2, _beside, ("data.micro_num=2", FSDP))
    for seen in ranks:
        assert all(counted == expected for counted, expected in seen.traffic.values())
        assert seen.tokens == one.tokens
        assert seen.memory["parameters"] == seen.memory["gradients"] == 8 * seen.numel
    assert sum(seen.numel for seen in ranks) == one.numel
    assert abs(ranks[0].numel - ranks[1].numel) < 0.02 * one.numel


def _of_two_types(model: Any) -> None:
    model.norm.float()


def _with_a_scalar(model: Any) -> None:
    model.layers["1"].scale = nn.Parameter(torch.ones((), dtype=torch.float64))


def _shared_by_blocks(model: Any) -> None:
    model.layers["1"].attention.wo.weight = model.layers["0"].attention.wo.weight


def _shared_norm(model: Any) -> None:
    model.norm = model.layers["1"].ffn_norm


#: By what is done to a model before it is to be shared.
UNFIT: dict[Callable[[nn.Module], None], str] = {
    _of_two_types: "'norm.weight' has dtype torch.float32, expected torch.float64",
    _with_a_scalar: "'layers.1.scale' is a scalar, expected at least 1 dimension",
    _shared_by_blocks: "'layers.1.attention.wo.weight' is tied to 'layers.0.attention.wo.weight', which is not in the "
    "same block",
    _shared_norm: "'norm.weight' is tied to 'layers.1.ffn_norm.weight', which is not in the same block",
}
TODO = "Change the parameter, or set parallel.zero1.fsdp=False"


def _refused(rank: int, world_size: int, spoil: Callable[[nn.Module], None]) -> str:
    initialize_distributed_env(TINY, overrides=(FSDP,))
    model = create_model()
    spoil(model)
    with pytest.raises(ConfigError) as caught:
        initialize_model_and_parallel_communicator(place_replicated(model))
    return str(caught.value)


@pytest.mark.parametrize("spoil", UNFIT, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_shared_is_refused(spoil: Callable[[nn.Module], None]) -> None:
    message = f"parallel.zero1.fsdp: True, but parameter {UNFIT[spoil]}. {TODO}"
    assert run_ranks(2, _refused, spoil) == [message] * 2


def _converted(rank: int, world_size: int) -> str:
    initialize_distributed_env(TINY, overrides=(FSDP,))
    model, communicator = initialize_model_and_parallel_communicator(create_model(deferred=True))
    optimizer, *_ = initialize_optimizer(model, communicator)
    model.half()
    with pytest.raises(UserError) as caught:
        optimizer.zero_grad()
    return str(caught.value)


def test_a_model_that_was_converted_is_refused() -> None:
    for message in run_ranks(2, _converted):
        assert message.startswith("model: 'embedding.weight' was moved out of the optimizer's buffer, so updates")


# -- memory that comes last


def _materialized(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[list[bool], ShardsByName]:
    """Whether parameters have memory, before and after; whether a forward pass leaves it where it is; the values."""
    initialize_distributed_env(TINY, overrides=("model.vocab_size=67", *overrides))
    model = create_model(deferred=True)
    had_memory = any(not parameter.is_meta for parameter in model.parameters())
    model, _ = initialize_model_and_parallel_communicator(model)
    addresses = [local_shard(parameter).flat.data_ptr() for parameter in model.parameters()]
    values = shards_of(model_tensors(model))
    generate(model, [3, 1, 4], 2, temperature=0)
    stays = addresses == [local_shard(parameter).flat.data_ptr() for parameter in model.parameters()]
    return [had_memory, not any(parameter.is_meta for parameter in model.parameters()), stays], values


def test_a_rank_allocates_and_draws_its_shard_alone() -> None:
    """Also where rows are uneven, and ``fully_shard`` pads: an optimizer refers to the memory before the first pass."""
    (one,) = run_ranks(1, _materialized, ())
    ranks = run_ranks(2, _materialized, ("data.micro_num=2", FSDP))
    assert [states for states, _ in ranks] == [[False, True, True]] * 2
    assert_same_tensors(whole_tensors(values for _, values in ranks), whole_tensors([one[1]]))


def _values_set_before(rank: int, world_size: int) -> bool:
    """Whether values that a script sets after ``create_model`` are those that are sharded."""
    initialize_distributed_env({**TINY, "parallel": {"zero1": {"fsdp": True}}})
    model = create_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.125)
    model, _ = initialize_model_and_parallel_communicator(model)
    assert is_fully_sharded(model)
    return all(bool((local_shard(parameter).flat == 0.125).all()) for parameter in model.parameters())


def test_values_that_a_script_sets_are_kept() -> None:
    assert run_ranks(2, _values_set_before) == [True, True]
