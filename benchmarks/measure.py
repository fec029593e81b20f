"""Measures rivals in turn, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Work = Callable[[], int]  # does some work and returns how many crops (or bytes, or operations) that was


@dataclass(frozen=True)
class Rate:
    """What one rival did, over several rounds."""

    median: float  # a second
    low: float
    high: float

    def text(self, unit: str = "") -> str:
        return f"{self.median:,.0f} ({self.low:,.0f} to {self.high:,.0f}){unit}"


def rate_of(work: Work, seconds: float, threads: int = 1) -> float:
    """What `threads` threads get done a second, calling `work` for `seconds`."""
    done = [0] * threads
    started = time.perf_counter()
    end = started + seconds

    def loop(i: int) -> None:
        while time.perf_counter() < end:
            done[i] += work()

    workers = [threading.Thread(target=loop, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - started)


def compare(rivals: Mapping[str, tuple[Work, int]], seconds: float, rounds: int) -> dict[str, Rate]:
    """Rates of `rivals`, a (work, threads) each: one warm-up, then `rounds` rounds in which each has `seconds`."""
    for work, _ in rivals.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, (work, threads) in rivals.items():
            rates[name].append(rate_of(work, seconds, threads))
    return {name: Rate(statistics.median(values), min(values), max(values)) for name, values in rates.items()}
