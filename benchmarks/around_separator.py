"""Processor time that a run's threads spend on a crop around a separator's network, for two ways of running it.

python -m benchmarks.around_separator [--rounds N]

The network itself answers at once, so no GPU is needed: voices that stay on a GPU (a plan of TensorRT) against
transforms on the CPU and voices that come back (ONNX Runtime's CUDA provider).
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fakes import InstantEngine
from benchmarks.measure import processor_seconds
from singerembed.audio.crops import CropBlock
from singerembed.engine.base import EmbeddedCrops, Engine
from singerembed.engine.build_separator import made_mixture
from singerembed.engine.file import EngineFile
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.ring import Request
from singerembed.engine.separation import Separation
from singerembed.engine.separator import Separator, inverse_stft, network_input, stft
from singerembed.engine.separator_gpu import DeviceVoice
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, LOUD
from singerembed.model.separator_spec import SpectrogramSpec
from singerembed.model.spec import ModelSpec

SPEC = SpectrogramSpec(name="instant", weights_sha256="")
ENCODER = ModelSpec(name="instant", method="untrained")
SEGMENT = SPEC.segment_samples(ENCODER.crop_samples)
CROPS = 8  # of a track


class InstantSeparator(Separator):
    """Does all but the network."""

    def __init__(self) -> None:
        self.spec, self.description = SPEC, "instant"
        self._lane = np.empty(network_input(np.zeros((SEGMENT, SPEC.channels), np.float32), SPEC).shape, np.float32)

    def vocals(self, segment: NDArray[np.float32]) -> NDArray[np.float32]:
        spectrum = stft(segment, SPEC)
        spectrum[:, :, : SPEC.n_bins] *= np.abs(spectrum[:, :, : SPEC.n_bins])
        spectrum[:, :, SPEC.n_bins :] = 0
        return inverse_stft(spectrum, SPEC)

    def stays_on(self, device: int) -> bool:
        return True

    def voice_on_device(self, segment: NDArray[np.float32], first: int, samples: int) -> DeviceVoice:
        self._lane[:] = network_input(segment, SPEC)
        slot: Any = None
        return DeviceVoice(1.0, slot)


class InstantGpu(GpuEngine):
    """An encoder on a GPU that answers at once."""

    def __init__(self) -> None:
        self.spec, self.device_index = ENCODER, 0

    def start_on_device(self, slot: Any) -> Request:
        return Request(1, ENCODER.embedding_dim)

    @staticmethod
    def result(request: Request) -> EmbeddedCrops:
        request.state[:] = LOUD
        return EmbeddedCrops(request.embedding, request.peak, request.rms, request.state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    separation = Separation(InstantSeparator(), ENCODER, -1000.0, DEFAULT_SILENCE_DBFS)
    pcm = np.stack([made_mixture(SEGMENT, SPEC.sample_rate)] * CROPS)
    start = np.arange(CROPS) * ENCODER.crop_samples
    block = CropBlock(pcm, list(range(CROPS)), start, start + SEGMENT)
    engines: dict[str, Engine] = {
        "voices stay on the GPU": InstantGpu(),
        "transforms on the CPU": InstantEngine(EngineFile(ENCODER, "", b"", {}, {}), DEFAULT_SILENCE_DBFS, 0),
    }
    seconds = {
        name: processor_seconds(lambda engine=engine: separation.embed(block, engine), rounds) / CROPS  # type: ignore[misc]
        for name, engine in engines.items()
    }
    best = min(seconds.values())
    for name, one in seconds.items():
        print(f"{name:<24} {one * 1e3:6.2f} ms of processor time a crop, {one / best:.1f} times the least")


if __name__ == "__main__":
    main()
