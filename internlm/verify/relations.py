"""Relations between the tensors that several ranks hold and the tensor of one process that they stand for.

:func:`relate` says whether they agree; :func:`explain` says in words how they differ, by trying what a missing, doubled
or misdirected collective would leave behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import permutations

import torch
from torch import Tensor

from internlm.verify.tensors import join_shards


class Relation(Enum):
    """Relation of the tensors of a tensor group to the reference."""

    EQUAL = "equal"  # each has all of it, or they are its shards, in order
    PARTIAL = "partial"  # their sum is equal
    DIFFERENT = "different"
    UNKNOWN = "unknown"  # shapes that do not fit


def is_close(tensor: Tensor, reference: Tensor, limit: float, floor: float = 0.0) -> bool:
    """Return whether ‖tensor − reference‖ ≤ limit · max(‖reference‖, floor), or all values are the same.

    Args:
        tensor: Tensor to compare.
        reference: Tensor to compare with.
        limit: Largest relative difference in the L2 norm.
        floor: Norm below which a tensor is taken for rounding of larger ones.
    """
    if tensor.shape != reference.shape:
        return False
    # In fp64: norms of half-precision tensors overflow, and whole numbers have none.
    a, b = tensor.double(), reference.double()
    if torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()):
        return True
    return (a - b).norm().item() <= limit * max(b.norm().item(), floor)


def relate(shards: Sequence[Tensor], reference: Tensor, limit: float, floor: float = 0.0) -> Relation:
    """Return the relation of ``shards``, one per rank of a tensor group in its order, to ``reference``.

    Args:
        shards: Tensor of each rank.
        reference: Tensor of one process.
        limit: Largest relative difference of tensors that count as equal.
        floor: See :func:`is_close`.
    """
    wholes = join_shards(shards, reference.shape)
    if not wholes:
        return Relation.UNKNOWN
    if all(is_close(whole, reference, limit, floor) for whole in wholes):
        return Relation.EQUAL
    if _is_partial(shards, reference, limit, floor):
        return Relation.PARTIAL
    return Relation.DIFFERENT


def _is_partial(shards: Sequence[Tensor], reference: Tensor, limit: float, floor: float = 0.0) -> bool:
    if len(shards) < 2 or not reference.is_floating_point() or any(s.shape != reference.shape for s in shards):
        return False
    # The sum over ranks is computed here in another order than a collective would, hence the wider limit.
    return is_close(torch.stack([shard.double() for shard in shards]).sum(0), reference, limit * 10, floor)


def explain(shards: Sequence[Tensor], reference: Tensor, others: Sequence[tuple[str, Tensor]], limit: float) -> str:
    """Return in words how ``shards`` differ from ``reference``; empty if no simple relation holds.

    Args:
        shards: Tensor of each rank of a tensor group, in its order.
        reference: Tensor of one process.
        others: Names and tensors of the reference at the same place in other micro-batches.
        limit: Largest relative difference of tensors that count as equal.
    """
    return next(_explanations(shards, reference, others, widened(limit)), "")


def widened(limit: float) -> float:
    """Return the limit of tensors that are added or scaled before they are compared, which rounds them once more."""
    # A limit of half precision is not widened: near 1, any relation would seem to hold.
    return max(limit, min(100 * limit, 1e-4))


def _explanations(
    shards: Sequence[Tensor], reference: Tensor, others: Sequence[tuple[str, Tensor]], limit: float
) -> Iterator[str]:
    ranks = len(shards)
    if any(shard.is_floating_point() and not shard.isfinite().all() for shard in shards):
        bad = [rank for rank, shard in enumerate(shards) if not shard.isfinite().all()]
        yield f"not finite on {_tensor_ranks(bad)}"
    # Copies that add up to it are averages: what is missing is not a sum but a factor.
    copies = all(is_close(shard, shards[0], limit) for shard in shards)
    if _is_partial(shards, reference, limit) and not copies:
        yield f"each of {ranks} tensor ranks has a part of the sum: an all-reduce over tensor is missing"
    wholes = join_shards(shards, reference.shape)
    # Before factors: a tensor of another micro-batch may be nearly parallel to this one.
    for name, other in others:
        if wholes and all(is_close(whole, other, limit) for whole in wholes):
            yield f"it is that of {name}"
    factors = [factor_of(whole, reference, limit) for whole in wholes]
    if factors and all(factor is not None for factor in factors):
        yield _in_words([factor for factor in factors if factor is not None], ranks)
    yield from _explain_order(shards, reference, limit)
    equal = [rank for rank, whole in enumerate(wholes) if is_close(whole, reference, limit)]
    if len(wholes) == ranks > 1 and equal:
        differing = [rank for rank in range(ranks) if rank not in equal]
        yield f"{_tensor_ranks(differing, 'differ')}, {_tensor_ranks(equal, 'agree')}"


def factor_of(tensor: Tensor, reference: Tensor, limit: float) -> float | None:
    """Return c if tensor = c · reference within ``limit``, else None."""
    a, b = tensor.double().flatten(), reference.double().flatten()
    square = torch.dot(b, b).item()
    if a.shape != b.shape or not square:
        return None
    # The factor of least squares; whether it is one of all elements is checked below.
    factor = torch.dot(a, b).item() / square
    return factor if factor and is_close(a, factor * b, limit) else None


def _in_words(factors: Sequence[float], ranks: int) -> str:
    first = factors[0]
    if any(abs(factor - first) > 1e-6 * abs(first) for factor in factors):
        return f"it is multiplied by {', '.join(f'{factor:.6g}' for factor in factors)} on the tensor ranks"
    return f"it is {times(first, ranks, 'tensor')}"


def times(factor: float, ranks: int, mode: str) -> str:
    """Describe a factor on what should be a sum over ``ranks`` ranks of ``mode``."""
    text = f"multiplied by {factor:.6g}"
    if ranks > 1 and abs(factor - ranks) < 1e-6 * ranks:
        return f"{text}, the size of the {mode} group, as if what every rank has were summed over {mode} again"
    if ranks > 1 and abs(factor * ranks - 1) < 1e-6:
        return f"{text}, one by the size of the {mode} group, as if it were averaged over {mode}"
    return text


def _explain_order(shards: Sequence[Tensor], reference: Tensor, limit: float) -> Iterator[str]:
    """Yield how shards are exchanged, or which of them every rank has."""
    ranks, axes = len(shards), [a for a in range(reference.dim()) if shards[0].dim() == reference.dim()]
    for axis in (axis for axis in axes if shards[0].shape[axis] * ranks == reference.shape[axis]):
        wanted = reference.chunk(ranks, axis)
        # Slices of which several ranks have the same cannot be found by reordering.
        found = [next((i for i, w in enumerate(wanted) if is_close(s, w, limit)), None) for s in shards]
        if None not in found:
            yield f"the tensor ranks have slices {found} of axis {axis}: they are sent to the wrong ranks"
        # Of more ranks there are too many orders, and a smaller layout mostly has the same mistake.
        if ranks <= 4:
            for order in permutations(range(ranks)):
                if is_close(torch.cat([shards[i] for i in order], axis), reference, limit):
                    yield f"the slices of axis {axis} are in the order {list(order)}"


def _tensor_ranks(ranks: Sequence[int], verb: str = "") -> str:
    several = len(ranks) > 1
    text = f"tensor rank{'s' * several} {', '.join(map(str, ranks))}"
    return f"{text} {verb}{'s' * (not several)}" if verb else text
