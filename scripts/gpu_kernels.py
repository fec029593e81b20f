"""A batch of noise on the GPU, and the kernels that make log-mel spectrograms of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.cuda_driver import CudaDevice
from singerembed.model.mel import DEVICE_CROP, DEVICE_LEVEL, cuda_mel
from singerembed.model.spec import ModelSpec

SPEC = ModelSpec(name="timing", method="untrained")
MEL_VALUES = SPEC.n_mels * SPEC.n_frames  # of a crop


class NoiseBatch:
    """Pinned samples, and device memory for all steps; steps are enqueued on `stream`, in the order of the methods."""

    def __init__(self, device: CudaDevice, crops: int, sample_type: type[np.float32 | np.int16]) -> None:
        self.stream = device.stream()
        self._device, self._kernels, self._is_int16 = device, cuda_mel(SPEC), sample_type is np.int16
        size = SPEC.crop_samples * np.dtype(sample_type).itemsize
        self._pinned = device.pinned(crops * size)
        self._pcm: NDArray[Any] = self._pinned.array.view(sample_type).reshape(crops, SPEC.crop_samples)
        noise = np.random.default_rng(0).uniform(-0.9, 0.9, SPEC.crop_samples)
        self._pcm[:] = noise * (32767 if self._is_int16 else 1)
        self._levels, self._crops = np.zeros(crops, DEVICE_LEVEL), np.zeros(crops, DEVICE_CROP)
        sizes = self._pcm.nbytes, self._levels.nbytes, self._crops.nbytes, self._kernels.scratch_bytes(crops)
        self._buffers = [device.allocate(n) for n in (*sizes, 2 * crops * MEL_VALUES)]
        self._pcm_at, self._levels_at, self._crops_at, self._scratch_at, self._mel_at = (
            buffer.address for buffer in self._buffers
        )
        self._crops["pcm"] = self._pcm_at + np.arange(crops) * size

    def upload(self) -> None:
        """Copy the samples to the device."""
        self._device.upload(self._pcm_at, self._pcm, self.stream)

    def level(self) -> None:
        """Measure the levels of the crops."""
        self._kernels.level(
            self._pcm_at, is_int16=self._is_int16, crops=len(self._crops), levels=self._levels_at, stream=self.stream
        )

    def list_crops(self) -> None:
        """Wait for the levels, and hand the list of the crops with their scales to the device."""
        self._device.download(self._levels, self._levels_at, self.stream)
        self._device.synchronize()
        self._crops["scale"], self._crops["is_int16"] = self._levels["scale"], self._is_int16
        self._device.upload(self._crops_at, self._crops, self.stream)

    def mel(self) -> None:
        """Make the log-mel spectrograms, in FP16."""
        self._kernels.mel(
            self._crops_at,
            crops=len(self._crops),
            scratch=self._scratch_at,
            out=self._mel_at,
            stream=self.stream,
            half=True,
        )

    def free(self) -> None:
        """Free the memory of device and host."""
        for buffer in self._buffers:
            buffer.free()
        self._pinned.free()
