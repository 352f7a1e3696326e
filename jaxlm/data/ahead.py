"""Computes results ahead of their use, in other threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 4, threads: int = 1
) -> Iterator[Result]:
    """Yields `function(item)` for each item, in order.

    Args:
      function: the function.
      items: its arguments; they are read by the thread of the caller.
      ahead: number of results that are computed in advance.
      threads: number of threads that compute them.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
