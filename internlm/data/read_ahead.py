"""Calls of a function ahead of when their results are needed, by threads or processes, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Call ``work`` in ``pool`` for each item, and yield the results in the order of ``items``.

    An exception that ``work`` raises for an item is re-raised after the results of all earlier items.

    Args:
        pool: Executor that runs ``work``.
        work: Function that is called with one item at a time.
        items: Finite or infinite iterable of items.
        ahead: Maximum number of items that are submitted before their results are needed.
    """
    remaining = iter(items)
    # `Executor.map` would submit all items at once; `items` may be endless, and results may be large.
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
    """Yield ``work(item)`` for each item, in order, prefetched by ``workers`` threads (0: no prefetching).

    The threads stop when the iterator is exhausted, closed or garbage-collected, or when ``work`` raises an exception.
    """
    if not workers:
        yield from map(work, items)
        return
    # Threads rather than processes: parsing a row takes about a millisecond, and threads need no second copy of torch.
    with ThreadPoolExecutor(workers, thread_name_prefix="internlm-data") as pool:
        yield from in_order(pool, work, items, ahead=workers)
