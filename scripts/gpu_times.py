"""Measures the GPU path: the kernels against their theoretical limit and torchaudio, the engines, and whole runs.

Prints a table and writes it as JSON, named after the GPU, to a folder. Called by scripts/gpu_check.sh; without a GPU it
exits with an error. Needs the extras gpu and build; torchaudio is measured if it is installed.

    python scripts/gpu_times.py benchmarks/results
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import singerembed
from singerembed.engine.build import BuildOptions, verification_crops
from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.load import load_engine
from singerembed.errors import SingerEmbedError
from singerembed.model.mel import DEVICE_CROP, DEVICE_LEVEL, cuda_mel
from singerembed.model.spec import ModelSpec

SPEC = ModelSpec(name="timing", method="untrained")
BATCH = 64
REPEATS = 20
LAUNCHES = 100
# Instructions of one lane per frame, counted in csrc/mel_math.h and mel_kernels.h; docs/gpu.md has the derivation.
INSTRUCTIONS_A_FRAME = 47_400
LANES_OF_A_MULTIPROCESSOR = 128  # FP32, compute capability 8.6 and later; 8.0 has 64


@dataclass
class Row:
    """A line of the table."""

    what: str
    crops_per_second: float
    spread: float  # (longest - shortest) / median of the repeats
    note: str = ""


def main() -> int:
    """Run all measurements; print each row as it comes, and write the table after each."""
    try:
        with opened() as device:
            table = Table(device, Path(sys.argv[1]))
            for one in (*kernel_rows(device), *torchaudio_rows()):
                table.add(one)
    except SingerEmbedError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for one in engine_rows(Path(folder)):
            table.add(one)
    return 0


class Table:
    """The rows so far, on stdout and in a file named after the GPU."""

    def __init__(self, device: CudaDevice, folder: Path) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
        self._path = folder / f"gpu-{slug}.json"
        self._content = {"command": "scripts/gpu_check.sh", "gpu": device.name, **device_facts(device)}
        self._rows: list[Row] = []

    def add(self, one: Row) -> None:
        """Print and write one more row."""
        print(f"{one.what:<46} {one.crops_per_second:>12,.0f} crops/s  ±{one.spread:4.0%}  {one.note}", flush=True)
        self._rows.append(one)
        content = {**self._content, "rows": [vars(row) for row in self._rows]}
        self._path.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def opened() -> Iterator[CudaDevice]:
    """Open the first device."""
    device = CudaDevice()
    try:
        yield device
    finally:
        device.close()


def row(what: str, seconds: list[float], crops: int, note: str = "") -> Row:
    """Return the table's line for repeats that took `seconds` each for `crops` crops."""
    median = statistics.median(seconds)
    return Row(what, crops / median, (max(seconds) - min(seconds)) / median, note)


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


def floor_crops_per_second(device: CudaDevice) -> tuple[float, float]:
    """Return the limits by arithmetic and by memory bandwidth, for float32 samples and FP16 output."""
    facts = device_facts(device)
    lanes = 64 if device.compute_capability == (8, 0) else LANES_OF_A_MULTIPROCESSOR
    arithmetic = facts["multiprocessors"] * lanes * facts["clock_hz"] / (INSTRUCTIONS_A_FRAME * SPEC.n_frames)
    traffic = SPEC.crop_samples * 4 + SPEC.n_mels * SPEC.n_frames * 2
    return float(arithmetic), float(facts["memory_bytes_per_second"] / traffic)


def timed(device: CudaDevice, work: Callable[[], None]) -> list[float]:
    """Return the seconds that `work` takes on its stream: many of it in a row, so that launches do not count."""
    seconds = []
    for _ in range(REPEATS + 3):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            work()
        device.synchronize()
        seconds.append((time.perf_counter() - start) / LAUNCHES)
    return seconds[3:]


def kernel_rows(device: CudaDevice) -> list[Row]:
    """Measure copy, level and mel of a full batch."""
    kernels, stream = cuda_mel(SPEC), device.stream()
    size = SPEC.crop_samples * 4
    pinned = device.pinned(BATCH * size)
    pcm = pinned.array.view(np.float32).reshape(BATCH, SPEC.crop_samples)
    pcm[:] = np.random.default_rng(0).uniform(-0.9, 0.9, pcm.shape)
    levels, crops = np.zeros(BATCH, DEVICE_LEVEL), np.zeros(BATCH, DEVICE_CROP)
    sizes = (
        pcm.nbytes,
        levels.nbytes,
        crops.nbytes,
        kernels.scratch_bytes(BATCH),
        BATCH * SPEC.n_mels * SPEC.n_frames * 2,
    )
    buffers = [device.allocate(n) for n in sizes]
    pcm_at, levels_at, crops_at, scratch_at, mel_at = (buffer.address for buffer in buffers)

    def level() -> None:
        kernels.level(pcm_at, is_int16=False, crops=BATCH, levels=levels_at, stream=stream)

    def mel() -> None:
        kernels.mel(crops_at, crops=BATCH, scratch=scratch_at, out=mel_at, stream=stream, half=True)

    copy_seconds = timed(device, lambda: device.upload(pcm_at, pcm, stream))
    level_seconds = timed(device, level)
    device.download(levels, levels_at, stream)
    device.synchronize()
    crops["pcm"], crops["scale"] = pcm_at + np.arange(BATCH) * size, levels["scale"]
    device.upload(crops_at, crops, stream)
    mel_seconds = timed(device, mel)
    arithmetic, memory = floor_crops_per_second(device)
    share = BATCH / statistics.median(mel_seconds) / min(arithmetic, memory)
    for buffer in buffers:
        buffer.free()
    pinned.free()
    return [
        Row("floor of mel: arithmetic", arithmetic, 0),
        Row("floor of mel: memory", memory, 0),
        row("mel and normalise kernels, float32 to FP16", mel_seconds, BATCH, f"{share:.0%} of the floor"),
        row("level kernel", level_seconds, BATCH),
        row("copy to the device, float32", copy_seconds, BATCH),
    ]


