"""The CPU back end of our own: the network in C++ for its one size of spectrogram, fed with an ONNX model's weights.

Its payload is the model that ONNX Runtime would run, so that a machine without AVX2 runs the same engine there.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.base import EmbeddedCrops, Engine
from singerembed.engine.file import EngineFile
from singerembed.engine.onnx_tensors import read_layers
from singerembed.engine.onnxruntime import OnnxRuntimeEngine
from singerembed.errors import EngineError
from singerembed.model.encoder import CompiledEncoder
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, Pcm, available_isas
from singerembed.model.spec import ModelSpec

_TRIAL_ROUNDS = 7


class NativeEngine:
    """An engine whose payload is the encoder's ONNX model, run by the extension."""

    batch = 4  # crops: as many go through the last stages together, which read most of the weights
    waits = False

    def __init__(self, file: EngineFile, silence_dbfs: float = DEFAULT_SILENCE_DBFS, *, isa: str = "") -> None:
        """Load `file`. `isa`: see `CompiledEncoder`. Raises EngineError if its network is another."""
        self.spec = file.spec
        try:
            self.encoder = CompiledEncoder(file.spec, flat_weights(file.payload, file.spec), silence_dbfs, isa=isa)
        except ValueError as exc:
            raise EngineError(f"the native back end cannot load this engine: {exc}") from exc
        self.description = f"{file.spec.name}, {file.spec.precision}, native ({self.encoder.isa})"

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        """See `Engine.embed`."""
        return EmbeddedCrops(*self.encoder.embed(crops))

    def close(self) -> None:
        """Do nothing: the weights are freed with the last reference."""


def has_kernels() -> bool:
    """Return whether the extension has vector kernels for this processor, rather than the portable ones alone."""
    return len(available_isas()) > 1


def times_as_fast(file: EngineFile, crops: Pcm) -> float:
    """Return how many times as fast as ONNX Runtime the native back end embeds `crops` here, the two by turns."""
    engines: tuple[Engine, Engine] = NativeEngine(file), OnnxRuntimeEngine(file)
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(_TRIAL_ROUNDS):
        for engine, taken in zip(engines, seconds, strict=True):
            start = perf_counter()
            engine.embed(crops)
            taken.append(perf_counter() - start)
    native, other = (median(taken) for taken in seconds)
    return other / native


def flat_weights(model: bytes, spec: ModelSpec) -> NDArray[np.float32]:
    """Return the weights of the ONNX model in the order of csrc/encoder_network.h. Raises EngineError for another."""
    if spec.precision == "fp16" or spec.backbone != "efficientnet_b0":
        raise EngineError(
            f"the native back end runs efficientnet_b0 in fp32 or int8, not {spec.backbone} in {spec.precision}"
        )
    layers = read_layers(model)
    if not layers or layers[0][0].shape[1:] != (3, 3, 3):
        raise EngineError("this is not the encoder's network: it does not begin with a convolution of three channels")
    flat = [part.ravel() for layer in layers[1:] for part in layer]
    return np.concatenate([*_stem(*layers[0], spec), *flat]).astype(np.float32)


def _stem(
    weights: NDArray[np.float32], bias: NDArray[np.float32], spec: ModelSpec
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fold the normalisation of three equal channels into weights [32, 9] for one, and biases [3, 3, 32].

    A channel c is (x - mean_c) / std_c inside the image and 0 in the border, so the part of the bias that comes from
    the means is summed over the taps inside: of a convolution at the upper or left border, within, at the lower or
    right one.
    """
    mean, std = (np.array(value, np.float64)[:, np.newaxis, np.newaxis] for value in (spec.image_mean, spec.image_std))
    offsets = -(weights * mean / std).sum(axis=1)  # [32, 3, 3]
    inside = (slice(1, 3), slice(0, 3), slice(0, 2))
    biases = [[bias + offsets[:, rows, columns].sum(axis=(1, 2)) for columns in inside] for rows in inside]
    return (weights / std).sum(axis=1).ravel(), np.array(biases).ravel()
