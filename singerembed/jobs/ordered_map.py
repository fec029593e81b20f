"""Map in parallel, in the order of the items, with bounds on what is running and waiting."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    submit: Callable[[Item], Future[Result]],
    items: Iterable[Item],
    *,
    max_running: int,
    weight: Callable[[Result], int],
    max_waiting: int,
) -> Iterator[tuple[Item, Result]]:
    """Call `submit` for each item, and yield (item, result) in the order of the items.

    At most `max_running` calls run at a time; no new one starts while results of a weight above `max_waiting` wait for
    an earlier item. The first exception of a call is raised when its turn comes.
    """
    changed = threading.Condition()
    running, waiting = 0, 0
    queue: deque[tuple[Item, Future[Result]]] = deque()

    def finished(future: Future[Result]) -> None:
        nonlocal running, waiting
        with changed:
            running -= 1
            if not future.cancelled() and future.exception() is None:
                waiting += weight(future.result())
            changed.notify()

    def collect() -> tuple[Item, Result]:
        nonlocal waiting
        item, future = queue.popleft()
        result = future.result()
        with changed:
            waiting -= weight(result)
        return item, result

    def wait_for_head_or_room() -> bool:
        """Return whether the oldest item's result is there; if not, there is room for another call."""
        with changed:
            changed.wait_for(lambda: queue[0][1].done() or (running < max_running and waiting <= max_waiting))
        return queue[0][1].done()

    for item in items:
        while queue and wait_for_head_or_room():
            yield collect()
        with changed:
            running += 1
        future = submit(item)
        queue.append((item, future))
        future.add_done_callback(finished)
    while queue:
        queue[0][1].exception()  # waits
        yield collect()
