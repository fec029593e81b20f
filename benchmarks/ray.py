"""Compares a run on Ray with a local run, on the same cores and catalogue: `python -m benchmarks.ray`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.fakes import start_ray
from benchmarks.material import machine, make_library
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.jobs.units import Listener
from singerembed.output.schema import Counts

_SMALL_UNITS = 1_500


class _Clock(Listener):
    """A listener that records when units are published."""

    def __init__(self) -> None:
        self.crops: list[tuple[float, int]] = []

    def published(self, _unit: int, counts: Counts) -> None:
        self.crops.append((time.perf_counter(), counts.crops))

    def rate(self) -> float:
        """Return crops per second between the end of the first unit and the end of the last one."""
        return sum(crops for _, crops in self.crops[1:]) / (self.crops[-1][0] - self.crops[0][0])


def main() -> None:
    """Run the benchmarks, print the results, and write them as JSON with --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray", description=__doc__)
    parser.add_argument("--units", type=int, default=8, help="Of 60 recordings of 61 s each.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="Write the figures to FILE.")
    parser.add_argument("--overhead-of", choices=["local", "ray"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.overhead_of:
        print(json.dumps(_small_units(on_ray=arguments.overhead_of == "ray")))
        return
    results: dict[str, Any] = {"machine": machine(), "start": _start_up()}
    print(json.dumps(results), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results["throughput"] = _throughput(Path(folder), arguments.units, arguments.rounds)
    print(json.dumps(results["throughput"]), flush=True)
    results["small_units"] = {kind: _in_a_process(kind) for kind in ("local", "ray")}
    print(json.dumps(results["small_units"]))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _start_up() -> dict[str, float]:
    """Measure the seconds that a local cluster takes to start and to shut down."""
    found: dict[str, list[float]] = {"start_seconds": [], "end_seconds": []}
    for _ in range(3):
        started = time.perf_counter()
        ray = start_ray(fake=False)
        up = time.perf_counter()
        ray.shutdown()
        found["start_seconds"].append(up - started)
        found["end_seconds"].append(time.perf_counter() - up)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _throughput(folder: Path, units: int, rounds: int) -> dict[str, Any]:
    """Measure both in turn over the same catalogue, in units of the default size: 60 recordings without an end."""
    catalog = make_library(folder, 3, 61)
    header, *rows = catalog.read_text(encoding="utf-8").splitlines()
    catalog.write_text("\n".join([header, *rows * (5 * units)]) + "\n", encoding="utf-8")

    def one(options: RunOptions) -> tuple[float, float]:
        clock, output = _Clock(), folder / "out.parquet"
        summary = run(str(catalog), str(output), options=options, listeners=[clock])
        output.unlink()
        return clock.rate(), summary.counts.crops / summary.seconds

    ray = start_ray(fake=False)
    kinds = {"local": RunOptions(), "ray": RunOptions(ray="auto")}
    rates: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, options in kinds.items():
            rates[kind].append(one(options))
    ray.shutdown()

    def ratio(which: int) -> float:
        return statistics.median(r[which] / here[which] for here, r in zip(rates["local"], rates["ray"], strict=True))

    return {
        "crops_per_second_between_units": {kind: [round(r[0], 1) for r in found] for kind, found in rates.items()},
        "crops_per_second_whole_run": {kind: [round(r[1], 1) for r in found] for kind, found in rates.items()},
        "ratio_between_units": round(ratio(0), 3),
        "ratio_whole_run": round(ratio(1), 3),
    }


def _in_a_process(kind: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ray", "--overhead-of", kind]
    figures: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return figures


def _small_units(*, on_ray: bool) -> dict[str, float]:
    """Measure the overhead of a unit: units of one track, with the fake engine and decoder."""
    from benchmarks import fakes

    fakes.install()
    ray = start_ray(fake=True) if on_ray else None
    clock = _Clock()
    with tempfile.TemporaryDirectory() as name:
        catalog = Path(name) / "catalog.csv"
        catalog.write_text("path,artist\n" + "a.wav,somebody\n" * _SMALL_UNITS, encoding="utf-8")
        before = time.process_time()
        options = RunOptions(unit_minutes=4, ray="auto" if on_ray else None)
        run(str(catalog), f"{name}/out.parquet", options=options, listeners=[clock])
        cpu = time.process_time() - before
    if ray:
        ray.shutdown()
    seconds = clock.crops[-1][0] - clock.crops[0][0]
    return {
        "units": _SMALL_UNITS,
        "ms_a_unit": 1000 * seconds / (_SMALL_UNITS - 1),
        "cpu_ms_a_unit_of_this_process": 1000 * cpu / _SMALL_UNITS,
    }


if __name__ == "__main__":
    main()
