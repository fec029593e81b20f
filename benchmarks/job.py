"""The whole job: `singerembed run` over a library of mixed codecs against the official pipeline, on all cores."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.material import make_library
from benchmarks.measure import compare, print_table
from benchmarks.rivals import OfficialPipeline
from singerembed.engine.build import BuildOptions, build_engine
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.machine import available_cores
from singerembed.engine.native import NativeEngine
from singerembed.jobs import units
from singerembed.jobs.run import run
from singerembed.model.checkpoint import load_checkpoint
from singerembed.model.mel import available_isas

_REPEATS = 6  # of the library in the catalogue: a run of several seconds, long compared with start-up
_BATCHES = (1, 4, 16)
_FEW = 4  # recordings, one of each codec
Official = Callable[[int], int]  # a batch size; returns the crops that were embedded


def job(folder: Path, checkpoint_path: str, rounds: int) -> dict[str, Any]:
    """Measure the native back end with each vector instruction set, and the official pipeline run in two ways."""
    (folder / "job").mkdir()
    cores = available_cores()
    torch.set_num_threads(cores)
    catalog = make_library(folder / "job", 4, 61)
    few = sorted(p for p in catalog.parent.iterdir() if p != catalog)[:_FEW]
    header, *rows = catalog.read_text(encoding="utf-8").splitlines()
    catalog.write_text("\n".join([header, *rows * _REPEATS]) + "\n", encoding="utf-8")
    engine = str(folder / "job.engine")
    build_engine(checkpoint_path, engine, BuildOptions("native"))

    rivals, engines = dict[str, tuple[Callable[[], int], int]](), dict[str, str]()
    for isa in reversed(available_isas()[1:] or available_isas()):
        name = f"singerembed run, native, {isa}, {cores} workers"
        rivals[name] = (lambda isa=isa: _run(catalog, folder / "out.parquet", engine, isa), 1)  # type: ignore[misc]
        engines[name] = NativeEngine(read_engine_file(engine), isa=isa).description
    with _official_in_processes(checkpoint_path, few, cores) as in_processes:
        in_one = OfficialPipeline(load_checkpoint(checkpoint_path))
        ways: dict[str, Official] = {
            f"official pipeline, torch on {cores} threads": lambda batch: len(in_one.run(few, batch)),
            f"official pipeline, {cores} processes of one thread": in_processes,
        }
        batches = {name: max(_BATCHES, key=lambda batch: _rate(official, batch)) for name, official in ways.items()}
        official_names = []
        for name, official in ways.items():
            official_names.append(f"{name}, batch {batches[name]}")
            rivals[official_names[-1]] = (lambda name=name, official=official: official(batches[name]), 1)  # type: ignore[misc]
        rates = compare(rivals, 0.1, rounds)
    print_table("The whole job: wav, flac, mp3 and ogg mixed", rates, next(iter(engines)), "crops/s")
    better = max(official_names, key=lambda name: rates[name].median)
    times = {name: rates[name].median / rates[better].median for name in engines}
    print(f"\nAgainst the better of the official ones ({better}):")
    for name, ratio in times.items():
        print(f"{engines[name]} is {ratio:.1f} times as fast")
    start_up = _start_up(catalog, engine, folder)
    print(f"\nA command over one short recording takes {start_up:.2f} s from its start to its end.")
    return {"rates": rates, "engines": engines, "times_the_better_official": times, "start_up_seconds": start_up}


def _run(catalog: Path, output: Path, engine: str, isa: str) -> int:
    """Run with the native back end held to an instruction set; return the number of crops."""

    def held(file: EngineFile, silence_dbfs: float, _device: int) -> NativeEngine:
        return NativeEngine(file, silence_dbfs, isa=isa)

    with patch.object(units, "open_engine", held):
        n = run(str(catalog), str(output), engine=engine).counts.crops
    output.unlink()
    return n


def _rate(official: Official, batch: int) -> float:
    """Return the crops a second of a second call."""
    official(batch)
    started = time.perf_counter()
    return official(batch) / (time.perf_counter() - started)


# --- the official pipeline in a process for each core ----------------------------------------------------------------


class _Process:
    """What a process keeps between calls."""

    pipeline: OfficialPipeline


def _start(checkpoint_path: str) -> None:
    torch.set_num_threads(1)
    _Process.pipeline = OfficialPipeline(load_checkpoint(checkpoint_path))


def _embed(paths: list[Path], batch: int) -> int:
    return len(_Process.pipeline.run(paths, batch))


@contextmanager
def _official_in_processes(checkpoint_path: str, paths: list[Path], cores: int) -> Iterator[Official]:
    """Yield an `Official` over `paths` in each of as many processes as there are cores, which stay up between calls."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, _start, (checkpoint_path,)) as pool:

        def official(batch: int) -> int:
            return sum(pool.map(_embed, [[path] for path in paths * cores], [batch] * len(paths) * cores))

        yield official


def _start_up(catalog: Path, engine: str, folder: Path) -> float:
    """Return the median seconds of a command over one recording of 4 s."""
    one = catalog.with_name("one.csv")
    one.write_text("path,end\n0.wav,4\n", encoding="utf-8")
    command = [sys.executable, "-m", "singerembed", "run", str(one)]
    times = []
    for i in range(5):
        started = time.perf_counter()
        subprocess.run([*command, str(folder / f"s{i}.parquet"), "--engine", engine, "-q"], check=True)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
