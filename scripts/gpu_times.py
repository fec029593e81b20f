"""Measures the GPU path: the kernels against their theoretical limit and torch, the engines, and whole runs.

Prints a table, row by row, and writes it as JSON, named after the GPU, to a folder. Called by scripts/gpu_check.sh;
without a GPU it exits with an error. torch and torchaudio are measured if they are installed.

    python scripts/gpu_times.py benchmarks/results
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from gpu_kernels import MEL_VALUES, SPEC, NoiseBatch

import singerembed
from singerembed.engine.base import Engine
from singerembed.engine.build import BuildOptions, verification_crops
from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.load import load_engine
from singerembed.errors import SingerEmbedError
from singerembed.jobs import units
from singerembed.jobs.options import RunOptions
from singerembed.storage import publishing

sys.path.append(str(Path(__file__).parents[1]))  # behind the installed package
from benchmarks.measure import Rate

BATCH = 256  # crops; more bytes than a cache of the second level holds
REPEATS = 20
LAUNCHES = 20
# Instructions per frame, summed over all 32 lanes, of the mel kernel of the first measurement, so that shares of the
# limit stay comparable; docs/gpu.md has the derivation, and the count of today.
INSTRUCTIONS_A_FRAME = 47_400
LANES_OF_A_MULTIPROCESSOR = 128  # FP32, compute capability 8.6 and later; 8.0 has 64
TRACKS, CROPS_A_TRACK = {"wav": 1024, "mp3": 128}, 45  # of the whole job: 51 and 6 hours
_WHOLE_JOBS = 2  # of each kind: more would take the check beyond ten minutes
_WORKER, _INSTANT = "--whole-job", "instant"


@dataclass
class Row:
    """A line of the table."""

    what: str
    crops_per_second: Rate
    note: str = ""


def main() -> int:
    """Run all measurements; print each row as it comes, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(_WORKER, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.whole_job:
        print(whole_job_seconds(*arguments.whole_job))
        return 0
    if not arguments.folder:
        parser.error("give the folder to write to")
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        with opened() as device:
            table = Table(device, arguments.folder)
            for one in kernel_rows(device):
                table.add(one)
    except SingerEmbedError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for one in chain(torch_mel_rows(), separator_rows(), engine_rows(Path(folder))):
            table.add(one)
    return 0


class Table:
    """The rows so far, on stdout and in a file named after the GPU."""

    def __init__(self, device: CudaDevice, folder: Path) -> None:
        name = re.sub(r" \(\d+\)$", "", device.name)  # the device's number says nothing about the times
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self._path = folder / f"gpu-{slug}.json"
        self._content = {"command": "scripts/gpu_check.sh", "gpu": device.name, **device_facts(device)}
        self._rows: list[Row] = []

    def add(self, one: Row) -> None:
        """Print and write one more row."""
        print(f"{one.what:<52} {one.crops_per_second.text():>32} crops/s  {one.note}", flush=True)
        self._rows.append(one)
        content = {**self._content, "rows": [vars(row) for row in self._rows]}
        with publishing(str(self._path)) as temporary:
            Path(temporary).write_text(json.dumps(content, indent=1, default=vars) + "\n", encoding="utf-8")


@contextmanager
def opened() -> Iterator[CudaDevice]:
    """Open the first device."""
    device = CudaDevice()
    try:
        yield device
    finally:
        device.close()


def row(what: str, seconds: Sequence[float], crops: int, note: str = "") -> Row:
    """Return the table's line for repeats that took `seconds` each for `crops` crops."""
    rate = Rate(crops / statistics.median(seconds), crops / max(seconds), crops / min(seconds))
    return Row(what, rate, note)


# --- kernels ----------------------------------------------------------------------------------------------------------


def device_facts(device: CudaDevice) -> dict[str, Any]:
    """Return the properties of the device that its limits are computed from."""
    multiprocessors, clock_khz = (device.attribute(name) for name in ("MULTIPROCESSOR_COUNT", "CLOCK_RATE"))
    memory_khz, bus_bits = (device.attribute(name) for name in ("MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH"))
    return {
        "compute_capability": ".".join(map(str, device.compute_capability)),
        "multiprocessors": multiprocessors,
        "clock_hz": clock_khz * 1e3,
        "memory_bytes_per_second": 2 * memory_khz * 1e3 * bus_bits / 8,  # two transfers a clock
    }


def arithmetic_limit(device: CudaDevice) -> float:
    """Return the crops a second at which the mel kernel would issue an instruction in every lane at every clock."""
    facts = device_facts(device)
    lanes = 64 if device.compute_capability == (8, 0) else LANES_OF_A_MULTIPROCESSOR
    return float(facts["multiprocessors"] * lanes * facts["clock_hz"] / (INSTRUCTIONS_A_FRAME * SPEC.n_frames))


def memory_limit(device: CudaDevice, sample_bytes: int, values: int) -> float:
    """Return the crops a second at which samples are read, and `values` of FP16 a crop written, at full bandwidth."""
    traffic = SPEC.crop_samples * sample_bytes + 2 * values
    return float(device_facts(device)["memory_bytes_per_second"] / traffic)


def timed(device: CudaDevice, stream: int, work: Callable[[], None]) -> list[float]:
    """Return the seconds that `work` takes on `stream`, from graphs of many of it, so that launches do not count."""
    work()
    graph = device.capture(stream)
    for _ in range(LAUNCHES):
        work()
    graph.finish()
    seconds = []
    for _ in range(REPEATS + 3):
        device.synchronize()
        start = time.perf_counter()
        graph.launch(stream)
        device.synchronize()
        seconds.append((time.perf_counter() - start) / LAUNCHES)
    return seconds[3:]


def kernel_rows(device: CudaDevice) -> Iterator[Row]:
    """Measure copy, level and mel of a batch, for both types of samples."""
    for sample_type in (np.float32, np.int16):
        yield from kernel_rows_of(device, sample_type)


def kernel_rows_of(device: CudaDevice, sample_type: type[np.float32 | np.int16]) -> Iterator[Row]:
    """Measure copy, level and mel of a batch of samples of one type."""
    batch, name, sample_bytes = NoiseBatch(device, BATCH, sample_type), sample_type.__name__, sample_type().itemsize
    copied = timed(device, batch.stream, batch.upload)
    speed = BATCH * SPEC.crop_samples * sample_bytes / statistics.median(copied)
    yield row(f"copy to the device, {name}", copied, BATCH, f"{speed / 1e9:.1f} GB/s")
    leveled = timed(device, batch.stream, batch.level)
    share = BATCH / statistics.median(leveled) / memory_limit(device, sample_bytes, 0)
    yield row(f"level kernel, {name}", leveled, BATCH, f"{share:.0%} of the memory's bandwidth")
    batch.list_crops()
    seconds = timed(device, batch.stream, batch.mel)
    limits = {"arithmetic": arithmetic_limit(device), "memory": memory_limit(device, sample_bytes, MEL_VALUES)}
    which = min(limits, key=lambda limit: limits[limit])
    share = BATCH / statistics.median(seconds) / limits[which]
    yield row(f"mel kernels, {name} to FP16", seconds, BATCH, f"{share:.0%} of the limit by {which}")
    batch.free()


def torch_mel_rows() -> Iterator[Row]:
    """Measure the same spectrogram, logarithm and maximum by torch and by torchaudio, where they are installed."""
    if not importlib.util.find_spec("torch"):
        return
    import torch

    if not torch.cuda.is_available():
        return
    from training.model import MelSpectrogram

    pcm = torch.rand(BATCH, SPEC.crop_samples, device="cuda") - 0.5
    yield row("the same by torch.stft and a product", torch_mel_seconds(MelSpectrogram(SPEC).cuda(), pcm), BATCH)
    if importlib.util.find_spec("torchaudio"):
        import torchaudio

        transform = torchaudio.transforms.MelSpectrogram(
            sample_rate=SPEC.mel_sample_rate,
            n_fft=SPEC.n_fft,
            hop_length=SPEC.hop_samples,
            n_mels=SPEC.n_mels,
            mel_scale="slaney",
            norm="slaney",
        )
        yield row("the same by torchaudio", torch_mel_seconds(transform.cuda(), pcm), BATCH)
    torch.cuda.empty_cache()


def torch_mel_seconds(transform: Any, pcm: Any) -> list[float]:
    """Return the seconds of repeats, by CUDA events, of `transform` and of what surrounds it."""
    import torch

    event: Any = torch.cuda.Event
    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS + 3):
            start, stop = event(enable_timing=True), event(enable_timing=True)
            start.record()
            log_mel = torch.log(transform(pcm / pcm.abs().amax(1, keepdim=True)) + SPEC.log_offset)
            (log_mel / log_mel.amax((1, 2), keepdim=True)).half()
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
    return seconds[3:]


