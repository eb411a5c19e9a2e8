"""Cross entropy with the vocabulary split over ranks equals that of one rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm.ops import LossOptions, TokenLoss, linear_cross_entropy
from internlm.ops.cross_entropy import IGNORED
from tests.harness.pool import run_ranks
from tests.unit.ops.parity import TOLERANCE, randn, relative_error

TOKENS, HIDDEN, CHUNK = 23, 12, 5
SIZES = [1, 2, 4]
#: Shards of four ranks: 2, 2, 2, 1; 16 each; 17, 17, 17, 16; 2, 2, 1, 0.
VOCABULARIES = [7, 64, 67, 5]
IGNORING = {"none": [], "some": [0, 5, 6, 22], "all": list(range(TOKENS))}


@dataclass
class Shard:
    """A rank's shard of a vocabulary that is padded to equal shards, and the collectives called so far."""

    rank: int
    size: int
    total: int
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = -(-self.total // self.size)
        self.first = self.rank * self.rows
        self.columns = min(max(self.total - self.first, 0), self.rows)

    def max_(self, x: Tensor) -> Tensor:
        self.calls.append("max")
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def sum_(self, x: Tensor) -> Tensor:
        self.calls.append("sum")
        dist.all_reduce(x)
        return x

    def of(self, weight: Tensor) -> Tensor:
        """Slice this rank's rows; rows of padding are so large that they would win every maximum."""
        shard = weight.detach().new_full((self.rows, weight.shape[1]), 100.0)
        shard[: self.columns] = weight.detach()[self.first : self.first + self.columns]
        return shard.requires_grad_()


@dataclass(frozen=True)
class Case:
    total: int
    ignored: list[int] = field(default_factory=list)
    smoothing: float = 0.0
    main_grad: bool = False
    dtype: torch.dtype = torch.float64

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw x [T, H], the whole weight [V, H] and labels [T]; every third token fits its label."""
        x, weight = randn(TOKENS, HIDDEN, dtype=self.dtype), randn(self.total, HIDDEN, dtype=self.dtype, seed=1)
        labels = torch.randint(0, self.total, (TOKENS,), generator=torch.Generator().manual_seed(0))
        x.data[::3] = weight.data[labels[::3]]
        labels[self.ignored] = IGNORED
        return x, weight, labels

    def loss(
        self, x: Tensor, weight: Tensor, labels: Tensor, shard: Shard | None, main_grad: Tensor | None = None
    ) -> TokenLoss:
        return linear_cross_entropy(
            x,
            weight,
            labels,
            LossOptions(
                label_smoothing=self.smoothing, chunk_tokens=CHUNK, grad_scale=0.25, vocab=shard, main_grad=main_grad
            ),
        )


@dataclass(frozen=True)
class Result:
    loss: TokenLoss
    dx: Tensor
    dweight: Tensor
    calls: list[str]


def _train(case: Case, shard: Shard | None) -> Result:
    x, weight, labels = case.inputs()
    if shard is not None:
        weight = shard.of(weight)
    main_grad = (
        torch.ones_like(weight, dtype=torch.promote_types(case.dtype, torch.float32)) if case.main_grad else None
    )
    loss = case.loss(x, weight, labels, shard, main_grad)
    (3.0 * loss.loss_sum).backward()
    assert x.grad is not None
    assert (weight.grad is None) == case.main_grad
    dweight = main_grad - 1 if main_grad is not None else weight.grad
    assert dweight is not None
    return Result(TokenLoss(*(y.detach() for y in loss)), x.grad, dweight, [] if shard is None else shard.calls)


def _train_shard(rank: int, world_size: int, case: Case) -> Result:
    return _train(case, Shard(rank, world_size, case.total))


def _assert_equal_to_whole(size: int, case: Case) -> None:
    whole, results = _train(case, None), run_ranks(size, _train_shard, case)
    tolerance, first = TOLERANCE[case.dtype], results[0].loss
    for result in results:
        assert all(torch.equal(ours, same) for ours, same in zip(result.loss, first, strict=True))
        assert result.calls == ["max", "sum"] * -(-(TOKENS - len(case.ignored)) // CHUNK)
    assert relative_error(first.loss_sum, whole.loss.loss_sum) < tolerance
    assert relative_error(first.token_loss, whole.loss.token_loss) < tolerance
    assert torch.equal(first.correct, whole.loss.correct)
    assert relative_error(torch.stack([result.dx.double() for result in results]).sum(0), whole.dx) < tolerance
    dweight = torch.cat([result.dweight for result in results])
    assert relative_error(dweight[: case.total], whole.dweight) < tolerance
    assert dweight[case.total :].eq(0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("total", VOCABULARIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignoring", IGNORING)
def test_a_split_vocabulary_equals_a_whole_one(size: int, total: int, smoothing: float, ignoring: str) -> None:
    _assert_equal_to_whole(size, Case(total, IGNORING[ignoring], smoothing))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("main_grad", [False, True])
def test_a_split_vocabulary_equals_a_whole_one_in_other_precisions(dtype: torch.dtype, main_grad: bool) -> None:
    _assert_equal_to_whole(4, Case(67, IGNORING["some"], 0.1, main_grad, dtype))


def _evaluate(rank: int, world_size: int, case: Case) -> tuple[TokenLoss, bool, list[str]]:
    x, weight, labels = case.inputs()
    shard = Shard(rank, world_size, case.total)
    with torch.no_grad():
        loss = case.loss(x, shard.of(weight), labels, shard)
    return loss, loss.loss_sum.requires_grad, shard.calls


@pytest.mark.parametrize("size", SIZES)
def test_the_loss_without_gradients_is_that_of_training(size: int) -> None:
    case = Case(5, IGNORING["some"], 0.1)
    for training, (loss, differentiable, calls) in zip(
        run_ranks(size, _train_shard, case), run_ranks(size, _evaluate, case), strict=True
    ):
        assert all(torch.equal(ours, same) for ours, same in zip(loss, training.loss, strict=True))
        assert calls == training.calls
        assert not differentiable


def _correct(rank: int, world_size: int, logits: list[float]) -> list[bool]:
    shard = Shard(rank, world_size, len(logits))
    labels = torch.arange(len(logits))
    x, weight = torch.ones(len(logits), 1), shard.of(torch.tensor(logits)[:, None])
    return linear_cross_entropy(x, weight, labels, LossOptions(vocab=shard)).correct.tolist()


@pytest.mark.parametrize("size", SIZES)
def test_a_tie_with_the_largest_logit_counts_as_correct(size: int) -> None:
    """On whichever rank the other logits are."""
    assert run_ranks(size, _correct, [2.0, 1.0, 2.0, 0.0, 2.0]) == [[True, False, True, False, True]] * size
    assert run_ranks(size, _correct, [-2.0, -3.0, -2.0]) == [[True, False, True]] * size
