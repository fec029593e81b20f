"""Measures a separator on the GPU: by ONNX Runtime, with its parts, and on the runtime of plans, by torch in theirs.

gpu_times.py has these rows too; alone, in a third of a minute: python scripts/separator_times.py

The network is Spleeter's with drawn weights, which take the same time as trained ones.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from singerembed.audio.crops import CropBlock
from singerembed.engine import onnxruntime_cuda
from singerembed.engine import separator as separators
from singerembed.engine.base import Engine
from singerembed.engine.build_separator import export_onnx, made_mixture
from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.file import EngineFile, SeparatorFile
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.onnxruntime import new_session
from singerembed.engine.separation import Separation, open_separation
from singerembed.engine.separator import INPUT_NAME, OUTPUT_NAME, Separator, inverse_stft, network_input, stft
from singerembed.engine.separator_gpu import CropMix, SegmentRunner, separator_tensors
from singerembed.engine.spleeter import SpleeterNet, load_spleeter
from singerembed.model.mel import DEFAULT_SILENCE_DBFS
from singerembed.model.separator_spec import SpectrogramSpec
from singerembed.model.spec import ModelSpec

SPEC = SpectrogramSpec(name="timing", weights_sha256="")
ENCODER = ModelSpec(name="timing", method="untrained")
SEGMENT = SPEC.segment_samples(ENCODER.crop_samples)
FRAMES = (SEGMENT - SPEC.n_fft) // SPEC.hop_samples + 1
FILTERS = [16, 32, 64, 128, 256, 512]
TOGETHER = (1, 16)  # segments
REPEATS = 5
_SECONDS_A_REPEAT = 0.1
_CALLERS_A_CORE = 2  # as those of jobs/units.py where an engine waits
_NO_VOICE_DB = -1000.0  # drawn weights hear no voice


@dataclass
class Timed:
    """What `gpu_times.row` makes a line of."""

    what: str
    seconds: list[float]  # of each repeat
    crops: int
    note: str


def separator_times() -> Iterator[Timed]:
    """Measure what works here; print what does not, and why."""
    callers = _CALLERS_A_CORE * (os.cpu_count() or 1)
    try:
        network = load_spleeter(drawn_weights())
        file, halved = (
            SeparatorFile(SPEC, "onnxruntime", export_onnx(one), {}, {}) for one in (network, network.in_fp16())
        )
    except Exception as exc:  # whatever is missing: the other rows of the table are not lost
        print(f"separator: left out: {exc}", flush=True)
        return
    for rows in (_by_onnxruntime(file, halved, callers), _by_plans_runtime(network, callers)):
        try:
            yield from rows
        except Exception as exc:
            print(f"separator: left out: {type(exc).__name__}: {exc}", flush=True)


def drawn_weights() -> dict[str, NDArray[np.float32]]:
    """Return tensors of the names and shapes of Spleeter's checkpoint for two stems."""
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.float32]] = {}

    def add(layer: str, number: int, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            values = rng.uniform(0.5, 1, shape) if "gamma" in name or "variance" in name else rng.normal(0, 0.01, shape)
            tensors[f"{layer}_{number}/{name}" if number else f"{layer}/{name}"] = values.astype(np.float32)

    n = len(FILTERS)
    for stem in range(2):
        for i, outputs in enumerate(FILTERS):
            add("conv2d", stem * (n + 1) + i, kernel=(5, 5, [2, *FILTERS][i], outputs), bias=(outputs,))
        add("conv2d", stem * (n + 1) + n, kernel=(4, 4, 1, 2), bias=(2,))
        ups = [*FILTERS[-2::-1], 1]
        for i, outputs in enumerate(ups):
            inputs = FILTERS[-1] if i == 0 else 2 * ups[i - 1]
            add("conv2d_transpose", stem * n + i, kernel=(5, 5, outputs, inputs), bias=(outputs,))
        for i, width in enumerate([*FILTERS, *ups]):
            sizes = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (width,))
            add("batch_normalization", stem * 2 * n + i, **sizes)
    return tensors


