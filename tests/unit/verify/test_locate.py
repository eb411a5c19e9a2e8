"""What the traffic of the layout that was given says beside the culprit."""

from __future__ import annotations

from internlm.core.parallel.ledger import Entry
from internlm.verify.compare import TrafficError
from internlm.verify.locate import wrong_groups


def _error(mode: str, counted: int, expected: int, *, rank: int = 0, collective: str = "all-reduce") -> TrafficError:
    return TrafficError(
        rank=rank, step=1, mode=mode, collective=collective, counted=Entry(counted), expected=Entry(expected)
    )


def test_calls_over_another_mode() -> None:
    errors = [
        _error(mode, *calls, rank=rank) for rank in (0, 1) for mode, calls in (("tensor", (6, 8)), ("data", (12, 10)))
    ]
    assert wrong_groups(errors) == ["2 calls of all-reduce are over data instead of tensor"]


def test_calls_that_are_only_missing_or_too_many() -> None:
    assert wrong_groups([_error("tensor", 6, 8)]) == []
    assert wrong_groups([_error("tensor", 6, 8), _error("data", 11, 10)]) == []
    assert wrong_groups([_error("tensor", 6, 8), _error("data", 12, 10, collective="all-gather")]) == []
    assert wrong_groups([_error("tensor", 6, 8), _error("data", 12, 10, rank=1)]) == []
