"""One config in several layouts, to be compared: what a run gives must not depend on how many ranks share it.

:func:`train` runs a config the way a user's script does, on workers of the pool; each result is kept for the session,
so that many rows can be compared with one serial run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internlm.checkpoint.logical_tensors import LogicalTensors, model_tensors, optimizer_tensors
from internlm.config.schema import ModelConfig
from internlm.core.context import global_context as gpc
from internlm.core.parallel import place_replicated
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.utils.registry import MODEL_INITIALIZER
from internlm.verify.compare import Limits
from tests.harness.pool import run_ranks

#: Micro-batches of a global batch, whatever number of ranks shares it.
MICRO_BATCHES = 4
STEPS = 5

TINY: dict[str, Any] = {
    "model_type": "INTERNLM2",
    "data": {"seq_len": 16, "micro_bsz": 2, "total_steps": STEPS, "num_worker": 0},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "vocab_size": 64,
        "multiple_of": 16,
        "dtype": "torch.float64",
    },
    "adam": {"lr": 1e-2, "weight_decay": 0.1},
    "hybrid_zero_optimizer": {"clip_grad_norm": 0.5},
    "enable_tb": False,
}


class Plain(nn.Module):
    """A model of torch's own modules, as users bring it: each token speaks of the next one."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU())
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None, indexes: Tensor | None = None) -> Tensor:
        """Logits [*input_ids.shape, vocab_size]."""
        x = self.embedding(input_ids)
        return self.head(x + self.layers(x))


@MODEL_INITIALIZER.register_module(module_name="PLAIN")
def build_plain(model: ModelConfig) -> nn.Module:
    """What a user registers."""
    return place_replicated(Plain(model.vocab_size, model.hidden_size))


Boxes = dict[str, tuple[tuple[int, ...], dict[tuple[int, ...], Tensor]]]


@dataclass(frozen=True)
class Run:
    """What a run gave. Tensors are whole and have their logical names."""

    losses: list[float]
    norms: list[float]
    sums: list[list[float]]
    """Loss, correct predictions and valid tokens of the first step, by data-set type."""
    gradients: dict[str, Tensor]
    """Of the first step, as Adam saw them: reduced over all ranks, and clipped."""
    parameters: dict[str, Tensor]
    """After the last step."""
    valid_tokens: list[int]
    """Labels that counted in the first step, rank by rank."""


def share_of_batch(world_size: int, overrides: Sequence[str]) -> str:
    """The override that gives each rank its part of the global batch; the ranks of a tensor group share theirs, and so
    do the stages of a pipeline."""
    given = dict(text.split("=", 1) for text in overrides)
    sharing = math.prod(int(given.get(f"parallel.{each}.size", 1)) for each in ("tensor", "pipeline"))
    return f"data.micro_num={max(MICRO_BATCHES * sharing // world_size, 1)}"


@functools.cache
def train(world_size: int, overrides: tuple[str, ...] = (), steps: int = STEPS) -> Run:
    """The first ``steps`` steps of :data:`TINY` with ``overrides`` (``"key=value"``), on ``world_size`` ranks."""
    ranks = run_ranks(world_size, _train, overrides, steps)
    first = ranks[0]
    assert all(rank[key] == first[key] for rank in ranks for key in ("losses", "norms", "sums"))
    return Run(
        first["losses"],
        first["norms"],
        first["sums"],
        assemble(rank["gradients"] for rank in ranks),
        assemble(rank["parameters"] for rank in ranks),
        [rank["valid_tokens"] for rank in ranks],
    )


def _train(rank: int, world_size: int, overrides: tuple[str, ...], steps: int) -> dict[str, Any]:
    initialize_distributed_env(TINY, overrides=(share_of_batch(world_size, overrides), *overrides))
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    loader, types = build_train_loader_with_data_type()
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=len(types))
    batches = iter(loader)
    reports = [trainer.train_step(batches)]
    gradients = _first_gradients(optimizer)
    reports += [trainer.train_step(batches) for _ in range(steps - 1)]
    return {
        "losses": [report.result.loss for report in reports],
        "norms": [report.update.grad_norm for report in reports],
        "sums": reports[0].result.sums.tolist(),
        "gradients": gradients,
        "parameters": boxes_of(model_tensors(model)),
        "valid_tokens": int((loader.read(0)[1] != -100).sum()),
    }


def _first_gradients(optimizer: HybridZeroOptimizer) -> Boxes:
    """Read back from the first moment, which after one step is (1 - beta1) times the gradient."""
    beta1, prefix = gpc.config.adam.adam_beta1, "optimizer/exp_avg/"
    return {
        name.removeprefix(prefix): (shape, {at: box / (1 - beta1) for at, box in held.items()})
        for name, (shape, held) in boxes_of(optimizer_tensors(optimizer)).items()
        if name.startswith(prefix)
    }


def boxes_of(tensors: LogicalTensors) -> Boxes:
    """What a rank holds of each logical tensor, copied, so that it can travel to the test."""
    return {
        name: (tuple(tensor.global_shape), {at: box.to(tensor.dtype, copy=True) for at, box in tensor.slices.items()})
        for name, tensor in tensors.items()
    }


def assemble(ranks: Iterable[Boxes]) -> dict[str, Tensor]:
    """Whole tensors from what each rank holds of them; what several ranks hold must be equal bit by bit."""
    wholes: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for boxes in ranks:
        for name, (shape, held) in boxes.items():
            for at, box in held.items():
                where = tuple(slice(start, start + size) for start, size in zip(at, box.shape, strict=True))
                whole = wholes.setdefault(name, torch.zeros(shape, dtype=box.dtype))
                known = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
                again = known[where]
                assert torch.equal(whole[where][again], box[again]), f"{name} differs between ranks"
                whole[where], known[where] = box, True
    assert all(known.all() for known in seen.values()), "some elements are held by no rank"
    return wholes


def assert_equal_runs(run: Run, reference: Run, tolerance: Limits) -> None:
    """``run`` is the same training as ``reference``, but for the order in which sums are taken."""
    assert run.losses[0] == pytest.approx(reference.losses[0], rel=tolerance.first_loss, abs=0)
    assert run.norms[0] == pytest.approx(reference.norms[0], rel=tolerance.first_norm, abs=0)
    assert run.losses == pytest.approx(reference.losses, rel=tolerance.losses, abs=0)
    assert run.norms == pytest.approx(reference.norms, rel=tolerance.norms, abs=0)
    for row, wanted in zip(run.sums, reference.sums, strict=True):
        assert row == pytest.approx(wanted, rel=tolerance.first_loss, abs=0)
    assert_close(run.gradients, reference.gradients, tolerance.gradients)
    assert_close(run.parameters, reference.parameters, tolerance.parameters)


def assert_close(tensors: dict[str, Tensor], references: dict[str, Tensor], relative: float) -> None:
    """Equal names, and relative differences in the L2 norm within bounds; a reference of zeros must be met exactly."""
    assert tensors.keys() == references.keys()
    for name, reference in references.items():
        difference = (tensors[name].double() - reference.double()).norm()
        assert difference <= relative * reference.double().norm(), f"{name}: {difference} of {reference.norm()}"
