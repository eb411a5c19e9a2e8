from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from internlm.ops import LossOptions, cross_entropy, linear_cross_entropy, reference
from internlm.ops.cross_entropy import (
    _LinearCrossEntropy,
    _losses_and_grad,
    _sharded_losses_and_grad,
    keeps_dlogits,
)
from tests.unit.ops.parity import LargestTensor, assert_parity, randn, relative_error, saved_for_backward

TOKENS, HIDDEN, VOCAB = 23, 12, 31
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Alone:
    """The whole vocabulary on one rank: what it holds is the sum and the maximum over the ranks."""

    total: int = VOCAB
    first: int = 0

    def __post_init__(self) -> None:
        self.columns = self.total

    def max_(self, x: Tensor) -> Tensor:
        return x

    def sum_(self, x: Tensor) -> Tensor:
        return x


def labels_with(ignored: list[int]) -> Tensor:
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))
    labels[ignored] = -100
    return labels


def exact_sum(x: Tensor, weight: Tensor, labels: Tensor, smoothing: float, scale: float) -> Tensor:
    return scale * reference.token_loss(x @ weight.t(), labels, smoothing).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("ignored", [[], [0, 5, 6, 22]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_reference(dtype: torch.dtype, chunk: int | None, ignored: list[int], smoothing: float) -> None:
    labels = labels_with(ignored)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, weight, labels, LossOptions(label_smoothing=smoothing, chunk_tokens=chunk, grad_scale=0.25)
        ).loss_sum

    exact = partial(exact_sum, labels=labels, smoothing=smoothing, scale=0.25)
    assert_parity(ours, exact, randn(TOKENS, HIDDEN, dtype=dtype), randn(VOCAB, HIDDEN, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [[], [0, 5, 6, 22]])
@pytest.mark.parametrize("vocab", [None, Alone()])
def test_with_the_gradient_of_the_logits_saved_it_equals_reference(
    dtype: torch.dtype, ignored: list[int], vocab: Alone | None
) -> None:
    """Called below the function that drops ignored tokens on the CPU, as on a device."""
    labels = labels_with(ignored)
    scale = torch.tensor(0.25, dtype=torch.float64)
    options = LossOptions(label_smoothing=0.1, chunk_tokens=7, grad_scale=scale, keeps_dlogits=True, vocab=vocab)
    assert_parity(
        lambda x, weight: 3.0 * _LinearCrossEntropy.apply(x, weight, labels, options)[0],
        partial(exact_sum, labels=labels, smoothing=0.1, scale=0.75),
        randn(TOKENS, HIDDEN, dtype=dtype),
        randn(VOCAB, HIDDEN, dtype=dtype, seed=1),
    )


@pytest.mark.parametrize(("keeps", "shapes"), [(True, {(TOKENS, HIDDEN), (TOKENS, VOCAB)}), (False, None)])
def test_what_is_saved(keeps: bool, shapes: set[tuple[int, int]] | None) -> None:
    """The gradient of the input, beside it that of the weight, or the input and the gradient of the logits."""
    x, weight = randn(TOKENS, HIDDEN), randn(VOCAB, HIDDEN, seed=1)
    with saved_for_backward() as saved:
        linear_cross_entropy(x, weight, labels_with([]), LossOptions(keeps_dlogits=keeps))
    assert {tuple(tensor.shape) for tensor in saved} == (shapes or {(TOKENS, HIDDEN), (HIDDEN, VOCAB)})


@pytest.mark.parametrize(
    ("tokens", "dtype", "on_host", "keeps"),
    [
        (8192, torch.bfloat16, False, True),  # 2.17 GB, of which 0.07 are the input; and 2.1 + 0.53 GB otherwise
        (16384, torch.bfloat16, False, False),
        (8192, torch.float32, False, False),
        (4096, torch.float32, False, True),
        (1024, torch.float16, False, False),
        (1024, torch.float32, True, False),
    ],
)
def test_the_gradient_of_the_logits_is_saved_where_it_takes_no_more_memory(
    tokens: int, dtype: torch.dtype, on_host: bool, keeps: bool
) -> None:
    assert keeps_dlogits(on_host, dtype, tokens, 128256, 4096) == keeps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_logits_equals_reference(dtype: torch.dtype, smoothing: float) -> None:
    labels = labels_with([0, 5])
    assert_parity(
        lambda z: cross_entropy(z, labels, label_smoothing=smoothing, grad_scale=3.0).loss_sum,
        lambda z: 3.0 * reference.token_loss(z, labels, smoothing).sum(),
        randn(TOKENS, VOCAB, dtype=dtype),
    )


def test_gradients() -> None:
    labels = torch.tensor([1, -100, 0])
    assert gradcheck(lambda x, w: linear_cross_entropy(x, w, labels).loss_sum, (randn(3, 4), randn(5, 4, seed=1)))
    assert gradcheck(lambda z: cross_entropy(z, labels).loss_sum, (randn(3, 5),))


@pytest.mark.parametrize("ignored", [[], [3, 4], list(range(TOKENS))])
def test_losses_token_by_token(ignored: list[int]) -> None:
    x, weight, labels = randn(TOKENS, HIDDEN), randn(VOCAB, HIDDEN, seed=1), labels_with(ignored)
    logits = x @ weight.t()
    for loss in (
        linear_cross_entropy(x, weight, labels, LossOptions(chunk_tokens=5, grad_scale=2.0)),
        cross_entropy(logits, labels),
    ):
        torch.testing.assert_close(loss.token_loss, reference.token_loss(logits, labels).detach())
        assert torch.equal(loss.correct, (logits.argmax(1) == labels) & (labels != -100))
        assert not loss.token_loss.requires_grad
        assert loss.token_loss[ignored].eq(0).all()


def test_nothing_but_ignored_tokens_gives_zero_gradients() -> None:
    x, weight = randn(TOKENS, HIDDEN), randn(VOCAB, HIDDEN, seed=1)
    loss = linear_cross_entropy(x, weight, labels_with(list(range(TOKENS))))
    grads = torch.autograd.grad(loss.loss_sum, (x, weight))
    assert loss.loss_sum == 0
    assert all(grad.eq(0).all() for grad in grads)


def test_a_tie_with_the_largest_logit_counts_as_correct() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert cross_entropy(logits, torch.tensor([0, 1, 2])).correct.tolist() == [True, True, False]


def test_logits_far_apart() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0]])
    assert cross_entropy(logits, torch.tensor([0])).token_loss.item() == 0.0
    assert cross_entropy(logits, torch.tensor([1])).token_loss.item() == 600.0


