"""Separate the voice from a mixture: an ONNX network masks a spectrogram, or maps samples to samples.

The network runs on the CPU, or on a GPU by ONNX Runtime's CUDA provider or TensorRT. Spectrograms are computed on the
CPU, and for TensorRT by the network itself.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from singerembed.engine.file import SeparatorFile
from singerembed.engine.onnxruntime import new_session
from singerembed.engine.separator_gpu import MIXTURE_NAME, VOICE_NAME, CropMix, DeviceVoice, SegmentRunner, open_plan
from singerembed.engine.tensorrt import LIBRARIES
from singerembed.errors import EngineError
from singerembed.model.separator_spec import SeparatorSpec, SpectrogramSpec, WaveformSpec

INPUT_NAME = "magnitude"  # of a network that masks a spectrogram
OUTPUT_NAME = "mask"
_FRAMES_AT_ONCE = 32  # of the transforms: what fits into a processor's second cache
_AT_ONCE_ON_GPU = 2  # segments: while one is computed, another is copied; more would only hold device memory


class Separator:
    """A separator engine. Thread-safe; a segment's result depends on nothing else.

    On the CPU a segment runs on the calling thread alone.
    """

    def __init__(self, file: SeparatorFile, device: int = 0, crop_mix: CropMix | None = None) -> None:
        """Load `file`; a plan, or where ONNX Runtime can use it, on CUDA device `device`, else on the CPU.

        `crop_mix`: of the encoder that `voice_on_device` is for. Raises EngineError if the network cannot be loaded,
        and MissingDependencyError for a plan without its library.
        """
        from singerembed.engine import onnxruntime_cuda

        self.spec = file.spec
        self._runner: SegmentRunner | None = None
        self._takes_samples = True
        if file.backend in LIBRARIES:
            self._runner = open_plan(file, device, crop_mix)
            self.description = f"{file.spec.name}, {file.build.get('precision')}, {self._runner.description}"
            return
        if file.backend != "onnxruntime":
            raise EngineError(f"a separator has no back end {file.backend!r}. Build it again")
        on_gpu = onnxruntime_cuda.is_usable()
        self.description = f"{file.spec.name}, ONNX Runtime {onnxruntime.__version__}{' (CUDA)' if on_gpu else ''}"
        self._session = onnxruntime_cuda.open_session(file.payload, device) if on_gpu else new_session(file.payload)
        self._turn: AbstractContextManager[object] = threading.Semaphore(_AT_ONCE_ON_GPU) if on_gpu else nullcontext()
        self._takes_samples = self._session.get_inputs()[0].name == MIXTURE_NAME

    def close(self) -> None:
        """Free the device. The separator cannot be used afterwards."""
        if self._runner is not None:
            self._runner.close()

    def vocals(self, segment: NDArray[np.float32]) -> NDArray[np.float32]:
        """Separate `segment`, float32 [samples, channels], full scale 1; return the voice, of the same shape.

        `samples` is a result of `SeparatorSpec.segment_samples`. Raises EngineError.
        """
        if isinstance(self.spec, WaveformSpec):
            return voice_of(self.waveforms(segment, self.spec), self.spec)
        assert isinstance(self.spec, SpectrogramSpec)
        if not self._takes_samples:
            return self._masked(segment, self.spec)
        voice: NDArray[np.float32] = self._run(VOICE_NAME, MIXTURE_NAME, network_input(segment, self.spec))
        return voice.reshape(self.spec.channels, -1).T

    def stays_on(self, device: int) -> bool:
        """Whether `voice_on_device` leaves its voices on CUDA device `device`."""
        return self._runner is not None and self._runner.leaves_voices and self._runner.device_index == device

    def voice_on_device(self, segment: NDArray[np.float32], first: int, samples: int) -> DeviceVoice:
        """As `vocals`, but leave the voice where it is, and no more than a crop. See `SegmentRunner.voice`."""
        assert self._runner is not None
        return self._runner.voice(network_input(segment, self.spec), first, samples)

    def waveforms(self, segment: NDArray[np.float32], spec: WaveformSpec) -> NDArray[np.float32]:
        """Return what a network from samples to samples gives for `segment`, with all stems. Raises EngineError."""
        output: NDArray[np.float32] = self._run(spec.output_name, spec.input_name, network_input(segment, spec))
        return output

    def _masked(self, segment: NDArray[np.float32], spec: SpectrogramSpec) -> NDArray[np.float32]:
        spectrum = stft(segment, spec)
        magnitude = np.abs(spectrum[:, :, : spec.n_bins])[np.newaxis]
        spectrum[:, :, : spec.n_bins] *= self._run(OUTPUT_NAME, INPUT_NAME, magnitude)[0]
        spectrum[:, :, spec.n_bins :] = 0
        return inverse_stft(spectrum, spec)

    def _run(self, output_name: str, input_name: str, values: NDArray[np.float32]) -> Any:
        if self._runner is not None:
            return self._runner.run(values)
        try:
            with self._turn:
                return self._session.run([output_name], {input_name: values})[0]
        except Exception as exc:  # ONNX Runtime's exceptions have no common base class
            raise EngineError(f"ONNX Runtime failed: {exc}") from exc


def network_input(segment: NDArray[np.float32], spec: SeparatorSpec) -> NDArray[np.float32]:
    """Return [samples, channels] in the shape that a network from samples to samples takes."""
    channels = np.ascontiguousarray(segment.T)
    if isinstance(spec, SpectrogramSpec):
        return channels.reshape(spec.channels, -1, spec.hop_samples)
    return channels[np.newaxis] if isinstance(spec, WaveformSpec) and spec.batch_axis else channels


def voice_of(output: NDArray[np.float32], spec: WaveformSpec) -> NDArray[np.float32]:
    """Return the voice in what `Separator.waveforms` gave, [samples, channels]."""
    stems = output[0] if spec.batch_axis else output
    vocals: NDArray[np.float32] = stems if spec.stem is None else stems[spec.stem]
    return vocals.T


def stft(segment: NDArray[np.float32], spec: SpectrogramSpec) -> NDArray[np.complex64]:
    """Transform [samples, channels] to [channels, frames, n_fft / 2 + 1]; the first frame begins with the segment."""
    channels: Any = np.ascontiguousarray(segment.T)
    frames = np.lib.stride_tricks.sliding_window_view(channels, spec.n_fft, axis=1)[:, :: spec.hop_samples]
    # Normalised and undone: without, numpy computes in double precision, which takes 3.2 times as long.
    window = _window(spec) * np.float32(spec.n_fft)
    spectrum = np.empty((*frames.shape[:2], spec.n_fft // 2 + 1), np.complex64)
    for first in range(0, frames.shape[1], _FRAMES_AT_ONCE):
        part = slice(first, first + _FRAMES_AT_ONCE)
        spectrum[:, part] = np.fft.rfft(frames[:, part] * window, norm="forward")
    return spectrum


def inverse_stft(spectrum: NDArray[np.complex64], spec: SpectrogramSpec) -> NDArray[np.float32]:
    """Transform back by adding overlapping frames; exact but for the first and the last n_fft - hop samples."""
    # The squares of the window, added at this hop, are a constant.
    window = _window(spec) * np.float32(spec.hop_samples / np.sum(_window(spec).astype(np.float64) ** 2))
    channels, n = spectrum.shape[:2]
    hops = spec.n_fft // spec.hop_samples
    signal = np.zeros((channels, n + hops - 1, spec.hop_samples), np.float32)
    for first in range(0, n, _FRAMES_AT_ONCE):
        frames = np.fft.irfft(spectrum[:, first : first + _FRAMES_AT_ONCE], spec.n_fft).astype(np.float32, copy=False)
        frames *= window
        pieces = frames.reshape(channels, -1, hops, spec.hop_samples)
        for i in range(hops):
            signal[:, first + i : first + i + pieces.shape[1]] += pieces[:, :, i]
    return signal.reshape(channels, -1).T


def _window(spec: SpectrogramSpec) -> NDArray[np.float32]:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.n_fft) / spec.n_fft)).astype(np.float32)
