"""Test material of the benchmarks, and properties of this machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 44_100
CODECS = {"wav": "PCM_16", "flac": "PCM_16", "mp3": "MPEG_LAYER_III", "ogg": "VORBIS"}


def voice(seconds: float, seed: int) -> NDArray[np.float32]:
    """Return a stereo, voice-like signal, float32 [samples, 2], at 44.1 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    f0 = 110 * 2 ** (
        rng.uniform(0, 2) + np.interp(t, np.arange(0, seconds + 1, 0.5), rng.uniform(0, 1, int(seconds * 2) + 2))
    )
    phase = 2 * np.pi * np.cumsum(f0 * (1 + 0.01 * np.sin(2 * np.pi * 5.5 * t))) / RATE
    tone = sum(np.sin(k * phase) / k**1.2 for k in range(1, 25))
    channels = [tone * gain + 0.02 * rng.standard_normal(len(t)) for gain in (1.0, 0.8)]
    pcm = np.stack(channels, axis=1)
    return (0.7 * pcm / np.abs(pcm).max()).astype(np.float32)


def make_library(folder: Path, files_a_codec: int, seconds: float) -> Path:
    """Write recordings in four codecs and their catalogue. Return the path of the catalogue."""
    rows = ["path,codec"]
    for i in range(files_a_codec):
        pcm = voice(seconds, i)
        for codec, subtype in CODECS.items():
            path = folder / f"{i}.{codec}"
            with soundfile.SoundFile(path, "w", RATE, 2, subtype=subtype) as file:
                for start in range(0, len(pcm), RATE):
                    file.write(pcm[start : start + RATE])
            rows.append(f"{path.name},{codec}")
    catalog = folder / "catalog.csv"
    catalog.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return catalog


def crops(n: int, crop_samples: int) -> NDArray[np.int16]:
    """Return `n` crops of a voice, int16 [n, crop_samples]."""
    mono = voice(n * crop_samples / RATE, 0).mean(axis=1)[: n * crop_samples]
    return (mono * 32767).astype(np.int16).reshape(n, crop_samples)


def machine() -> dict[str, Any]:
    """Return processor, cores and package versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in ("singerembed", "numpy", "onnxruntime", "torch", "openvino", "nnAudio", "librosa")
        },
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


_SGEMM = """
import sys, threading, time
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
n, threads, seconds = 2048, int(sys.argv[1]), 2.0
a = np.random.default_rng(0).random((n, n), dtype=np.float32)
done = [0] * threads
def loop(i):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a
        done[i] += 1
with threadpool_limits(1):
    a @ a
    started = time.perf_counter()
    workers = [threading.Thread(target=loop, args=(i,)) for i in range(threads)]
    [w.start() for w in workers]; [w.join() for w in workers]
    rate = sum(done) * 2 * n**3 / (time.perf_counter() - started)
print(rate, threadpool_info()[0].get("architecture", "unknown"))
"""


def sgemm(threads: int) -> tuple[float, str]:
    """Return FLOP/s of NumPy's sgemm on `threads` threads (a multiply-add is two), and the name of its kernel.

    It runs in a new process without OPENBLAS_* variables, with which some machines select a slower kernel.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    command = [sys.executable, "-c", _SGEMM, str(threads)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rate, architecture = result.stdout.split()
    return float(rate), architecture
