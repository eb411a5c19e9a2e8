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
from internlm.verify.compare import LIMITS
from tests.dist.equivalence import (
    MICRO_BATCHES,
    STEPS,
    TINY,
    assert_close,
    assert_equal_runs,
    train,
)
from tests.harness.pool import run_ranks
from tests.unit.data.files import write_bin

DOUBLE = LIMITS["torch.float64"]
#: (ranks, parallel.zero1.size)
LAYOUTS = [(1, 1), (2, -1), (2, 1), (4, -1), (4, 1), (4, 2)]

#: What has hidden mistakes before, as overrides.
CASES: dict[str, tuple[str, ...]] = {
    "unpacked": ("data.use_packed_dataset=False",),
    "windows across samples": ("data.pack_sample_into_one=True",),
    "label smoothing": ("loss.label_smoothing=0.1",),
    "vocabulary of odd size": ("model.vocab_size=67",),
    "one kv head": ("model.num_kv_attention_heads=1",),
    "multi-head": ("model.num_kv_attention_heads=4",),
    "tied embeddings": ("model.tie_word_embeddings=True",),
    "scaled embedding gradient": ("model.embed_grad_scale=0.1",),
    "half recomputed": ("model.checkpoint=0.5",),
    "all recomputed": ("model.checkpoint=True", "model_type=INTERNLM"),
    "not clipped": ("hybrid_zero_optimizer.clip_grad_norm=0",),
    "decay of matrices alone": ("adam.decay_norm_and_bias=False", "model_type=INTERNLM"),
    "layer norm and biases": ("model.norm_type=layernorm", "model.qkv_bias=True", "model.mlp_bias=True"),
    "warm-up and beta2 schedule": ("lr_scheduler.warmup_ratio=0.5", "adam.adam_beta2_c=0.8"),
    "INTERNLM": ("model_type=INTERNLM",),
    "LLAMA2": ("model_type=LLAMA2",),
    "a user's own model": ("model_type=PLAIN",),
}


def _zero1(size: int) -> str:
    return f"parallel.zero1.size={size}"


@pytest.mark.parametrize(("ranks", "zero1"), LAYOUTS)
def test_every_layout(ranks: int, zero1: int) -> None:
    assert_equal_runs(train(ranks, (_zero1(zero1),)), train(1), DOUBLE)


@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str) -> None:
    """With replicas of shards, which is the most that data parallelism can be."""
    overrides = CASES[case]
    assert_equal_runs(train(4, (*overrides, _zero1(2))), train(1, overrides), DOUBLE)


#: In bf16 without biases: the gradient of a key's bias is zero but for rounding, which Adam then makes large.
NARROW = [("torch.float32", "INTERNLM"), ("torch.bfloat16", "LLAMA2")]


@pytest.mark.parametrize(("dtype", "family"), NARROW)
@pytest.mark.parametrize(("ranks", "zero1"), LAYOUTS)
def test_narrower_types(dtype: str, family: str, ranks: int, zero1: int) -> None:
    overrides = (f"model.dtype={dtype}", f"model_type={family}")
    assert_equal_runs(train(ranks, (*overrides, _zero1(zero1))), train(1, overrides), LIMITS[dtype])


def test_a_users_model_in_bf16() -> None:
    overrides = ("model.dtype=torch.bfloat16", "model_type=PLAIN")
    assert_equal_runs(train(2, overrides), train(1, overrides), LIMITS["torch.bfloat16"])


@pytest.mark.parametrize(("dtype", "relative"), [("torch.float64", 1e-10), ("torch.float32", 1e-5)])
def test_a_hundred_steps(dtype: str, relative: float) -> None:
    overrides = (f"model.dtype={dtype}", "data.total_steps=100", "adam.lr=3e-3")
    losses, reference = train(2, overrides, 100).losses, train(1, overrides, 100).losses
    assert losses == pytest.approx(reference, rel=relative, abs=0)
    assert sum(reference[-5:]) < 0.95 * sum(reference[:5])  # it does learn, so the comparison means something


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
    run = train(ranks, (*overrides, _zero1(zero1)))
    assert_equal_runs(run, train(1, overrides), DOUBLE)
    assert len(set(run.valid_tokens)) > 1
    assert ranks == 2 or 0 in run.valid_tokens
    assert len(run.sums[0]) == 2


def _validate(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, float]:
    initialize_distributed_env(TINY, overrides=overrides)
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=2)
    figures = evaluate(trainer, build_valid_loader_with_data_type())
    assert model.training
    return figures


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("ranks", "micro_num"), [(2, 1), (2, 3), (4, 2)])
def test_validation(lopsided: str, packed: bool, ranks: int, micro_num: int) -> None:
    """The figures are those of one process, though no number of rows fits: the last batches are filled up with pads."""
    overrides = (f"data.train_folder={lopsided}", f"data.valid_folder={lopsided}", f"data.use_packed_dataset={packed}")
    (alone,) = run_ranks(1, _validate, (*overrides, "data.valid_micro_num=1"))
    together = run_ranks(ranks, _validate, (*overrides, f"data.valid_micro_num={micro_num}"))
    assert all(figures == together[0] for figures in together)
    assert together[0] == pytest.approx(alone, rel=1e-12, abs=0)
    assert alone["valid/loss/cn"] != alone["valid/loss/en"]


def test_recomputing_gives_the_same_bits() -> None:
    plain, recomputed = train(1), train(1, ("model.checkpoint=True",))
    assert recomputed.losses == plain.losses
    assert recomputed.norms == plain.norms
    assert_close(recomputed.parameters, plain.parameters, 0)


# -- the serial run itself, against a loop without any of our machinery


def _plain_loop(rank: int, world_size: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    initialize_distributed_env(TINY, overrides=(f"data.micro_num={MICRO_BATCHES}",))
    model, (loader, _) = create_model(), build_train_loader_with_data_type()
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=gpc.config.adam.weight_decay)
    losses, norms = [], []
    for step, (batch, labels) in enumerate(loader):
        adam.param_groups[0]["lr"] = gpc.config.adam.lr * (1 + math.cos(math.pi * step / STEPS)) / 2
        logits = [
            model(batch["input_ids"][i], batch["cu_seqlens"][i], batch["indexes"][i]) for i in range(MICRO_BATCHES)
        ]
        loss = F.cross_entropy(torch.cat(logits), labels.flatten())  # the mean over labels that aren't -100
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        adam.step()
        losses.append(loss.item())
    return losses, norms, {f"model/{name}": p.detach() for name, p in model.named_parameters()}


def test_one_process_is_a_plain_loop() -> None:
    ((losses, norms, parameters),) = run_ranks(1, _plain_loop)
    run = train(1)
    assert run.losses == pytest.approx(losses, rel=1e-12)
    assert run.norms == pytest.approx(norms, rel=1e-11)
    assert_close(run.parameters, parameters, 1e-11)
    assert max(norms) > 0.5  # clipping is active
