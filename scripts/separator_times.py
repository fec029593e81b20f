"""Measures a separator on the GPU: as a run feeds it, its transforms, its network with copies and without.

gpu_times.py has these rows too; alone, in a third of a minute: python scripts/separator_times.py

The network is Spleeter's with drawn weights, which take the same time as trained ones.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from singerembed.audio.crops import CropBlock
from singerembed.engine import onnxruntime_cuda
from singerembed.engine.build_separator import export_onnx, made_mixture
from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.file import EngineFile, SeparatorFile
from singerembed.engine.onnxruntime import new_session
from singerembed.engine.separation import Separation
from singerembed.engine.separator import Separator, inverse_stft, stft
from singerembed.engine.separator_gpu import INPUT_NAME, OUTPUT_NAME, SegmentRunner, separator_tensors
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
    for rows in (_by_onnxruntime(file, halved, callers), _by_plans_runtime(network, callers), _by_torch(network)):
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
    yield timed("separator, as a run feeds it, float32", _run_of(separator, segment), callers)
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


def _run_of(separator: Separator, segment: NDArray[np.float32]) -> Callable[[], object]:
    """What a thread of a run does with a crop between decoding and the encoder."""
    sys.path.append(str(Path(__file__).parents[1]))  # behind the installed package
    from benchmarks.fakes import InstantEngine

    separation = Separation(separator, ENCODER, _NO_VOICE_DB, DEFAULT_SILENCE_DBFS)
    engine = InstantEngine(EngineFile(ENCODER, "", b"", {}, {}), DEFAULT_SILENCE_DBFS, 0)
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


# --- torch ------------------------------------------------------------------------------------------------------------


class Masker(torch.nn.Module):
    """Both U-Nets in `dtype`, and the mask in float32."""

    def __init__(self, network: SpleeterNet, dtype: torch.dtype) -> None:
        super().__init__()
        self._both, self._dtype = copy.deepcopy(network).to(dtype).to(memory_format=torch.channels_last), dtype

    def forward(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Map magnitudes [batch, channels, frames, bins], float32, to the mask of the voice."""
        seen = magnitude.to(self._dtype).contiguous(memory_format=torch.channels_last)
        vocals, others = ((stem(seen) * magnitude) ** 2 for stem in (self._both.vocals, self._both.accompaniment))
        share: torch.Tensor = vocals / (vocals + others + 1e-10)
        return share


def _by_torch(network: SpleeterNet, place: str = "cuda") -> Iterator[Timed]:
    """Measure the network, and what a separator would give that sends PCM up and keeps the voice on the device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    window = torch.hann_window(SPEC.n_fft, device=place)
    pcm = torch.from_numpy(np.ascontiguousarray(made_mixture(SEGMENT, SPEC.sample_rate).T))
    for name, dtype in (("float32", torch.float32), ("FP16", torch.float16)):
        masker = Masker(network, dtype).to(place)
        for together in TOGETHER:
            mixtures = pcm.repeat(together, 1)
            mixtures = mixtures.pin_memory() if place == "cuda" else mixtures
            magnitude = torch.rand(together, SPEC.channels, FRAMES, SPEC.n_bins, device=place)

            def network_alone(masker: Masker = masker, magnitude: torch.Tensor = magnitude) -> None:
                with torch.inference_mode():
                    masker(magnitude)
                _wait(place)

            def all_there(masker: Masker = masker, mixtures: torch.Tensor = mixtures) -> None:
                with torch.inference_mode():
                    _voice(mixtures.to(place, non_blocking=True), masker, window)
                _wait(place)

            yield timed(f"separator by torch, {name}, network, {together} at a time", network_alone, crops=together)
            yield timed(f"the same, from PCM up to voices there, {together}", all_there, crops=together)


def _by_plans_runtime(network: SpleeterNet, callers: int) -> Iterator[Timed]:
    """Measure the runtime of TensorRT's plans, with torch in the place of the plan."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from torch_network import TorchSegments

    tensors = separator_tensors(SPEC)
    halved, magnitude = network.in_fp16(), np.ones((1, SPEC.channels, FRAMES, SPEC.n_bins), np.float32)
    runner = SegmentRunner(tensors, CudaDevice, lambda device: TorchSegments(halved, tensors, device.index))
    yield timed("separator by torch, FP16, on the runtime of plans", lambda: runner.run(magnitude), callers)
    runner.close()


def _voice(mixtures: torch.Tensor, masker: Masker, window: torch.Tensor) -> torch.Tensor:
    """The voices in mono of [n * channels, samples]."""
    n_fft, hop = SPEC.n_fft, SPEC.hop_samples
    spectrum = torch.stft(mixtures, n_fft, hop, window=window, return_complex=True)[:, :, :FRAMES]
    seen = spectrum[:, : SPEC.n_bins].reshape(-1, SPEC.channels, SPEC.n_bins, FRAMES)
    mask = masker(seen.abs().transpose(2, 3)).transpose(2, 3)
    voice = torch.zeros_like(spectrum)
    voice[:, : SPEC.n_bins] = (seen * mask).flatten(0, 1)
    stereo: torch.Tensor = torch.istft(voice, n_fft, hop, window=window)
    return stereo.reshape(len(seen), SPEC.channels, -1).mean(1)


def _wait(place: str) -> None:
    if place == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    for one in separator_times():
        crops_per_second = one.crops / sorted(one.seconds)[REPEATS // 2]
        print(f"{one.what:<52} {crops_per_second:>12,.0f} crops/s  {one.note}", flush=True)
