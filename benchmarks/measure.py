"""Measures implementations in turn, so that noise of the machine affects all of them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Work = Callable[[], int]  # does some work and returns its amount, in crops, bytes or operations


@dataclass(frozen=True)
class Rate:
    """The rate of one implementation over several rounds."""

    median: float  # per second
    low: float
    high: float

    def text(self, unit: str = "") -> str:
        spread = "" if self.low == self.high else f" ({self.low:,.0f} to {self.high:,.0f})"  # none of one round
        return f"{self.median:,.0f}{spread}{unit}"


def print_table(title: str, rates: Mapping[str, Rate], ours: str, unit: str) -> None:
    """Print a Markdown table of `rates`, and how many times as fast as each the one named `ours` is."""
    print(f"\n## {title}\n\n| | {unit} | {ours} is faster by |\n| --- | --- | --- |")
    for name, rate in rates.items():
        print(f"| {name} | {rate.text()} | {rates[ours].median / rate.median:.2f} |")


def rate_of(work: Work, seconds: float, threads: int = 1) -> float:
    """Return the work per second of `threads` threads that call `work` for `seconds`."""
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


def processor_seconds(work: Callable[[], object], calls: int) -> float:
    """Return the median processor time of `calls` calls of `work`, of all threads of this process.

    On a busy machine it says more than the clock.
    """
    found = []
    for _ in range(calls):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return statistics.median(found)


def compare(rivals: Mapping[str, tuple[Work, int]], seconds: float, rounds: int) -> dict[str, Rate]:
    """Return the rates of `rivals`, (work, threads) each: a warm-up, then `rounds` rounds of `seconds` for each."""
    for work, _ in rivals.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, (work, threads) in rivals.items():
            rates[name].append(rate_of(work, seconds, threads))
    return {name: Rate(statistics.median(values), min(values), max(values)) for name, values in rates.items()}
