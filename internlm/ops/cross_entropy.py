"""Cross entropy of next-token prediction, with the output projection and without.

Shapes: T tokens, H hidden, V vocabulary (of a shard: the rows of its weight), C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.ops import gemm
from internlm.utils.dtype import grad_dtype, wide

IGNORED = -100  # the label of a token that takes no part in the loss
# Of one chunk's logits on CPU: just below the 32 MiB from which glibc maps fresh pages for every allocation.
_CHUNK_ELEMENTS = 8_300_000


class TokenLoss(NamedTuple):
    """The loss of some tokens, as a sum to differentiate and token by token."""

    loss_sum: Tensor  # scalar, differentiable: grad_scale * sum of the token losses
    token_loss: Tensor  # [T] detached, without grad_scale, 0 where the label is ignored
    correct: Tensor  # [T] bool, whether no logit exceeds the label's; False where the label is ignored


class VocabShard(Protocol):
    """The part of the vocabulary that this rank holds."""

    first: int  # number of its first token
    columns: int  # tokens of it; the weight may have more rows, which are padding
    total: int  # the whole vocabulary, without padding

    def max_(self, x: Tensor) -> Tensor:
        """The largest value over the ranks, element by element, in place."""

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
    grad_scale: float = 1.0,
    vocab: VocabShard | None = None,
    main_grad: Tensor | None = None,
) -> TokenLoss:
    """Cross entropy of ``softmax(x @ weight.T)`` against ``labels``: [T, H], [V, H], int64 [T].

    The logits exist for ``chunk_tokens`` tokens at a time. Gradients, where wanted, are made in the forward pass, so
    that no logits are computed twice. If ``main_grad`` is given, the gradient of ``weight`` is added to it.

    With ``vocab`` the vocabulary is split over ranks: ``weight`` holds this rank's rows, as many on every rank. All
    other arguments are the same on every rank, and so is the result; the gradient for ``x`` is to be summed over them.
    """
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(x.device.type, weight.shape[0])
    options = (label_smoothing, chunk_tokens, grad_scale, vocab, main_grad)
    if x.device.type != "cpu":  # to count the ignored tokens would make the device wait
        return TokenLoss(*_LinearCrossEntropy.apply(x, weight, labels, *options))
    (kept,) = torch.where(labels != IGNORED)
    if len(kept) == len(labels):
        return TokenLoss(*_LinearCrossEntropy.apply(x, weight, labels, *options))
    loss_sum, *by_token = _LinearCrossEntropy.apply(x.index_select(0, kept), weight, labels[kept], *options)
    return TokenLoss(loss_sum, *(y.new_zeros(len(labels)).index_copy_(0, kept, y) for y in by_token))


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, grad_scale: float = 1.0
) -> TokenLoss:
    """Cross entropy of ``softmax(logits)`` against ``labels``: [T, V], int64 [T]."""
    return TokenLoss(*_CrossEntropy.apply(logits, labels, label_smoothing, grad_scale))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        smoothing: float,
        chunk: int,
        grad_scale: float,
        vocab: VocabShard | None,
        main_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses_and_grad: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
            _losses_and_grad if vocab is None else partial(_sharded_losses_and_grad, vocab=vocab)
        )
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if wants_x else None
        # Transposed, for then the sum over chunks needs no transposed copy of the logits.
        sum_dtype = wide((weight if main_grad is None else main_grad).dtype)
        dweight = weight.new_zeros(weight.shape[::-1], dtype=sum_dtype) if wants_weight else None
        token_loss = x.new_empty(len(x), dtype=wide(x.dtype))
        correct = torch.empty_like(labels, dtype=torch.bool)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            valid = labels[rows] != IGNORED
            logits = gemm.linear(x[rows], weight).to(token_loss.dtype)
            token_loss[rows], correct[rows], dlogits = losses_and_grad(logits, labels[rows], valid, smoothing)
            dlogits = dlogits.to(x.dtype)
            if dx is not None:
                torch.mul(gemm.grad_input(dlogits, weight), valid[:, None], out=dx[rows])
            if dweight is not None:
                gemm.accumulate_grad_weight(dweight, x[rows] * valid[:, None], dlogits)
        ctx.save_for_backward(dx, dweight)
        ctx.main_grad, ctx.dtype, ctx.grad_scale = main_grad, grad_dtype(weight), grad_scale
        ctx.mark_non_differentiable(token_loss, correct)
        return token_loss.sum() * grad_scale, token_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        factor = dloss * ctx.grad_scale
        if dx is not None:
            dx = (dx.to(factor.dtype) * factor).to(dx.dtype)  # the factor may exceed what half precision holds
        if dweight is not None:
            dweight = _deliver(dweight.t(), factor, ctx.main_grad, ctx.dtype)
        return dx, dweight, None, None, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, grad_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid = labels != IGNORED
        own = logits.to(wide(logits.dtype), copy=True)
        token_loss, correct, dlogits = _losses_and_grad(own, labels, valid, smoothing)
        ctx.save_for_backward(dlogits.to(logits.dtype), valid)
        ctx.grad_scale = grad_scale
        ctx.mark_non_differentiable(token_loss, correct)
        return token_loss.sum() * grad_scale, token_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dlogits, valid = ctx.saved_tensors
        factor = dloss * ctx.grad_scale * valid[:, None]
        return (dlogits.to(factor.dtype) * factor).to(dlogits.dtype), None, None, None


def _losses_and_grad(logits: Tensor, labels: Tensor, valid: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, correctness and the gradient of the sum of losses for the logits, which are overwritten.

    Shapes: [C, V], [C], [C] -> [C], [C], [C, V]. In rows that are not valid the gradient means nothing. With
    smoothing s the target is 1 - s at the label plus s / V everywhere (Szegedy et al. 2016, section 7).
    """
    targets = labels.where(valid, 0)[:, None]
    label_logit, top = logits.gather(1, targets).squeeze(1), logits.amax(1)
    wanted = label_logit if not smoothing else torch.lerp(label_logit, logits.mean(1), smoothing)
    probs = torch.softmax(logits, 1, out=logits)
    logsumexp = top - probs.amax(1).log()  # the largest logit less the logarithm of its probability
    if smoothing:
        probs.sub_(smoothing / probs.shape[1])
    probs.scatter_add_(1, targets, probs.new_full(targets.shape, smoothing - 1))
    return (logsumexp - wanted).where(valid, 0.0), (label_logit >= top) & valid, probs


