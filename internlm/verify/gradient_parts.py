"""Explanation of a reduced gradient by its parts: gradients of the micro-batches, and copies of several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from internlm.verify.record import Offsets, RankRecord, by_sample, index_of
from internlm.verify.relations import is_close, times

#: Relative difference up to which a combination of gradients counts as equal, in float64.
LIMIT = 1e-7


def explain_gradient(name: str, reference: RankRecord, ranks: Sequence[RankRecord]) -> str:
    """Return in words how the reduced gradient of a parameter differs; empty if no simple relation holds.

    Args:
        name: Logical name of the parameter.
        reference: Detailed record of one process.
        ranks: Record of each rank.
    """
    whole = next(iter(reference.gradients[name].slices.values())) if name in reference.gradients else None
    if whole is None or not any(name in record.gradients for record in ranks):
        return "" if whole is None else "no rank has it"
    return next(_explanations(name, whole, reference, ranks), "")


def _explanations(name: str, whole: Tensor, reference: RankRecord, ranks: Sequence[RankRecord]) -> Iterator[str]:
    if not whole.isfinite().all():
        yield "it is not finite on one process either"
    wrong = [(rank, at, v) for rank, at, v in _slices(name, ranks) if not is_close(v, whole[index_of(at, v)], LIMIT)]
    if wrong and all(not values.any() for _, _, values in wrong):
        yield f"it is zero on rank {_listed(rank for rank, _, _ in wrong)}"
    # Copies first: what one rank has may look like a multiple of the gradient by chance of a symmetric model.
    yield from _copies(name, whole, ranks)
    # In lower precision, factors near 1 are rounding.
    parts = _parts(name, reference, whole) if whole.dtype == torch.float64 else []
    data_ranks = len(by_sample(ranks))
    for rank, offsets, values in wrong[:1]:
        factors = _combination(values, [part[index_of(offsets, values)] for part in parts])
        if factors is not None:
            yield _in_words(factors, data_ranks, ranks[rank].coordinates.data, rank)
        elif parts:
            yield f"on rank {rank} it is no combination of the gradients of the micro-batches"


def _slices(name: str, ranks: Sequence[RankRecord]) -> Iterator[tuple[int, Offsets, Tensor]]:
    for rank, record in enumerate(ranks):
        if name in record.gradients:
            yield from ((rank, offsets, values) for offsets, values in record.gradients[name].slices.items())


def _copies(name: str, whole: Tensor, ranks: Sequence[RankRecord]) -> Iterator[str]:
    """Yield which sum is missing, if the copies of one slice on the ranks of a group add up to the gradient."""
    copies: dict[Offsets, dict[int, Tensor]] = {}
    for rank, offsets, values in _slices(name, ranks):
        copies.setdefault(offsets, {})[rank] = values
    for offsets, by_rank in copies.items():
        for mode, groups in _groups(ranks).items():
            held = [[by_rank[rank] for rank in group if rank in by_rank] for group in groups]
            # Groups of one rank add nothing, and neither do ranks that hold other slices, as shards of ZeRO are.
            held = [values for values in held if len(values) > 1]
            wanted = whole[index_of(offsets, next(iter(by_rank.values())))]
            sums = [torch.stack([v.double() for v in values]).sum(0) for values in held]
            if sums and all(is_close(s, wanted, LIMIT) for s in sums):
                same = all(is_close(v, values[0], LIMIT) for values in held for v in values[1:])
                action = f"averaged over {mode}" if same else f"not summed over {mode}"
                yield f"the copies of the {mode} ranks add up to it: it is {action}"


def _groups(ranks: Sequence[RankRecord]) -> Mapping[str, list[list[int]]]:
    """Return the ranks that differ in one coordinate only, by the mode of this coordinate."""
    groups: dict[str, dict[tuple[int, ...], list[int]]] = {"tensor": {}, "data": {}, "pipeline": {}}
    for rank, record in enumerate(ranks):
        at = record.coordinates
        groups["tensor"].setdefault((at.data, at.stage), []).append(rank)
        groups["data"].setdefault((at.tensor, at.stage), []).append(rank)
        groups["pipeline"].setdefault((at.data, at.tensor), []).append(rank)
    return {mode: list(by_others.values()) for mode, by_others in groups.items()}


def _parts(name: str, reference: RankRecord, whole: Tensor) -> list[Tensor]:
    """Return the gradient of each micro-batch of one process: differences of what it has accumulated."""
    # What has been accumulated when the next micro-batch begins contains the last one whole: one process has no
    # pipeline, so backward follows forward at once.
    steps = [each[name] for each in reference.details.accumulated if name in each] if reference.details else []
    ends = [*steps[1:], whole]
    return [end.double() - start.double() for start, end in zip(steps, ends, strict=True)]


def _combination(values: Tensor, parts: Sequence[Tensor]) -> list[float] | None:
    """Return the factors with which the sum of ``parts`` is ``values``; None if there are none, or many."""
    # Fewer elements than factors can be explained by any factors.
    if not parts or values.numel() < len(parts):
        return None
    matrix = torch.stack([part.flatten() for part in parts], 1)
    # Columns of equal norm, since micro-batches with few valid tokens have small gradients.
    scale = matrix.norm(dim=0).clamp(min=1e-300)
    wanted = values.double().flatten()[:, None]
    solved = torch.linalg.lstsq(matrix / scale, wanted, driver="gelsd").solution[:, 0] / scale
    factors: list[float] = solved.tolist()
    return factors if is_close(matrix @ solved, values.flatten(), LIMIT) else None


def _in_words(factors: Sequence[float], data_ranks: int, own: int, rank: int) -> str:
    """Say what the factors on the gradients of the micro-batches mean, which should all be 1."""
    count = len(factors) // data_ranks
    by_data = [factors[d * count : (d + 1) * count] for d in range(data_ranks)]
    if _equal(factors, [factors[0]] * len(factors)):
        return f"it is {times(factors[0], data_ranks, 'data')}"
    if _equal(factors, [float(d == own) for d in range(data_ranks) for _ in range(count)]):
        return f"rank {rank} has the gradients of its own micro-batches alone: a sum over data is missing"
    missing = [f"{m} of data rank {d}" for d in range(data_ranks) for m in range(count) if abs(by_data[d][m]) < 1e-6]
    if missing:
        return f"on rank {rank} it lacks micro-batch {', '.join(missing)}"
    if all(_equal(of_rank, [of_rank[0]] * count) for of_rank in by_data):
        weights = ", ".join(f"{of_rank[0]:.6g}" for of_rank in by_data)
        return f"the micro-batches of the data ranks are multiplied by {weights}"
    return f"the micro-batches are multiplied by {', '.join(f'{factor:.6g}' for factor in factors)}"


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) < 1e-5 * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


def _listed(ranks: Iterator[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(ranks)))
