"""Data parallelism changes nothing: a run on several ranks is that of one process, sums taken in another order.

In float64 hardly any mistake can hide behind rounding, so most rows use it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.core.context import global_context as gpc
from internlm.data import build_train_loader_with_data_type, build_valid_loader_with_data_type
from internlm.eval import evaluate
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.verify.record import RankRecord
from internlm.verify.tensors import relative_l2
from tests.dist.oracle import MOST_MICRO_BATCHES, plan_of, reference, verify
from tests.dist.tiny import TINY, TOTAL_STEPS
from tests.dist.whole_runs import assert_same_tensors, whole_tensors
from tests.harness.pool import run_ranks
from tests.unit.data.files import write_bin

#: (ranks, parallel.zero1.size)
LAYOUTS = [
    (2, -1),
    (2, 1),
    (4, 2),
    pytest.param(4, -1, marks=pytest.mark.wide),
    pytest.param(4, 1, marks=pytest.mark.wide),
]

#: What hides mistakes, as overrides; those that have to do with layers are in :mod:`tests.dist.test_parallel`.
CASES: dict[str, tuple[str, ...]] = {
    "one kv head": ("model.num_kv_attention_heads=1",),
    "decay of matrices alone": ("adam.decay_norm_and_bias=False", "model_type=INTERNLM"),
    "warm-up and beta2 schedule": ("lr_scheduler.warmup_ratio=0.5", "adam.adam_beta2_c=0.8"),
    "not clipped": ("hybrid_zero_optimizer.clip_grad_norm=0",),
    "tied, unpacked": ("model.tie_word_embeddings=True", "data.use_packed_dataset=False"),
    "LLAMA2": ("model_type=LLAMA2", "model.vocab_size=67"),
    "a user's own model": ("model_type=PLAIN",),
}


def _zero1(size: int) -> str:
    return f"parallel.zero1.size={size}"


def assert_equal(ranks: int, overrides: tuple[str, ...], dtype: str = "float64") -> list[RankRecord]:
    report, records = verify(ranks, overrides, steps=TOTAL_STEPS, dtype=dtype)
    assert report.failures == []
    return records


@pytest.mark.parametrize(("ranks", "zero1"), LAYOUTS)
def test_every_layout(ranks: int, zero1: int) -> None:
    assert_equal(ranks, (_zero1(zero1),))


@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str) -> None:
    """With replicas of shards, which is the most that data parallelism can be."""
    assert_equal(4, (*CASES[case], _zero1(2)))


#: In bf16 without biases: the gradient of a key's bias is zero but for rounding, which Adam then makes large.
NARROW = [("float32", "INTERNLM"), ("bfloat16", "LLAMA2")]


@pytest.mark.parametrize(("dtype", "family"), NARROW)
@pytest.mark.parametrize(("ranks", "zero1"), [pytest.param(2, 1, marks=pytest.mark.wide), *LAYOUTS[2:]])
def test_narrower_types(dtype: str, family: str, ranks: int, zero1: int) -> None:
    assert_equal(ranks, (f"model_type={family}", _zero1(zero1)), dtype)


def test_a_users_model_in_bf16() -> None:
    assert_equal(2, ("model_type=PLAIN",), "bfloat16")


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.wide)])
def test_a_hundred_steps(dtype: str) -> None:
    report, _ = verify(2, ("data.total_steps=100", "adam.lr=3e-3"), steps=100, dtype=dtype)
    assert [row for row in report.losses if not row.passed] == []
    losses = [row.reference or 0 for row in report.losses]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])  # it does learn, so the comparison means something


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two types of samples; in two of three no label counts at all."""
    folder = tmp_path_factory.mktemp("lopsided")
    for name, offset in (("cn", 0), ("en", 7)):
        samples = [[(offset + i * j) % 63 + 1 for j in range(4 + i % 12)] for i in range(24)]
        write_bin(folder / name / "a.bin", [[-t for t in s] if i % 3 else s for i, s in enumerate(samples)])
    return str(folder)


@pytest.mark.parametrize(("ranks", "zero1"), [(2, -1), (4, 2)])
def test_a_rank_without_valid_tokens(lopsided: str, ranks: int, zero1: int) -> None:
    overrides = (f"data.train_folder={lopsided}", "data.use_packed_dataset=False", "data.micro_bsz=1")
    records = assert_equal(ranks, (*overrides, _zero1(zero1)))
    valid = [sum(record.tokens[0]) for record in records]
    assert len(set(valid)) > 1
    assert ranks == 2 or 0 in valid
    assert len(records[0].sums[0]) == 2


def _validate(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, float]:
    initialize_distributed_env(TINY, overrides=overrides)
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=2)
    figures = evaluate(trainer, build_valid_loader_with_data_type())
    assert model.training
    return figures


@pytest.mark.parametrize(("packed", "ranks", "micro_num"), [(True, 2, 3), (False, 2, 1), (True, 4, 2), (False, 4, 2)])
def test_validation(lopsided: str, packed: bool, ranks: int, micro_num: int) -> None:
    """The figures are those of one process, though no number of rows fits: the last batches are filled up with pads."""
    overrides = (f"data.train_folder={lopsided}", f"data.valid_folder={lopsided}", f"data.use_packed_dataset={packed}")
    (alone,) = run_ranks(1, _validate, (*overrides, "data.valid_micro_num=1"))
    together = run_ranks(ranks, _validate, (*overrides, f"data.valid_micro_num={micro_num}"))
    assert all(figures == together[0] for figures in together)
    assert together[0] == pytest.approx(alone, rel=1e-12, abs=0)
    assert alone["valid/loss/cn"] != alone["valid/loss/en"]


def _alone(*overrides: str) -> RankRecord:
    return reference(plan_of(1, overrides, steps=TOTAL_STEPS))


def test_recomputing_gives_the_same_bits() -> None:
    plain, recomputed = _alone(), _alone("model.checkpoint=True")
    assert recomputed.losses == plain.losses
    assert recomputed.norms == plain.norms
    parameters = whole_tensors([plain.parameters])
    assert_same_tensors(whole_tensors([recomputed.parameters]), parameters)


# -- the serial run itself, against a loop without any of our machinery


def _plain_loop(rank: int, world_size: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    initialize_distributed_env(TINY, overrides=(f"data.micro_num={MOST_MICRO_BATCHES}",))
    model, (loader, _) = create_model(), build_train_loader_with_data_type()
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=gpc.config.adam.weight_decay)
    losses, norms = [], []
    for step, (batch, labels) in enumerate(loader):
        adam.param_groups[0]["lr"] = gpc.config.adam.lr * (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2
        logits = [
            model(batch["input_ids"][i], batch["cu_seqlens"][i], batch["indexes"][i]) for i in range(MOST_MICRO_BATCHES)
        ]
        loss = F.cross_entropy(torch.cat(logits), labels.flatten())  # the mean over labels that aren't -100
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        adam.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def test_one_process_is_a_plain_loop() -> None:
    ((losses, norms, parameters),) = run_ranks(1, _plain_loop)
    run = _alone()
    assert run.losses == pytest.approx(losses, rel=1e-12)
    assert run.norms == pytest.approx(norms, rel=1e-11)
    found = whole_tensors([run.parameters])
    assert found.keys() == parameters.keys()
    assert max(relative_l2(found[name], parameter) for name, parameter in parameters.items()) < 1e-11
    assert max(norms) > 0.5  # clipping is active
