"""Work done ahead, handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """``map(work, items)`` by a pool, up to ``ahead`` items early. An error surfaces at its item."""
    remaining = iter(items)
    pending: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(remaining, ahead))
    try:
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()


def read_ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map(work, items)`` by that many threads, in order; by the caller where ``workers`` is 0.

    The threads end with the iterator: when it is exhausted, closed or garbage-collected, or when an item fails.
    """
    if not workers:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="internlm-data") as pool:
        yield from in_order(pool, work, items, ahead=workers)