def timed(what: str, work: Callable[[], object], callers: int = 1, crops: int = 1) -> Timed:
    """Call `work`, which does `crops` segments, from `callers` threads at once; processor time is of all of them."""
    with ThreadPoolExecutor(callers) as pool:

        def calls(n: int) -> float:
            start = time.perf_counter()
            for done in [pool.submit(work) for _ in range(n)]:
                done.result()
            return time.perf_counter() - start

        calls(callers)
        n = callers * max(1, round(_SECONDS_A_REPEAT / calls(callers)))
        processor = time.process_time()
        seconds = [calls(n) for _ in range(REPEATS)]
        each = (time.process_time() - processor) / (REPEATS * n * crops)
    rate = n * crops / sorted(seconds)[REPEATS // 2]
    threads = f"{callers} thread{'s' * (callers > 1)}"
    note = (
        f"{rate * ENCODER.crop_seconds:,.0f} times real time; {threads}, {each * 1e3:.2f} ms of processor time a crop"
    )
    return Timed(what, seconds, n * crops, note)


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def _by_onnxruntime(file: SeparatorFile, halved: SeparatorFile, callers: int, place: str = "cuda") -> Iterator[Timed]:
    """Measure the separator as a run feeds it, then each part alone. `place`: "cpu" tries the code without a GPU."""
    separator = Separator(file)
    if place not in separator.description.lower():
        raise RuntimeError(f"there is no separator on a GPU here, but {separator.description}")
    segment = np.ascontiguousarray(made_mixture(SEGMENT, SPEC.sample_rate))
    sys.path.append(str(Path(__file__).parents[1]))  # behind the installed package
    from benchmarks.fakes import InstantEngine

    instant = InstantEngine(EngineFile(ENCODER, "", b"", {}, {}), DEFAULT_SILENCE_DBFS, 0)
    separation = Separation(separator, ENCODER, _NO_VOICE_DB, DEFAULT_SILENCE_DBFS)
    yield timed("separator, as a run feeds it, float32", _run_of(separation, instant, segment), callers)
    yield timed("separator, transforms and network", lambda: separator.vocals(segment), callers)
    spectrum = stft(segment, SPEC)
    mask = np.ones((SPEC.channels, FRAMES, SPEC.n_bins), np.float32)

    def transforms() -> None:
        there = stft(segment, SPEC)
        np.abs(there[:, :, : SPEC.n_bins])
        there[:, :, : SPEC.n_bins] *= mask
        inverse_stft(there, SPEC)

    yield timed("separator, its transforms on the CPU", transforms, os.cpu_count() or 1)
    magnitude = np.ascontiguousarray(np.abs(spectrum[:, :, : SPEC.n_bins])[np.newaxis])
    session, in_fp16 = (
        onnxruntime_cuda.open_session(one.payload, 0) if place == "cuda" else new_session(one.payload)
        for one in (file, halved)
    )
    yield timed("separator, network and copies", lambda: session.run([OUTPUT_NAME], {INPUT_NAME: magnitude}), 2)
    for name, one in (("float32", session), ("FP16", in_fp16)):
        for together in TOGETHER:
            work = _bound(one, np.tile(magnitude, (1, 1, together, 1)), place)
            yield timed(f"separator, network alone, {name}, {together} at a time", work, crops=together)


def _run_of(separation: Separation, engine: Engine, segment: NDArray[np.float32]) -> Callable[[], object]:
    """What a thread of a run does with a crop after decoding."""
    block = CropBlock(segment[np.newaxis], [0], np.array([0]), np.array([len(segment)]))
    return lambda: separation.embed(block, engine)


def _bound(session: Any, magnitude: NDArray[np.float32], place: str) -> Callable[[], object]:
    """A call of `session` whose input and output stay on the device."""
    from onnxruntime import OrtValue

    binding = session.io_binding()
    binding.bind_ortvalue_input(INPUT_NAME, OrtValue.ortvalue_from_numpy(magnitude, place, 0))
    binding.bind_ortvalue_output(
        OUTPUT_NAME, OrtValue.ortvalue_from_shape_and_type(list(magnitude.shape), np.float32, place, 0)
    )
    return lambda: session.run_with_iobinding(binding)  # waits for the device


# --- the runtime of plans ---------------------------------------------------------------------------------------------


class NoNetwork:
    """An encoder that takes no time. See `Network`."""

    description, half_input, max_batch, capturable = "nothing", True, 64, True

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        """See `Network.prepare`."""

    def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        """See `Network.enqueue`. Leaves in the embeddings what is there."""

    def close(self) -> None:
        """See `Network.close`."""


def _by_plans_runtime(network: SpleeterNet, callers: int) -> Iterator[Timed]:
    """Measure the runtime of TensorRT's plans, with torch in the place of the plan."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from torch_network import TorchSegments

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tensors, halved = separator_tensors(SPEC), network.in_fp16()

    def open_plan(_file: SeparatorFile, device: int, crop_mix: CropMix | None) -> SegmentRunner:
        return SegmentRunner(
            tensors, lambda: CudaDevice(device), lambda cuda: TorchSegments(halved, SPEC, tensors, cuda.index), crop_mix
        )

    vars(separators)["open_plan"] = open_plan
    file = SeparatorFile(SPEC, "tensorrt", b"", {"precision": "fp16"}, {})
    segment = np.ascontiguousarray(made_mixture(SEGMENT, SPEC.sample_rate))
    with closing(GpuEngine(ENCODER, CudaDevice, lambda _cuda: NoNetwork())) as engine:
        with closing(Separator(file)) as separator:
            yield timed("separator by torch, FP16, voices to the host", lambda: separator.vocals(segment), callers)
            yield timed("the same, its network with transforms alone", _alone(halved, network_input(segment, SPEC)))
            by_host = Separation(separator, ENCODER, _NO_VOICE_DB, DEFAULT_SILENCE_DBFS)
            yield timed("the same, as a run feeds it", _run_of(by_host, engine, segment), callers)
        with closing(open_separation(file, ENCODER, _NO_VOICE_DB, DEFAULT_SILENCE_DBFS)) as there:
            yield timed("the same, voices stay on the GPU", _run_of(there, engine, segment), callers)


def _alone(halved: SpleeterNet, mixture: NDArray[np.float32]) -> Callable[[], object]:
    """A call of the network from samples to samples, which stay on the device."""
    from singerembed.engine.spleeter import SpleeterOfSamples

    network = SpleeterOfSamples(copy.deepcopy(halved), SPEC).cuda()
    there = torch.from_numpy(mixture).cuda()

    def call() -> None:
        with torch.inference_mode():
            network(there)
        torch.cuda.synchronize()

    return call


if __name__ == "__main__":
    for one in separator_times():
        crops_per_second = one.crops / sorted(one.seconds)[REPEATS // 2]
        print(f"{one.what:<52} {crops_per_second:>12,.0f} crops/s  {one.note}", flush=True)
