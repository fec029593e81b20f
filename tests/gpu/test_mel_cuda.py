"""The CUDA kernels on a GPU: what tests/model/test_mel_cuda_emulated.py says of their emulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from numpy.typing import NDArray
from tolerances import LEVEL, LOG_MEL_CUDA, MEL_CUDA, MEL_OFFICIAL, RMS_CUDA, VOICE_ENERGY

from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.device import VoiceMix
from singerembed.model.mel import DEVICE_CROP, DEVICE_LEVEL, LOUD, MelExtractor, Pcm, cuda_mel, mix_down
from singerembed.model.spec import ModelSpec

pytest_plugins = ["gpu_device"]  # no conftest.py here: it would take the place of tests/conftest.py in imports


@contextmanager
def memory(device: CudaDevice, *sizes: int) -> Iterator[list[int]]:
    """Device memory of these sizes."""
    buffers = [device.allocate(size) for size in sizes]
    try:
        yield [buffer.address for buffer in buffers]
    finally:
        for buffer in buffers:
            buffer.free()


def run(
    device: CudaDevice, spec: ModelSpec, pcm: Pcm, *, half: bool = False, power: bool = False
) -> tuple[NDArray[np.void], NDArray[Any]]:
    """Levels of all crops, and spectrograms of the loud ones."""
    kernels, stream = cuda_mel(spec), device.stream()
    levels = np.zeros(len(pcm), DEVICE_LEVEL)
    with memory(device, pcm.nbytes, levels.nbytes) as (pcm_at, levels_at):
        device.upload(pcm_at, pcm, stream)
        kernels.level(pcm_at, is_int16=pcm.dtype == np.int16, crops=len(pcm), levels=levels_at, stream=stream)
        device.download(levels, levels_at, stream)
        device.synchronize()
        loud = np.flatnonzero(levels["state"] == LOUD)
        crops = np.zeros(len(loud), DEVICE_CROP)
        crops["pcm"] = pcm_at + loud * pcm.strides[0]
        crops["scale"] = levels["scale"][loud]
        crops["is_int16"] = pcm.dtype == np.int16
        mel = np.empty((len(loud), spec.n_mels, spec.n_frames), np.float16 if half else np.float32)
        if not len(loud):  # there is no launch of nothing
            return levels, mel
        sizes = crops.nbytes, kernels.scratch_bytes(len(loud)), mel.nbytes
        with memory(device, *sizes) as (crops_at, scratch_at, mel_at):
            device.upload(crops_at, crops, stream)
            kernels.mel(
                crops_at, crops=len(loud), scratch=scratch_at, out=mel_at, stream=stream, half=half, power=power
            )
            device.download(mel, mel_at, stream)
            device.synchronize()
    return levels, mel


def share_of_maximum(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((np.abs(a - b) / b.max(axis=(1, 2), keepdims=True)).max(initial=0))


@pytest.mark.parametrize("sample_type", [np.int16, np.float32])
def test_equals_the_official_pipeline(device: CudaDevice, golden: Golden, spec: ModelSpec, sample_type: type) -> None:
    pcm: Pcm = golden.pcm if sample_type is np.int16 else golden.pcm.astype(np.float32) / np.float32(32768)
    _, power = run(device, spec, pcm, power=True)
    assert share_of_maximum(power, golden.mel) <= MEL_OFFICIAL


@pytest.mark.parametrize("n", [1, 3, 64, 200])
def test_equals_the_cpu_twin_on_fresh_input(device: CudaDevice, spec: ModelSpec, n: int) -> None:
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    pcm = rng.uniform(-0.9, 0.9, (n, spec.crop_samples)).astype(np.float32)
    pcm[n // 2 :: 5] *= np.float32(1e-4)  # silent
    pcm[n // 3 :: 7, 11] = np.nan
    twin = MelExtractor(spec)
    expected = twin.log_mel(pcm)
    levels, found = run(device, spec, pcm)
    np.testing.assert_array_equal(levels["state"], expected.state, err_msg=f"{seed = }")
    np.testing.assert_allclose(levels["peak"], expected.peak, rtol=LEVEL, err_msg=f"{seed = }")
    np.testing.assert_allclose(levels["rms"], expected.rms, rtol=RMS_CUDA, err_msg=f"{seed = }")
    np.testing.assert_allclose(found, expected.mel, atol=LOG_MEL_CUDA, err_msg=f"{seed = }")
    _, power = run(device, spec, pcm, power=True)
    assert share_of_maximum(power, twin.power(pcm).mel) <= MEL_CUDA, f"{seed = }"


def test_half_is_the_nearest_half(device: CudaDevice, golden: Golden, spec: ModelSpec) -> None:
    _, as_float = run(device, spec, golden.pcm)
    _, as_half = run(device, spec, golden.pcm, half=True)
    np.testing.assert_array_equal(as_half, as_float.astype(np.float16))


@pytest.mark.parametrize("channels", [1, 2])
def test_a_voice_is_mixed_down_as_on_the_cpu(device: CudaDevice, channels: int) -> None:
    """Also where its channels cancel, and where the recording ends within the crop."""
    crop, segment, first, samples = 176_400, 4410, 48_636, 150_001
    voice = np.random.default_rng(0).standard_normal((channels, 265_216)).astype(np.float32)
    voice[-1, first + segment : first + 3 * segment] = -voice[0, first + segment : first + 3 * segment]
    mono, energies, stream = np.empty(crop, np.float32), np.empty(crop // segment, np.float32), device.stream()
    with memory(device, voice.nbytes, mono.nbytes, energies.nbytes) as (voice_at, mono_at, energies_at):
        device.upload(voice_at, voice, stream)
        sizes = {"channels": channels, "stride": voice.shape[1], "first": first, "samples": samples}
        device.mix_voice(
            VoiceMix(voice=voice_at, crop_samples=crop, segment=segment, mono=mono_at, energies=energies_at, **sizes),
            stream,
        )
        device.download(mono, mono_at, stream)
        device.download(energies, energies_at, stream)
        device.synchronize()
    wanted = np.ascontiguousarray(voice[:, first : first + samples].T)
    np.testing.assert_array_equal(mono[:samples], mix_down(wanted, segment)[0])
    assert not mono[samples:].any()
    energy = np.square(wanted, dtype=np.float64).sum()
    np.testing.assert_allclose(energies.sum(dtype=np.float64), energy, rtol=VOICE_ENERGY)