def test_cross_entropy_leaves_the_logits_as_they_are() -> None:
    logits = randn(TOKENS, VOCAB, dtype=torch.float32)
    before = logits.detach().clone()
    cross_entropy(logits, labels_with([])).loss_sum.backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weight_gradient_overwrites_main_grad_or_is_added_to_it(dtype: torch.dtype, keeps: bool) -> None:
    labels, adds = labels_with([2]), iter([False, True])
    x, weight = randn(TOKENS, HIDDEN, dtype=dtype), randn(VOCAB, HIDDEN, dtype=dtype, seed=1)
    main_grad = torch.full((VOCAB, HIDDEN), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    options = LossOptions(grad_scale=0.5, main_grad=main_grad, adds=lambda: next(adds), keeps_dlogits=keeps)
    for _ in range(2):
        linear_cross_entropy(x, weight, labels, options).loss_sum.backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact_sum(exact_x, exact_weight, labels, 0.0, 1.0).backward()
    assert weight.grad is None
    assert relative_error(main_grad, exact_weight.grad) < (1e-12 if dtype == torch.float64 else 1e-2)


def test_a_loss_scale_beyond_half_precision_keeps_gradients_finite() -> None:
    x = randn(TOKENS, HIDDEN, dtype=torch.float16)
    weight = randn(VOCAB, HIDDEN, dtype=torch.float16, seed=1)
    loss = linear_cross_entropy(x, weight, labels_with([]), LossOptions(grad_scale=2.0**17))
    (dx,) = torch.autograd.grad(loss.loss_sum * 2.0**-14, x)
    exact_x = x.detach().double().requires_grad_()
    exact_sum(exact_x, weight.detach().double(), labels_with([]), 0.0, 8.0).backward()
    assert relative_error(dx, exact_x.grad) < 3e-3


@pytest.mark.parametrize("wanted", ["both", "x", "weight", "neither"])
def test_only_wanted_gradients_are_made(wanted: str) -> None:
    x, weight = randn(TOKENS, HIDDEN), randn(VOCAB, HIDDEN, seed=1)
    x.requires_grad_(wanted in ("both", "x"))
    weight.requires_grad_(wanted in ("both", "weight"))
    loss = linear_cross_entropy(x, weight, labels_with([])).loss_sum
    assert loss.requires_grad == (wanted != "neither")
    if loss.requires_grad:
        loss.backward()
    assert (x.grad is not None, weight.grad is not None) == (x.requires_grad, weight.requires_grad)


@pytest.mark.parametrize("grad", [True, False])
def test_logits_exist_one_chunk_at_a_time(grad: bool) -> None:
    x, weight = randn(512, 4), randn(300, 4, seed=1)
    labels = torch.zeros(512, dtype=torch.int64)
    with torch.set_grad_enabled(grad), LargestTensor() as largest:
        linear_cross_entropy(x, weight, labels, LossOptions(chunk_tokens=32))
    assert largest.elements == 32 * 300
    with torch.set_grad_enabled(grad), LargestTensor() as largest:
        linear_cross_entropy(x, weight, labels)
    assert largest.elements == 512 * 300


def test_without_gradients_none_are_made() -> None:
    x, weight = randn(8, 64), randn(32, 64, seed=1)
    with torch.no_grad(), LargestTensor() as largest:
        linear_cross_entropy(x, weight, torch.zeros(8, dtype=torch.int64))
    assert largest.elements < weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_shard_of_the_whole_vocabulary_equals_reference(dtype: torch.dtype, smoothing: float) -> None:
    """Its weight has rows of padding, which are no part of the vocabulary."""
    labels = labels_with([0, 5])
    assert_parity(
        lambda x, w: (
            linear_cross_entropy(
                x, w, labels, LossOptions(label_smoothing=smoothing, chunk_tokens=7, grad_scale=0.25, vocab=Alone())
            ).loss_sum
        ),
        lambda x, w: exact_sum(x, w[:VOCAB], labels, smoothing, 0.25),
        randn(TOKENS, HIDDEN, dtype=dtype),
        randn(VOCAB + 2, HIDDEN, dtype=dtype, seed=1),
    )


def test_shard_with_labels_far_from_the_largest_logit() -> None:
    weight, x = torch.tensor([[300.0], [-300.0], [0.0]]), torch.ones(2, 1)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 1]), LossOptions(vocab=Alone(total=3)))
    assert loss.token_loss.tolist() == [0.0, 600.0]


def test_logits_of_a_shard_exist_one_chunk_at_a_time() -> None:
    x, weight = randn(512, 4), randn(300, 4, seed=1)
    with LargestTensor() as largest:
        linear_cross_entropy(
            x,
            weight,
            torch.zeros(512, dtype=torch.int64),
            LossOptions(label_smoothing=0.1, chunk_tokens=32, vocab=Alone(299)),
        )
    assert largest.elements == 32 * 300


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_tokens_among_those_of_a_shard(smoothing: float) -> None:
    """As where ignored tokens are not dropped beforehand; gradients of their logits are left to the caller."""
    logits, labels = randn(TOKENS, VOCAB).detach(), labels_with([0, 5])
    valid = labels != -100
    loss, correct, grad = _losses_and_grad(logits.clone(), labels, valid, smoothing)
    ours = _sharded_losses_and_grad(logits, labels, valid, smoothing, Alone())
    torch.testing.assert_close(ours[0], loss)
    assert torch.equal(ours[1], correct)
    torch.testing.assert_close(ours[2][valid], grad[valid])
    assert ours[2].isfinite().all()
