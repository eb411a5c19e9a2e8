"""Cross entropy of next-token prediction, with the output projection and without.

Shapes: T tokens, H hidden, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.ops import gemm

IGNORED = -100  # the label of a token that takes no part in the loss
_CHUNK_ELEMENTS = 4 * 1024 * 1024  # of one chunk's logits


class TokenLoss(NamedTuple):
    """The loss of some tokens, as a sum to differentiate and token by token."""

    loss_sum: Tensor  # scalar, differentiable: grad_scale * sum of the token losses
    token_loss: Tensor  # [T] detached, 0 where the label is ignored
    correct: Tensor  # [T] bool, whether no logit exceeds the label's; False where the label is ignored


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
    grad_scale: float = 1.0,
) -> TokenLoss:
    """Cross entropy of ``softmax(x @ weight.T)`` against ``labels``: [T, H], [V, H], int64 [T].

    The logits exist for ``chunk_tokens`` tokens at a time. Where gradients are wanted they are made in the forward pass, chunk by
    chunk, so that no logits are computed twice. A weight with an attribute ``main_grad`` has its gradient added there.
    """
    if chunk_tokens is None:
        chunk_tokens = max(128, _CHUNK_ELEMENTS // weight.shape[0])
    return TokenLoss(*_LinearCrossEntropy.apply(x, weight, labels, label_smoothing, chunk_tokens, grad_scale))


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, grad_scale: float = 1.0
) -> TokenLoss:
    """Cross entropy of ``softmax(logits)`` against ``labels``: [T, V], int64 [T]."""
    return TokenLoss(*_CrossEntropy.apply(logits, labels, label_smoothing, grad_scale))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, smoothing: float, chunk: int, grad_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if wants_x else None
        dweight = _weight_scratch(weight) if wants_weight else None
        losses, hits = [], []
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = gemm.linear(x[rows], weight)
            loss, correct = _token_loss(logits, labels[rows], smoothing)
            losses.append(loss)
            hits.append(correct)
            if wants_x or wants_weight:
                dlogits = _grad_logits(logits, labels[rows], smoothing)
            if dx is not None:
                dx[rows] = gemm.grad_input(dlogits, weight)
            if dweight is not None:
                gemm.accumulate_grad_weight(dweight, dlogits, x[rows], accumulate=start > 0)
        token_loss, correct = torch.cat(losses), torch.cat(hits)
        ctx.save_for_backward(dx, dweight)
        ctx.weight, ctx.grad_scale = weight, grad_scale
        ctx.mark_non_differentiable(token_loss, correct)
        return token_loss.sum() * grad_scale, token_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        factor = dloss * ctx.grad_scale
        if dx is not None:
            dx = dx * factor.to(dx.dtype)
        if dweight is not None:
            dweight = _deliver(dweight, factor, ctx.weight)
        return dx, dweight, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, grad_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        token_loss, correct = _token_loss(logits, labels, smoothing)
        ctx.save_for_backward(logits, labels)
        ctx.smoothing, ctx.grad_scale = smoothing, grad_scale
        ctx.mark_non_differentiable(token_loss, correct)
        return token_loss.sum() * grad_scale, token_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        dlogits = _grad_logits(logits, labels, ctx.smoothing)
        return dlogits * (dloss * ctx.grad_scale).to(logits.dtype), None, None, None


def _token_loss(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Loss and correctness of each token: [C, V], [C] -> [C], bool [C]. Half-precision logits are summed in fp32."""
    logits = _widen(logits)
    valid = labels != IGNORED
    label_logit = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    lse = logits.logsumexp(1)
    loss = lse - label_logit
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (lse - logits.mean(1))
    correct = label_logit >= logits.amax(1)
    return loss.masked_fill(~valid, 0.0), correct & valid


def _grad_logits(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Gradient of the sum of token losses for the logits: [C, V], [C] -> [C, V]."""
    vocab = logits.shape[1]
    grad = torch.softmax(_widen(logits), 1)
    if smoothing:
        grad -= smoothing / vocab
    valid = (labels != IGNORED)[:, None]
    grad.scatter_add_(1, labels.clamp(min=0)[:, None], grad.new_full(valid.shape, smoothing - 1))
    return grad.mul_(valid).to(logits.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _weight_scratch(weight: Tensor) -> Tensor:
    main_grad = getattr(weight, "main_grad", None)
    dtype = weight.dtype if main_grad is None else main_grad.dtype
    return torch.zeros_like(weight, dtype=dtype)


def _deliver(dweight: Tensor, factor: Tensor, weight: Tensor) -> Tensor | None:
    """Add the gradient to ``weight.main_grad`` where there is one, else return it for autograd."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return dweight * factor.to(dweight.dtype)
    main_grad.addcmul_(dweight, factor.to(dweight.dtype))
    return None