def separator_rows() -> Iterator[Row]:
    """Measure a separator as a run feeds it, and its parts."""
    try:
        from separator_times import separator_times
    except ImportError as exc:
        return print(f"separator: left out: {exc}", flush=True)
    yield from (row(**vars(one)) for one in separator_times())


# --- engines and the whole job ----------------------------------------------------------------------------------------


def engine_rows(folder: Path) -> Iterator[Row]:
    """Measure each engine that works here, fed by threads, and `singerembed run` with the first."""
    release = release_of(Path(__file__).parents[1] / "tests" / "golden", folder)
    catalogs, measured = {suffix: write_catalog(folder, suffix) for suffix in TRACKS}, False
    yield from whole_jobs(catalogs, "engine that answers at once", _INSTANT)
    for backend, precision in (("tensorrt", "fp16"), ("tensorrt-rtx", "fp16"), ("onnxruntime", "fp32")):
        path = str(folder / f"{backend}-{precision}.engine")
        options = BuildOptions(backend, precision=precision)
        try:
            singerembed.build_engine(str(release), path, options, say=lambda what, text: print(what, text, sep=": "))
            engine = load_engine(path)
        except SingerEmbedError as exc:
            print(f"{backend}: left out: {exc}", flush=True)
            continue
        if isinstance(engine, GpuEngine):
            yield fed(engine, backend, precision)
        engine.close()
        if isinstance(engine, GpuEngine) and not measured:
            measured = True
            yield from whole_jobs(catalogs, f"{backend}, {precision}", path)
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            engine = torch_engine(str(release))
            yield fed(engine, "torch", "fp16")
            engine.close()
            yield from whole_jobs(catalogs if not measured else {"wav": catalogs["wav"]}, "torch, fp16", str(release))