def torchaudio_rows() -> list[Row]:
    """Measure the same spectrogram, logarithm and maximum with torchaudio, if it is installed with CUDA."""
    if not (importlib.util.find_spec("torchaudio") and importlib.util.find_spec("torch")):
        return []
    import torch
    import torchaudio

    if not torch.cuda.is_available():
        return []
    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate=SPEC.mel_sample_rate,
        n_fft=SPEC.n_fft,
        hop_length=SPEC.hop_samples,
        n_mels=SPEC.n_mels,
        mel_scale="slaney",
        norm="slaney",
    ).cuda()
    pcm = torch.rand(BATCH, SPEC.crop_samples, device="cuda") - 0.5
    event: Any = torch.cuda.Event
    seconds = []
    for _ in range(REPEATS + 3):
        start, stop = event(enable_timing=True), event(enable_timing=True)
        start.record()
        log_mel = torch.log(transform(pcm / pcm.abs().amax(1, keepdim=True)) + SPEC.log_offset)
        (log_mel / log_mel.amax((1, 2), keepdim=True)).half()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3)
    return [row("the same by torchaudio", seconds[3:], BATCH)]


# --- engines and the whole job ----------------------------------------------------------------------------------------


def engine_rows(folder: Path) -> Iterator[Row]:
    """Measure each engine that can be built here, fed by threads, and `singerembed run` with the first one."""
    engines: list[str] = []
    checkpoint = Path(__file__).parents[1] / "tests" / "golden"
    catalog = write_catalog(folder)
    for backend, precision in (("tensorrt", "fp16"), ("tensorrt-rtx", "fp16"), ("onnxruntime", "fp32")):
        path = str(folder / f"{backend}.engine")
        try:
            singerembed.build_engine(
                str(release_of(checkpoint, folder)),
                path,
                BuildOptions(backend, precision=precision),
                say=lambda what, text: print(f"{what}: {text}", file=sys.stderr),
            )
            engine = load_engine(path)
        except SingerEmbedError as exc:
            print(f"{backend}: left out: {exc}", file=sys.stderr)
            continue
        if isinstance(engine, GpuEngine):
            yield fed(engine, backend, precision)
            engines.append(path)
        engine.close()
    if importlib.util.find_spec("torch"):
        yield from torch_rows(release_of(checkpoint, folder))
    if engines:
        yield whole_job(catalog, folder, engines[0])


def torch_rows(release: Path) -> Iterator[Row]:
    """Measure the encoder by torch in FP16 between the same kernels, ring and worker."""
    import torch
    from torch_network import TorchNetwork

    from singerembed.model.checkpoint import load_checkpoint

    if torch.cuda.is_available():
        checkpoint = load_checkpoint(str(release))
        spec = replace(checkpoint.spec, precision="fp16")
        engine = GpuEngine(spec, CudaDevice, lambda device: TorchNetwork(checkpoint, device.index))
        yield fed(engine, "torch", "fp16")
        engine.close()


def release_of(golden: Path, folder: Path) -> Path:
    """Write the golden weights as a release folder that build-engine reads."""
    import torch

    release = folder / "reference"
    if not release.exists():
        sys.path.insert(0, str(golden))
        import weights

        release.mkdir()
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.official_state_dict().items()}
        torch.save(tensors, release / "model.pt")
    return release


def fed(engine: GpuEngine, backend: str, precision: str) -> Row:
    """Measure the engine with one thread per core that passes decoded crops."""
    crops, callers = verification_crops(engine.spec), os.cpu_count() or 1
    crops = np.concatenate([crops] * -(-engine.batch // len(crops)))[: engine.batch]
    seconds = []
    with ThreadPoolExecutor(callers) as pool:
        for _ in range(REPEATS // 2 + 1):
            start = time.perf_counter()
            list(pool.map(engine.embed, [crops] * (4 * callers)))
            seconds.append(time.perf_counter() - start)
    return row(f"engine {backend}, {precision}", seconds[1:], 4 * callers * len(crops), engine.description)


def write_catalog(folder: Path, tracks: int = 64, crops: int = 40) -> Path:
    """Write a catalogue of noisy tones as WAV, which is the fastest to decode."""
    rng, t = np.random.default_rng(0), np.arange(crops * SPEC.crop_samples) / SPEC.sample_rate
    lines = ["path"]
    for i in range(tracks):
        tone = 0.5 * np.sin(2 * np.pi * (100 + 10 * i) * t) + 0.01 * rng.standard_normal(t.size)
        soundfile.write(folder / f"{i}.wav", tone, SPEC.sample_rate, subtype="PCM_16")
        lines.append(str(folder / f"{i}.wav"))
    catalog = folder / "catalog.csv"
    catalog.write_text("\n".join(lines) + "\n")
    return catalog


def whole_job(catalog: Path, folder: Path, engine: str) -> Row:
    """Measure `singerembed run`, start-up included."""
    crops, seconds = 64 * 40, []
    for i in range(3):
        start = time.perf_counter()
        singerembed.run(str(catalog), str(folder / f"{i}.parquet"), engine=engine)
        seconds.append(time.perf_counter() - start)
    return row("whole job, WAV", seconds, crops, f"{os.cpu_count()} cores decode")


if __name__ == "__main__":
    sys.exit(main())
