"""Measures many tracks on Ray on this machine: `python -m benchmarks.scale`.

Only engine and decoder are fakes (fakes.py); catalogue, scheduler, actors, part files, fsync, merge and index are real.
`--parts-only N` measures only the last step: memory and time of merging, or indexing, N small parts; `--parts` that of
1,000, 10,000 and 100,000.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import fakes
from benchmarks.material import machine
from singerembed.catalog.read import Catalog
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.jobs.units import Listener
from singerembed.output.finished import part_path
from singerembed.output.parts import PartStore
from singerembed.output.schema import Counts, output_schema

_PART_COUNTS = [1_000, 10_000, 100_000]
_FORMS = ["file", "partitioned"]


class _Watch(Listener):
    """A listener that records the end of the first and the last unit, and memory in between."""

    def __init__(self) -> None:
        self.units = 0
        self.first = self.last = 0.0
        self.resident: list[int] = []

    def published(self, _unit: int, _counts: Counts) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if self.units % 1000 == 0:
            self.resident.append(round(_status("VmRSS")))
        self.units += 1


def main() -> None:
    """Run each form in a new process, print its results as JSON, and write them with --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--tracks", type=int, default=1_000_000)
    parser.add_argument("--unit-minutes", type=float, default=240.0)
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread each.")
    parser.add_argument("--form", choices=_FORMS, help="Only this one.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--parts-only", type=int, metavar="N", help="Only the last step, over N parts of 10 rows.")
    which.add_argument("--parts", action="store_true", help="The last step over 1 000, 10 000 and 100 000 parts.")
    parser.add_argument("--json", metavar="FILE", help="Write the figures to FILE.")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        print(json.dumps(_one(arguments)))
        return
    results: dict[str, Any] = {"machine": machine()}
    counts = _PART_COUNTS if arguments.parts else [arguments.parts_only] if arguments.parts_only else []
    for form in [arguments.form] if arguments.form else _FORMS:
        command = [sys.executable, "-m", "benchmarks.scale", "--in-this-process", "--form", form]
        for n in counts:
            results[f"{n} parts, {form}"] = _figures([*command, "--parts-only", str(n)])
        if not counts:
            more = ["--tracks", arguments.tracks, "--unit-minutes", arguments.unit_minutes]
            results[form] = _figures([*command, *map(str, more), "--workers", str(arguments.workers)])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _one(arguments: argparse.Namespace) -> dict[str, Any]:
    partitioned = arguments.form == "partitioned"
    if arguments.parts_only:
        return _last_step(arguments.parts_only, partitioned=partitioned)
    return _whole(arguments.tracks, arguments.unit_minutes, arguments.workers, partitioned=partitioned)


def _figures(command: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(" ".join(command[4:]), json.dumps(figures), flush=True)
    return figures


def _status(name: str) -> float:
    """Return a value of /proc/self/status in MB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


def _whole(tracks: int, unit_minutes: float, workers: int, *, partitioned: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        catalog = Path(name) / "catalog.csv"
        with catalog.open("w", encoding="utf-8") as file:
            file.write("track_id,path,artist\n")
            for i in range(tracks):
                file.write(f"{i},s3://library/audio/{i % 1000:03}/{i:09}.flac,somebody or other {i % 1000}\n")
        ray = fakes.start_ray(fake=True, workers=workers)
        watch, output = _Watch(), f"{name}/{'out' if partitioned else 'out.parquet'}"
        options = RunOptions(unit_minutes=unit_minutes, workers=1, ray="auto", partitioned=partitioned)
        cpu, started = time.process_time(), time.perf_counter()
        summary = run(str(catalog), output, options=options, listeners=[watch])
        cpu, ended = time.process_time() - cpu, time.perf_counter()
        ray.shutdown()
        assert summary.counts.tracks == summary.counts.crops == tracks
        size = sum(p.stat().st_size for p in Path(name).rglob("*") if p != catalog and p.is_file())
    return {
        "tracks": tracks,
        "units": watch.units,
        "tracks_per_second": round(tracks / (watch.last - watch.first)),
        "units_per_second": round(watch.units / (watch.last - watch.first), 1),
        "embedding_seconds": round(watch.last - started, 1),
        "last_step_seconds": round(ended - watch.last, 1),
        "driver_cpu_seconds": round(cpu, 1),
        "driver_peak_mb": round(_status("VmHWM")),
        "driver_mb_each_1000_units": watch.resident,
        "output_gb": round(size / 1e9, 2),
    }


def _last_step(n: int, *, partitioned: bool) -> dict[str, Any]:
    """Measure the last step over `n` parts, which are copies of one."""
    with tempfile.TemporaryDirectory() as name:
        catalog = Path(name) / "catalog.csv"
        catalog.write_text("track_id,path,artist\n" + "a,a.wav,somebody or other\n" * 10, encoding="utf-8")
        fakes.install()
        run(str(catalog), f"{name}/one", options=RunOptions(partitioned=True))
        schema = output_schema(Catalog(str(catalog)).extra_schema(), 1000, "float32")
        output = f"{name}/{'out' if partitioned else 'out.parquet'}"
        folder = Path(output if partitioned else f"{output}.parts")
        folder.mkdir()
        for unit in range(n):
            shutil.copyfile(part_path(f"{name}/one", 0), part_path(str(folder), unit))
        os.sync()
        with PartStore(output, partitioned=partitioned) as parts:
            parts.refresh()
            before, held, started = _status("VmRSS"), pa.total_allocated_bytes(), time.perf_counter()
            counts = parts.finish(schema, {}, None)
            seconds = time.perf_counter() - started
            assert (counts.tracks, held) == (10 * n, pa.total_allocated_bytes())
    return {
        "parts": n,
        "seconds": round(seconds, 1),
        "mb_before": round(before),
        "peak_mb": round(_status("VmHWM")),
    }


if __name__ == "__main__":
    main()
