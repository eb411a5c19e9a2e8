"""What ranks sent, against the formula. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internlm.config import Config
from internlm.core.parallel.ledger import Entry, summed
from internlm.train.traffic import expected_traffic
from internlm.verify.record import RankRecord


@dataclass(frozen=True)
class TrafficError:
    """A collective of a mode that a rank's ledger and the formula tell differently."""

    rank: int
    step: int
    """From 1."""
    mode: str
    collective: str
    counted: Entry
    expected: Entry

    def __str__(self) -> str:
        return (
            f"{self.collective} over {self.mode}, step {self.step}, rank {self.rank}: {self.counted.calls} calls of "
            f"{self.counted.sent} bytes in all, expected {self.expected.calls} of {self.expected.sent}"
        )


def compare_traffic(config: Config, records: Sequence[RankRecord]) -> list[TrafficError] | None:
    """Every difference between the ledgers and what ``config`` makes its ranks send; None where there is no formula for
    the model."""
    try:
        return [error for rank, record in enumerate(records) for error in _of_rank(config, rank, record, len(records))]
    except KeyError:
        return None


def _of_rank(config: Config, rank: int, record: RankRecord, world_size: int) -> list[TrafficError]:
    """Step by step; all steps together where parameters are gathered as the next step needs them."""
    place, errors = record.place, []
    steps = [
        expected_traffic(config, world_size, tokens, types=record.types, stage=place.stage, zero_rank=place.zero)
        for tokens in record.tokens
    ]
    pairs = list(zip(record.traffic, steps, strict=True))
    if config.hybrid_zero_optimizer.overlap_sync_param:
        pairs = [(summed(record.traffic), summed(steps))]
    for step, (counted, expected) in enumerate(pairs, 1):
        for mode, collective in sorted({*counted, *expected}, key=str):
            pair = (each.get((mode, collective), Entry()) for each in (counted, expected))
            error = TrafficError(rank, step, mode.value, collective, *pair)
            if error.counted != error.expected:
                errors.append(error)
    return errors
