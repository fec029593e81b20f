"""Run the mel kernels, or their emulation on the host, on arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed import _csrc
from singerembed.model.mel import DEVICE_CROP, DEVICE_LEVEL, Pcm
from singerembed.model.spec import ModelSpec


def levels(kernels: _csrc.DeviceMel, pcm: Pcm) -> NDArray[np.void]:
    result = np.zeros(len(pcm), DEVICE_LEVEL)
    kernels.level(pcm.ctypes.data, is_int16=pcm.dtype == np.int16, crops=len(pcm), levels=result.ctypes.data, stream=0)
    return result


def spectrograms(
    kernels: _csrc.DeviceMel, spec: ModelSpec, pcm: Pcm, *, half: bool = False, power: bool = False
) -> NDArray[np.floating]:
    """What the kernels make of loud crops [n, crop_samples]."""
    crops = np.zeros(len(pcm), DEVICE_CROP)
    crops["pcm"] = [crop.ctypes.data for crop in pcm]
    crops["scale"] = levels(kernels, pcm)["scale"]
    crops["is_int16"] = pcm.dtype == np.int16
    scratch = np.empty(kernels.scratch_bytes(len(pcm)), np.uint8)
    out = np.empty((len(pcm), spec.n_mels, spec.n_frames), np.float16 if half else np.float32)
    addresses = {"scratch": scratch.ctypes.data, "out": out.ctypes.data}
    kernels.mel(crops.ctypes.data, crops=len(pcm), stream=0, half=half, power=power, **addresses)
    return out


def share_of_maximum(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float((np.abs(a - b) / b.max(axis=(1, 2), keepdims=True)).max())


def noise(spec: ModelSpec, n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (n, spec.crop_samples)).astype(np.float32)
