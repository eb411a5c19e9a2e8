"""Cross entropy of next-token prediction, fused with the output projection or on given logits.

The logits of a micro-batch are its largest tensor by far: T · V elements, whereas other activations have T · H. The
fused version computes logits and their gradient chunk by chunk, so that the logits never exist as a whole and are
never recomputed (as in Liger Kernel, arXiv 2410.10989, section 3.2). Their gradient exists as a whole only if it is no
larger than what it replaces (:func:`keeps_dlogits`).

Shapes: T tokens, C tokens of one chunk, H hidden size, V vocabulary entries (for a shard: the rows of its weight).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm.accelerator import is_host
from internlm.ops import gemm
from internlm.utils.dtype import grad_dtype, wide

IGNORED = -100  # label of a token without a loss; the ignore_index of torch.nn.functional.cross_entropy
# Elements of one chunk's logits on the CPU: just below 32 MiB, from which on glibc maps fresh pages for every
# allocation, which costs as much as the softmax.
_CHUNK_ELEMENTS = 8_300_000


class TokenLoss(NamedTuple):
    """Loss of a batch of tokens, as a differentiable sum and per token."""

    loss_sum: Tensor  # scalar, differentiable: grad_scale * sum of the token losses
    token_loss: Tensor  # [T] detached, without grad_scale, 0 where the label is ignored
    correct: Tensor  # [T] bool, the label's logit is a maximum; False where the label is ignored


class VocabShard(Protocol):
    """Protocol for a vocabulary shard, with the two all-reduces that a sharded softmax needs."""

    first: int  # index of the first vocabulary entry of the shard
    columns: int  # vocabulary entries of the shard; further rows of the weight are padding
    total: int  # vocabulary entries of all shards, without padding

    def max_(self, x: Tensor) -> Tensor:
        """Take the elementwise maximum of ``x`` over the ranks by all-reduce, in place."""

    def sum_(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks by all-reduce, in place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOptions:
    """Options of :func:`linear_cross_entropy`."""

    label_smoothing: float = 0.0
    grad_scale: Tensor | float = 1.0  # factor of loss_sum and of all gradients; a scalar on the device, or a number
    chunk_tokens: int | None = None  # tokens of one chunk. None: default_chunk_tokens
    vocab: VocabShard | None = None  # shard of a vocabulary that is split over ranks
    main_grad: Tensor | None = None  # [V, H]; the gradient of the weight is added to it rather than returned
    adds: Callable[[], bool] = lambda: True  # called in backward; False: main_grad is overwritten rather than added to
    keeps_dlogits: bool | None = None  # save the gradient of the logits rather than the weight's. None: keeps_dlogits


DEFAULT_OPTIONS = LossOptions()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, options: LossOptions = DEFAULT_OPTIONS
) -> TokenLoss:
    """Compute the cross entropy of ``softmax(x @ weight.T)`` against ``labels``, as a sum and per token.

    If ``options.vocab`` is set, ``weight`` is this rank's shard, with the same number of rows on every rank. All other
    arguments and the result are the same on every rank. The gradient of ``x`` is then a partial sum, which the caller
    must sum over the ranks.

    Args:
        x: Hidden states, [T, H].
        weight: Output embedding, [V, H].
        labels: Labels, int64 [T]; :data:`IGNORED` tokens have no loss and no gradient.
        options: Smoothing, scale, chunk size, vocabulary shard and gradient buffer.

    Returns:
        ``loss_sum`` (differentiable scalar, scaled by ``options.grad_scale``), ``token_loss`` and ``correct`` (each
        [T]).
    """
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()  # else needs_input_grad is True and gradients are computed
    if not is_host(x):  # counting ignored tokens would need a host sync
        return TokenLoss(*_LinearCrossEntropy.apply(x, weight, labels, options))
    # On the CPU the GEMMs dominate, so tokens without a loss (padding, prompts) are left out.
    (kept,) = torch.where(labels != IGNORED)
    if len(kept) == len(labels):
        return TokenLoss(*_LinearCrossEntropy.apply(x, weight, labels, options))
    loss_sum, *by_token = _LinearCrossEntropy.apply(x.index_select(0, kept), weight, labels[kept], options)
    return TokenLoss(loss_sum, *(y.new_zeros(len(labels)).index_copy_(0, kept, y) for y in by_token))


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, grad_scale: Tensor | float = 1.0
) -> TokenLoss:
    """Compute the cross entropy of ``softmax(logits)`` against ``labels``, as a sum and per token.

    Args:
        logits: Logits, [T, V].
        labels: Labels, int64 [T]; :data:`IGNORED` tokens have no loss and no gradient.
        label_smoothing: Probability mass of the target that is spread evenly over the vocabulary.
        grad_scale: Factor that scales ``loss_sum`` and the gradient; a scalar on the device, or a number.

    Returns:
        ``loss_sum`` (differentiable scalar, scaled by ``grad_scale``), ``token_loss`` and ``correct`` (each [T]).
    """
    return TokenLoss(*_CrossEntropy.apply(logits, labels, label_smoothing, grad_scale))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, options: LossOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses_and_grad: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
            _losses_and_grad if options.vocab is None else partial(_sharded_losses_and_grad, vocab=options.vocab)
        )
        chunk = options.chunk_tokens or default_chunk_tokens(is_host(x), weight.shape[0])
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        keeps = options.keeps_dlogits
        if keeps is None:
            keeps = keeps_dlogits(is_host(x), x.dtype, len(x), *weight.shape)
        token_loss = x.new_empty(len(x), dtype=wide(x.dtype))
        correct = torch.empty_like(labels, dtype=torch.bool)
        grad_scale = _scalar(options.grad_scale, token_loss.dtype)
        kept = x.new_empty(len(x), len(weight)) if keeps and wants_weight else None  # [T, V]
        dx = torch.empty_like(x) if wants_x and kept is None else None  # [T, H]
        # Accumulated over chunks in at least fp32, or small contributions would be lost; and transposed, [H, V], so
        # that no chunk needs a transposed copy of the logits.
        sum_dtype = wide((weight if options.main_grad is None else options.main_grad).dtype)
        dweight = weight.new_empty(weight.shape[::-1], dtype=sum_dtype) if wants_weight and kept is None else None
        if dweight is not None and not len(x):
            dweight.zero_()
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            valid = labels[rows] != IGNORED
            logits = gemm.linear(x[rows], weight, token_loss.dtype)  # [C, V]
            token_loss[rows], correct[rows], dlogits = losses_and_grad(
                logits, labels[rows], valid, options.label_smoothing
            )
            del logits  # before the products, which need the gradient in the dtype of x only
            if kept is not None:  # the factor is applied before rounding, and zeroes ignored rows
                torch.mul(dlogits, (valid * grad_scale)[:, None], out=kept[rows])
            else:
                dlogits = dlogits.to(x.dtype)
            # Ignored rows are zeroed in [C, H] products rather than in dlogits, which is V / H times as large.
            if dx is not None:
                torch.mul(gemm.grad_input(dlogits, weight), valid[:, None], out=dx[rows])
            if dweight is not None:
                gemm.accumulate_grad_weight(dweight, x[rows] * valid[:, None], dlogits, accumulate=start > 0)
            del dlogits  # before the logits of the next chunk exist
        if kept is not None and wants_x:
            dx = gemm.grad_input(kept, weight)  # here, because a gathered weight is released before backward
        ctx.save_for_backward(dx, dweight, kept, None if kept is None else x)
        ctx.main_grad, ctx.adds, ctx.dtype = options.main_grad, options.adds, grad_dtype(weight)
        ctx.grad_scale, ctx.shape = grad_scale, weight.shape
        ctx.mark_non_differentiable(token_loss, correct)
        return token_loss.sum() * grad_scale, token_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, weight_sum, dlogits, x = ctx.saved_tensors
        # The scale of sums is applied last: multiplied into dlogits it could overflow or underflow in fp16.
        factor = dloss if dlogits is not None else dloss * ctx.grad_scale
        if dx is not None:
            dx = _times(dx, factor)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        dweight, adds = ctx.main_grad, ctx.main_grad is not None and ctx.adds()
        if dweight is None:
            dweight = torch.empty(ctx.shape, dtype=ctx.dtype, device=dloss.device)
        if dlogits is not None:
            gemm.accumulate_grad_weight(dweight, dlogits, _times(x, factor), adds)
        elif adds:
            dweight.addcmul_(weight_sum.t(), factor.to(weight_sum.dtype))
        else:
            torch.mul(weight_sum.t(), factor.to(weight_sum.dtype), out=dweight)
        return dx, dweight if ctx.main_grad is None else None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, grad_scale: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid = labels != IGNORED
        own = logits.to(wide(logits.dtype), copy=True)  # overwritten below; the caller keeps its logits
        token_loss, correct, dlogits = _losses_and_grad(own, labels, valid, smoothing)
        ctx.save_for_backward(dlogits.to(logits.dtype), valid)
        ctx.grad_scale = _scalar(grad_scale, token_loss.dtype)
        ctx.mark_non_differentiable(token_loss, correct)
        return token_loss.sum() * ctx.grad_scale, token_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dlogits, valid = ctx.saved_tensors
        factor = dloss * ctx.grad_scale * valid[:, None]
        return (dlogits.to(factor.dtype) * factor).to(dlogits.dtype), None, None, None


def _losses_and_grad(logits: Tensor, labels: Tensor, valid: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute token losses, correct predictions, and the gradient of the summed loss with respect to the logits.

    With smoothing s the target is 1 - s at the label plus s / V everywhere (Szegedy et al. 2016, arXiv 1512.00567,
    section 7), so the loss is logsumexp - (1 - s) · label logit - s · mean logit, and its gradient is softmax - target.

    Args:
        logits: Logits, [C, V]; overwritten.
        labels: Labels, [C].
        valid: Mask of the tokens that have a loss, [C]. All others get loss 0 and an undefined gradient.
        smoothing: Label smoothing s.

    Returns:
        Losses [C], correct predictions (bool [C]) and gradient [C, V], which reuses the memory of ``logits``.
    """
    targets = labels.where(valid, 0)[:, None]
    label_logit = logits.gather(1, targets).squeeze(1)
    # A second pass over the probabilities would cost a device more than an index does; on the CPU it is faster.
    top, index = (logits.amax(1), None) if is_host(logits) else logits.max(1)
    wanted = label_logit if not smoothing else torch.lerp(label_logit, logits.mean(1), smoothing)
    probs = torch.softmax(logits, 1, out=logits)
    # The largest probability is exp(top - logsumexp), and at least 1 / V: stable, and one pass over [C, V] less.
    top_prob = probs.amax(1) if index is None else probs.gather(1, index[:, None]).squeeze(1)
    logsumexp = top - top_prob.log()
    if smoothing:
        probs.sub_(smoothing / probs.shape[1])
    probs.scatter_add_(1, targets, probs.new_full(targets.shape, smoothing - 1))
    return (logsumexp - wanted).where(valid, 0.0), (label_logit >= top) & valid, probs


