"""The mel extension against the official values, float64, and itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tolerances
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from singerembed import _csrc
from singerembed.errors import EngineError
from singerembed.model.mel import INVALID, LOUD, SILENT, MelExtractor, available_isas, cuda_mel, mel_basis, mix_down
from singerembed.model.spec import ModelSpec

ISAS = available_isas()


def mel_in_float64(pcm: NDArray[np.int16], basis: NDArray[np.float32]) -> NDArray[np.float64]:
    """The formulas of csrc/mel.h by numpy, [n_mels, n_frames]."""
    x = pcm / np.abs(pcm.astype(np.float64)).max()
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, 1024, mode="reflect"), 2048)[::512]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    return np.asarray(basis.astype(np.float64) @ power.T)


def share_of_maximum(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float((np.abs(a - b).max(axis=(-2, -1)) / b.max(axis=(-2, -1))).max())


@pytest.mark.parametrize("isa", ISAS)
def test_power_equals_the_official_pipeline(golden: Golden, spec: ModelSpec, isa: str) -> None:
    mel = MelExtractor(spec, isa=isa).power(golden.pcm).mel
    assert mel.shape == golden.mel.shape
    assert share_of_maximum(mel, golden.mel) <= tolerances.MEL_OFFICIAL
    log_difference = np.abs(np.log(mel + spec.log_offset) - np.log(golden.mel + spec.log_offset)).max()
    assert log_difference <= tolerances.LOG_MEL_OFFICIAL


@pytest.mark.parametrize("isa", ISAS)
def test_power_and_logarithm_equal_float64(golden: Golden, spec: ModelSpec, isa: str) -> None:
    extractor = MelExtractor(spec, isa=isa)
    expected = np.stack([mel_in_float64(pcm, extractor.basis) for pcm in golden.pcm])
    assert share_of_maximum(extractor.power(golden.pcm).mel, expected) <= tolerances.MEL_FLOAT64
    log = np.log(expected + spec.log_offset)
    normalised = log / log.max(axis=(1, 2), keepdims=True)
    assert np.abs(extractor.log_mel(golden.pcm).mel - normalised).max() <= tolerances.LOG_MEL_FLOAT64
    by_constant = MelExtractor(replace(spec, normalise=9.2), isa=isa).log_mel(golden.pcm).mel
    assert np.abs(by_constant - log / 9.2).max() <= tolerances.LOG_MEL_FLOAT64


def test_instruction_sets_agree(golden: Golden, spec: ModelSpec) -> None:
    mels = [MelExtractor(spec, isa=isa).power(golden.pcm).mel for isa in ISAS]
    for mel in mels[1:]:
        assert share_of_maximum(mel, mels[0]) <= tolerances.MEL_BETWEEN_ISAS


@pytest.mark.parametrize("isa", ISAS)
def test_int16_and_float_give_the_same_bits(golden: Golden, spec: ModelSpec, isa: str) -> None:
    extractor = MelExtractor(spec, isa=isa)
    from_int16 = extractor.log_mel(golden.pcm)
    from_float = extractor.log_mel((golden.pcm / 32768).astype(np.float32))
    assert np.array_equal(from_int16.mel, from_float.mel)
    assert np.array_equal(from_int16.peak, from_float.peak)


def test_a_crop_does_not_depend_on_its_batch(golden: Golden, spec: ModelSpec) -> None:
    extractor = MelExtractor(spec)
    together = extractor.log_mel(golden.pcm).mel
    for i in range(len(golden.pcm)):
        assert np.array_equal(extractor.log_mel(golden.pcm[i : i + 1]).mel[0], together[i])
    assert np.array_equal(extractor.log_mel(golden.pcm[::-1].copy()).mel[::-1], together)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("crop_samples", [2048, 2049, 2559, 2560, 2561, 8191, 8192, 8193, 10_000, 30_001])
def test_other_crop_lengths(spec: ModelSpec, isa: str, crop_samples: int) -> None:
    """Lengths on both sides of where rows, tiles and groups of frames end."""
    extractor = MelExtractor(replace(spec, crop_samples=crop_samples), isa=isa)
    pcm = np.random.default_rng(crop_samples).integers(-20_000, 20_000, (2, crop_samples)).astype(np.int16)
    mel = extractor.power(pcm).mel
    assert mel.shape == (2, 128, 1 + crop_samples // 512)
    expected = np.stack([mel_in_float64(one, extractor.basis) for one in pcm])
    assert share_of_maximum(mel, expected) <= tolerances.MEL_FLOAT64


def test_levels(golden: Golden, spec: ModelSpec) -> None:
    batch = MelExtractor(spec).log_mel(golden.pcm)
    x = golden.pcm / 32768
    assert np.allclose(batch.peak, np.abs(x).max(axis=1), rtol=tolerances.LEVEL)
    assert np.allclose(batch.rms, np.sqrt((x**2).mean(axis=1)), rtol=tolerances.LEVEL)
    assert (batch.state == LOUD).all()


@pytest.mark.parametrize("isa", ISAS)
def test_silent_and_invalid_crops_get_no_spectrogram(spec: ModelSpec, isa: str) -> None:
    crops = np.random.default_rng(0).standard_normal((7, spec.crop_samples)).astype(np.float32)
    crops[0] = 0
    crops[1] *= 0.9e-3 / np.abs(crops[1]).max()  # below -60 dBFS
    crops[2] *= 1.1e-3 / np.abs(crops[2]).max()
    crops[3, 100_000] = np.nan
    crops[4, -1] = np.inf
    crops[5] = 1e-40  # subnormal
    batch = MelExtractor(spec, isa=isa).log_mel(crops)
    assert batch.state.tolist() == [SILENT, SILENT, LOUD, INVALID, INVALID, SILENT, LOUD]
    assert batch.mel.shape[0] == 2
    assert np.isfinite(batch.mel).all()
    assert np.array_equal(batch.mel[1], MelExtractor(spec, isa=isa).log_mel(crops[6:]).mel[0])
    assert np.isnan(batch.peak[[3, 4]]).all()
    assert batch.peak[0] == 0


def test_extremes_of_int16_and_float(spec: ModelSpec) -> None:
    extractor = MelExtractor(spec)
    square = np.where(np.arange(spec.crop_samples) % 100 < 50, -32768, 32767).astype(np.int16)
    batch = extractor.log_mel(square[np.newaxis])
    assert batch.peak[0] == 1.0
    assert np.isfinite(batch.mel).all()
    loud = (square[np.newaxis] / 32768).astype(np.float32)
    for gain in (1e-2, 1e10, 1e30):  # peak normalisation takes any gain out, though squares overflow at 1e30
        scaled = extractor.log_mel(loud * np.float32(gain))
        assert scaled.state[0] == LOUD
        assert np.abs(scaled.mel - batch.mel).max() <= tolerances.LOG_MEL_FLOAT64


def test_silence_threshold_is_an_option(golden: Golden, spec: ModelSpec) -> None:
    peaks_dbfs = 20 * np.log10(MelExtractor(spec).log_mel(golden.pcm).peak)
    state = MelExtractor(spec, silence_dbfs=-20.0).log_mel(golden.pcm).state
    assert ((state == SILENT) == (peaks_dbfs <= -20)).all()
    assert (state == SILENT).sum() == 1  # the quiet one


def test_wrong_arrays_are_refused(spec: ModelSpec) -> None:
    extractor = MelExtractor(spec)
    with pytest.raises(ValueError, match=r"1000 samples each; this plan takes 176400"):
        extractor.log_mel(np.zeros((1, 1000), np.int16))
    for wrong in (np.zeros((1, spec.crop_samples)), np.zeros(spec.crop_samples, np.int16)):
        with pytest.raises(TypeError):
            extractor.log_mel(wrong)  # type: ignore[arg-type]
    assert extractor.log_mel(np.zeros((0, spec.crop_samples), np.int16)).mel.shape == (0, 128, 345)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_fft", 1024, "1024"),
        ("hop_samples", 256, "256"),
        ("crop_samples", 1000, "crop_samples"),
        ("n_mels", 0, "n_mels"),
        ("mel_fmax", 20_000.0, "mel_fmax"),
        ("mel_fmin", 12_000.0, "mel_fmin"),
        ("log_offset", 0.0, "log_offset"),
    ],
)
def test_impossible_specs_are_refused(spec: ModelSpec, field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MelExtractor(replace(spec, **{field: value}))  # type: ignore[arg-type]


def test_unknown_isa_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match="portable"):
        MelExtractor(spec, isa="mmx")


def test_basis_is_sparse_and_of_equal_area(spec: ModelSpec) -> None:
    basis = mel_basis(spec)
    assert basis.shape == (128, 1025)
    assert np.count_nonzero(basis) == 2018
    bin_hz = spec.mel_sample_rate / spec.n_fft
    wide = np.count_nonzero(basis, axis=1) > 8  # narrow triangles are sampled too coarsely for their sum to say much
    assert np.allclose(basis[wide].sum(axis=1) * bin_hz, 1, atol=0.05)


@given(st.integers(1, 9), st.integers(0, 100), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_mix_down_is_the_mean(channels: int, frames: int, seed: int) -> None:
    pcm = np.random.default_rng(seed).standard_normal((frames, channels)).astype(np.float32)
    mono, cancelled = mix_down(pcm, frames + 1)
    assert cancelled == 0
    assert np.allclose(mono, pcm.mean(axis=1) if frames else np.empty(0), rtol=1e-5, atol=1e-6)


def test_kernels_without_code_for_the_gpu_are_said_at_opening(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_code(_options: Any) -> None:
        raise RuntimeError("this build has no CUDA mel kernels for this GPU")

    monkeypatch.setattr(_csrc, "HAS_CUDA", True)
    monkeypatch.setattr(_csrc, "make_cuda_mel", no_code, raising=False)
    with pytest.raises(EngineError, match="no CUDA mel kernels for this GPU"):
        cuda_mel(spec)