def _sharded_losses_and_grad(
    logits: Tensor, labels: Tensor, valid: Tensor, smoothing: float, vocab: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_losses_and_grad` of the logits of one shard (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

    Shapes: [C, V], [C], [C] -> [C], [C], [C, V]. Two collectives whatever the labels, so that the ranks keep in step.
    """
    local = labels - vocab.first
    held = (local >= 0) & (local < vocab.columns)  # of no ignored label, which is negative
    targets = local.where(held, 0)[:, None]
    real = logits[:, : vocab.columns]
    logits[:, vocab.columns :] = -torch.inf
    top = vocab.max_(logits.amax(1))
    sums = [logits.gather(1, targets).squeeze(1).where(held, 0.0)]
    if smoothing:
        sums.append(real.sum(1))
    probs = logits.sub_(top[:, None]).exp_()
    sum_exp, label_logit, *logit_sum = vocab.sum_(torch.stack([probs.sum(1), *sums]))
    wanted = label_logit if not smoothing else torch.lerp(label_logit, logit_sum[0] / vocab.total, smoothing)
    probs.div_(sum_exp[:, None])
    if smoothing:
        real.sub_(smoothing / vocab.total)
    probs.scatter_add_(1, targets, held[:, None].to(probs.dtype).mul_(smoothing - 1))
    return (top + sum_exp.log() - wanted).where(valid, 0.0), (label_logit >= top) & valid, probs


def default_chunk_tokens(device_type: str, rows: int) -> int:
    """Tokens of one chunk, for a weight of ``rows`` rows."""
    if device_type != "cpu":
        return 2048
    return min(512, max(128, _CHUNK_ELEMENTS // rows // 64 * 64))


def _deliver(dweight: Tensor, factor: Tensor, main_grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Add ``factor`` times the gradient to ``main_grad``, or return it if there is none."""
    factor = factor.to(dweight.dtype)
    if main_grad is None:
        return torch.mul(dweight, factor, out=torch.empty(dweight.shape, dtype=dtype, device=dweight.device))
    main_grad.addcmul_(dweight, factor)
    return None