def _sharded_losses_and_grad(
    logits: Tensor, labels: Tensor, valid: Tensor, smoothing: float, vocab: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute token losses and the logit gradient with the vocabulary split over ranks (arXiv 1909.08053, sec. 3).

    Like :func:`_losses_and_grad`, but ``logits`` and their gradient cover only this rank's shard. There are two
    all-reduces, of [C] and of at most [3, C] elements. They do not depend on the labels, so all ranks call the same
    collectives.
    """
    local = labels - vocab.first
    # True on the rank that owns the label's entry; False on all ranks for an ignored label, which is negative.
    held = (local >= 0) & (local < vocab.columns)
    targets = local.where(held, 0)[:, None]
    real = logits[:, : vocab.columns]
    logits[:, vocab.columns :] = -torch.inf  # padding has no probability
    top = vocab.max_(logits.amax(1))  # over all shards: no exponential overflows, one common scale
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


def default_chunk_tokens(on_host: bool, rows: int) -> int:
    """Return the default number of tokens per chunk for a weight of ``rows`` rows, on the CPU or on a device."""
    if not on_host:
        return 2048
    # Multiples of 64, for which oneDNN has cached kernels; its GEMMs are slow below 128.
    return min(512, max(128, _CHUNK_ELEMENTS // rows // 64 * 64))


def keeps_dlogits(on_host: bool, dtype: torch.dtype, tokens: int, rows: int, hidden: int) -> bool:
    """Return whether the loss saves the gradient of its logits for backward, rather than that of the weight.

    It does on a device if that takes no more memory. One product then adds the gradient of the weight to the main
    gradient, instead of one for each chunk that adds to a sum in fp32.

    Args:
        on_host: Whether the tensors are on the CPU, where chunks are so small that they stay in its caches.
        dtype: Dtype of hidden states and weight. The range of fp16 is too small for a gradient that is already scaled.
        tokens: Number of tokens.
        rows: Number of rows of the weight.
        hidden: Hidden size.
    """
    if on_host or dtype == torch.float16:
        return False
    # With the gradient of the weight, that of a chunk's logits exists beside it; with that of the logits, x is saved.
    chunk = min(default_chunk_tokens(on_host, rows), tokens)
    kept, weight_sum = tokens * (rows + hidden) * dtype.itemsize, rows * hidden * wide(dtype).itemsize
    return kept <= weight_sum + chunk * rows * dtype.itemsize


def _scalar(scale: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Convert a scalar tensor to ``dtype``, in which a number would be applied too."""
    return scale.to(dtype) if isinstance(scale, Tensor) else scale


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``x`` by a scalar that may be wider, and which may overflow in half precision; round once."""
    # A tensor of two dimensions decides in which dtype to multiply; a scalar would be rounded to that of x.
    return torch.mul(x, factor.view(1, 1), out=torch.empty_like(x))
