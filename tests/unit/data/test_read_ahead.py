"""Reading ahead: in order, bounded, and without threads left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from internlm.data.read_ahead import read_ahead


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("internlm-data")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(read_ahead(lambda item: item * 2, range(50), workers)) == list(range(0, 100, 2))
    assert not data_threads()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_surfaces_at_its_item(workers: int) -> None:
    results = read_ahead(lambda item: 12 // (3 - item), range(10), workers)
    assert [next(results) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not data_threads()


def test_no_more_is_read_ahead_than_there_are_threads() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = read_ahead(lambda item: item, items(), 3)
    assert not taken
    for done in range(1, 5):
        next(results)
        assert len(taken) == done + 3
    results.close()


def test_it_is_done_by_other_threads() -> None:
    names = set(read_ahead(lambda _: threading.current_thread().name, range(20), 2))
    assert names <= {"internlm-data_0", "internlm-data_1"}


def test_threads_end_when_the_iterator_is_closed() -> None:
    results = read_ahead(lambda item: item, range(100), 3)
    next(results)
    assert data_threads()
    results.close()
    assert not data_threads()


def test_threads_end_when_the_iterator_is_dropped() -> None:
    results = read_ahead(lambda item: item, range(100), 3)
    next(results)
    del results
    gc.collect()
    assert not data_threads()