def torch_engine(release: str) -> GpuEngine:
    """The encoder by torch in FP16 between the same kernels, ring and worker."""
    from torch_network import TorchNetwork

    from singerembed.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(release)
    spec = replace(checkpoint.spec, precision="fp16")
    return GpuEngine(spec, CudaDevice, lambda device: TorchNetwork(checkpoint, device.index))


def release_of(golden: Path, folder: Path) -> Path:
    """Write the golden weights as a release folder that build-engine reads."""
    import torch

    release = folder / "reference"
    sys.path.insert(0, str(golden))
    import weights

    release.mkdir()
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.official_state_dict().items()}
    torch.save(tensors, release / "model.pt")
    return release


def fed(engine: GpuEngine, backend: str, precision: str) -> Row:
    """Measure the engine with one thread per core that passes decoded crops, as int16."""
    callers = os.cpu_count() or 1
    crops = np.rint(verification_crops(engine.spec) * 32767 / 2).astype(np.int16)
    crops = np.concatenate([crops] * -(-engine.batch // len(crops)))[: engine.batch]
    seconds = []
    with ThreadPoolExecutor(callers) as pool:
        for _ in range(REPEATS // 2 + 1):
            start = time.perf_counter()
            list(pool.map(engine.embed, [crops] * (16 * callers)))
            seconds.append(time.perf_counter() - start)
    return row(f"engine {backend}, {precision}", seconds[1:], 16 * callers * len(crops), engine.description)


def write_catalog(folder: Path, suffix: str) -> Path:
    """Write a catalogue of noisy tones, all of them one recording under many names."""
    rng, t = np.random.default_rng(0), np.arange(CROPS_A_TRACK * SPEC.crop_samples) / SPEC.sample_rate
    tone = 0.5 * np.sin(2 * np.pi * 200 * t) + 0.01 * rng.standard_normal(t.size)
    first = folder / f"0.{suffix}"
    soundfile.write(first, tone, SPEC.sample_rate)
    lines = ["path", str(first)]
    for i in range(1, TRACKS[suffix]):
        name = folder / f"{i}.{suffix}"
        name.hardlink_to(first)
        lines.append(str(name))
    catalog = folder / f"{suffix}.csv"
    catalog.write_text("\n".join(lines) + "\n")
    return catalog


def whole_jobs(catalogs: dict[str, Path], what: str, engine: str) -> Iterator[Row]:
    """Measure `singerembed run` on each catalogue by one process, and by two at once, half of the tracks each."""
    for suffix, catalog in catalogs.items():
        lines = catalog.read_text().splitlines()
        halves = [catalog.with_suffix(f".{i}.csv") for i in range(2)]
        for i, half in enumerate(halves):
            half.write_text("\n".join([lines[0], *lines[1 + i :: 2]]) + "\n")
        for parts in ([catalog], halves):
            try:
                seconds = [seconds_at_once(engine, parts) for _ in range(_WHOLE_JOBS)]
            except subprocess.CalledProcessError:
                print(f"whole job, {what}, {suffix}: failed", flush=True)
                return
            cores = f"{os.cpu_count()} cores, {len(parts)} process{'es' * (len(parts) - 1)}"
            crops = TRACKS[suffix] * CROPS_A_TRACK
            yield row(f"whole job, {suffix}, {what}", seconds, crops, f"{cores}; start not counted")


def seconds_at_once(engine: str, catalogs: list[Path]) -> float:
    """Return the seconds of the longest of runs that start together in processes of their own, one a catalogue."""
    commands = [[sys.executable, __file__, _WORKER, engine, str(catalog)] for catalog in catalogs]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return max(float(output.splitlines()[-1]) for output in outputs)


def whole_job_seconds(engine: str, catalog: str) -> float:
    """Return the seconds of `singerembed run` after the engine was opened; a folder is a release for torch."""
    from benchmarks.fakes import InstantEngine

    opened_at = [0.0]
    opens: dict[str, Callable[..., Engine]] = {_INSTANT: InstantEngine}
    if Path(engine).is_dir():
        opens[engine] = lambda *_: torch_engine(engine)
    open_it = opens.get(engine, vars(units)["open_engine"])

    def open_and_note(*arguments: Any) -> Engine:
        opened: Engine = open_it(*arguments)
        opened.embed(np.concatenate([verification_crops(opened.spec)] * 16))  # batches of every size, captured
        opened_at[0] = time.perf_counter()
        return opened

    vars(units)["open_engine"] = open_and_note
    file = None if engine in opens else engine
    with tempfile.TemporaryDirectory() as folder:
        summary = singerembed.run(catalog, f"{folder}/out.parquet", engine=file, options=RunOptions())
    if summary.counts.errors:
        raise SystemExit(f"rows in error: {dict(summary.counts.errors)}")
    return time.perf_counter() - opened_at[0]


if __name__ == "__main__":
    sys.exit(main())
