"""The ordered map."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from singerembed.jobs.ordered_map import ordered_map


@pytest.mark.parametrize("seed", range(5))
def test_ordered_map_keeps_order_and_bounds(seed: int) -> None:
    rng = random.Random(seed)
    delays = [rng.choice([0, 0, 0.001, 0.01]) for _ in range(200)]
    running, most_running, started, most_ahead, taken = 0, 0, 0, 0, 0
    lock = threading.Lock()

    def work(i: int) -> int:
        nonlocal running, most_running, started, most_ahead
        with lock:
            running += 1
            started += 1
            most_running = max(most_running, running)
            most_ahead = max(most_ahead, started - taken)
        time.sleep(delays[i])
        with lock:
            running -= 1
        return i * i

    with ThreadPoolExecutor(16) as pool:
        results = ordered_map(
            lambda i: pool.submit(work, i), range(200), max_running=5, weight=lambda _: 1, max_waiting=10
        )
        for i, (item, result) in enumerate(results):
            taken += 1
            assert (item, result) == (i, i * i)
    assert most_running <= 5
    assert most_ahead <= 10 + 5 + 1


def test_ordered_map_raises_in_its_turn() -> None:
    def work(i: int) -> int:
        if i == 3:
            raise KeyError(i)
        return i

    seen = []
    with ThreadPoolExecutor(4) as pool, pytest.raises(KeyError):
        for item, _ in ordered_map(
            lambda i: pool.submit(work, i), range(100), max_running=4, weight=lambda _: 1, max_waiting=5
        ):
            seen.append(item)
    assert seen == [0, 1, 2]
