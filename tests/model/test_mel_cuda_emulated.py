"""The CUDA kernels, run thread by thread on the host: against the CPU twin, the official pipeline, and races."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from mel_kernels import levels, noise, share_of_maximum, spectrograms
from tolerances import LEVEL, LOG_MEL_CUDA, LOG_MEL_OFFICIAL, MEL_CUDA, MEL_OFFICIAL, RMS_CUDA

from singerembed import _csrc
from singerembed.model.mel import INVALID, LOUD, SILENT, MelExtractor, Pcm, emulated_mel
from singerembed.model.spec import ModelSpec

SMALL = ModelSpec(name="small", method="untrained", crop_samples=4096)


@pytest.mark.parametrize("sample_type", [np.int16, np.float32])
def test_equals_the_official_pipeline(golden: Golden, spec: ModelSpec, sample_type: type) -> None:
    pcm: Pcm = golden.pcm if sample_type is np.int16 else golden.pcm.astype(np.float32) / np.float32(32768)
    kernels = emulated_mel(spec)
    assert share_of_maximum(spectrograms(kernels, spec, pcm, power=True), golden.mel) <= MEL_OFFICIAL
    log_mel = np.log(golden.mel + np.float32(spec.log_offset))
    log_mel /= log_mel.max(axis=(1, 2), keepdims=True)
    assert np.abs(spectrograms(kernels, spec, pcm) - log_mel).max() <= LOG_MEL_OFFICIAL


def test_equals_the_cpu_twin(golden: Golden, spec: ModelSpec) -> None:
    kernels, twin = emulated_mel(spec), MelExtractor(spec)
    assert share_of_maximum(spectrograms(kernels, spec, golden.pcm, power=True), twin.power(golden.pcm).mel) <= MEL_CUDA
    expected = twin.log_mel(golden.pcm)
    assert np.abs(spectrograms(kernels, spec, golden.pcm) - expected.mel).max() <= LOG_MEL_CUDA
    found = levels(kernels, golden.pcm)
    np.testing.assert_allclose(found["peak"], expected.peak, rtol=LEVEL)
    np.testing.assert_allclose(found["rms"], expected.rms, rtol=RMS_CUDA)
    np.testing.assert_array_equal(found["state"], expected.state)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_order_of_threads_does_not_matter(order: int) -> None:
    """No race: any order between barriers gives the same bits, and the emulation found no two threads in one word."""
    pcm = noise(SMALL, 3)
    np.testing.assert_array_equal(
        spectrograms(emulated_mel(SMALL, order=order), SMALL, pcm), spectrograms(emulated_mel(SMALL), SMALL, pcm)
    )


def test_a_missing_barrier_would_be_found() -> None:
    with pytest.raises(RuntimeError, match="thread 1 reads what another thread writes"):
        _csrc.emulate_missing_barrier()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_crop_alone_equals_one_in_a_batch(n: int) -> None:
    kernels, pcm = emulated_mel(SMALL), noise(SMALL, n)
    together = spectrograms(kernels, SMALL, pcm)
    for i in range(n):
        np.testing.assert_array_equal(together[i], spectrograms(kernels, SMALL, pcm[i : i + 1])[0])


@settings(max_examples=20, deadline=None)
@given(
    crop_samples=st.integers(1024, 4000).map(lambda n: 2 * n),
    n_mels=st.sampled_from([1, 31, 32, 33, 128, 140]),
    normalise=st.sampled_from(["crop", 9.2]),
    sample_type=st.sampled_from([np.int16, np.float32]),
)
def test_other_shapes_equal_the_cpu_twin(
    crop_samples: int, n_mels: int, normalise: str | float, sample_type: type
) -> None:
    """Frames that do not fill a block, bands that do not fill a warp, both edges of a crop in one frame."""
    spec = replace(SMALL, crop_samples=crop_samples, n_mels=n_mels, normalise=normalise)
    pcm = noise(spec, 2, seed=crop_samples)
    pcm = (pcm * 32767).astype(np.int16) if sample_type is np.int16 else pcm
    expected = MelExtractor(spec).log_mel(pcm).mel
    np.testing.assert_allclose(spectrograms(emulated_mel(spec), spec, pcm), expected, atol=LOG_MEL_CUDA)


def test_silent_and_invalid_crops_are_told_apart_as_on_the_cpu() -> None:
    pcm = noise(SMALL, 9)
    pcm[0] = 0
    pcm[1] *= 0.5e-3 / np.abs(pcm[1]).max()  # -66 dBFS
    pcm[2, -1] = np.nan
    pcm[3, 0] = np.inf
    pcm[4, 7] = -np.inf
    pcm[5] = 1e-42  # subnormal
    pcm[6] = np.finfo(np.float32).max
    pcm[7] *= np.float32(1e-3) / np.abs(pcm[7]).max()  # at the threshold, or a rounding above it
    found, twin = levels(emulated_mel(SMALL), pcm), MelExtractor(SMALL).log_mel(pcm)
    np.testing.assert_array_equal(found["state"], twin.state)
    assert found["state"].tolist()[:7] == [SILENT, SILENT, INVALID, INVALID, INVALID, SILENT, LOUD]
    np.testing.assert_array_equal(found["peak"], twin.peak)
    assert np.isinf(found["rms"][6])
    assert np.isinf(twin.rms[6])
    assert (found["scale"][found["state"] != LOUD] == 0).all()


@pytest.mark.parametrize("amplitude", [1e-30, 1e-3, 1.0, 1e30])
def test_extreme_amplitudes_equal_the_cpu_twin(amplitude: float) -> None:
    pcm = noise(SMALL, 2) * np.float32(amplitude)
    twin = MelExtractor(SMALL, silence_dbfs=-700).log_mel(pcm)
    assert len(twin.mel) == 2
    found = spectrograms(emulated_mel(SMALL, -700), SMALL, pcm)
    np.testing.assert_allclose(found, twin.mel, atol=LOG_MEL_CUDA)


def test_full_scale_int16_equals_the_cpu_twin() -> None:
    pcm = np.full((1, SMALL.crop_samples), -32768, np.int16)
    pcm[0, ::7] = 32767
    # Power, not its logarithm: nearly all is at 0 Hz, and the other bands are its rounding.
    found = spectrograms(emulated_mel(SMALL), SMALL, pcm, power=True)
    assert share_of_maximum(found, MelExtractor(SMALL).power(pcm).mel) <= MEL_CUDA


def test_half_is_the_nearest_half() -> None:
    pcm = noise(SMALL, 2)
    kernels = emulated_mel(SMALL)
    np.testing.assert_array_equal(
        spectrograms(kernels, SMALL, pcm, half=True), spectrograms(kernels, SMALL, pcm).astype(np.float16)
    )


def test_half_stays_finite_where_float_does() -> None:
    """A lone click's maximum is nearly 0, and dividing by it gives numbers beyond the range of FP16."""
    spec = replace(SMALL, normalise=1e-5)
    found = spectrograms(emulated_mel(spec), spec, noise(SMALL, 1), half=True)
    assert np.isfinite(found).all()
    assert np.abs(found.astype(np.float32)).max() == np.finfo(np.float16).max


def test_shared_memory_is_read_and_written_without_bank_conflicts() -> None:
    """Passes over the banks that the transform takes, against the fewest possible."""
    kernels = emulated_mel(SMALL)
    spectrograms(kernels, SMALL, noise(SMALL, 1))
    ratio = {stage: taken / ideal for stage, (taken, ideal) in kernels.traffic().items()}
    assert ratio["samples"] == ratio["columns"] == ratio["rows"] == ratio["split"] == 1
    assert ratio["bands"] < 1.5  # lanes follow segments of different place and width


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="must be even, because samples are read in pairs; it is 4097"):
        emulated_mel(replace(SMALL, crop_samples=4097))
    kernels, pcm = emulated_mel(SMALL), noise(SMALL, 2)
    for crops in (0, 65536):
        with pytest.raises(ValueError, match="a batch has 1 to 65535 crops"):
            kernels.level(pcm.ctypes.data, is_int16=False, crops=crops, levels=0, stream=0)
    with pytest.raises(ValueError, match="multiple of 8"):
        kernels.level(pcm.ctypes.data + 4, is_int16=False, crops=1, levels=0, stream=0)
