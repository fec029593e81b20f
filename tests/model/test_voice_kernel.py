"""The kernel that mixes a voice on the device down to mono, emulated on the host: against mix_down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerances import VOICE_ENERGY

from singerembed import _csrc
from singerembed.model.mel import mix_down


def mixed(
    voice: NDArray[np.float32], first: int, samples: int, crop: int, segment: int, order: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mono and energies of a crop of `voice`, [channels, samples]."""
    mono, energies = np.full(crop, np.nan, np.float32), np.full(-(-crop // segment), np.nan, np.float32)
    _csrc.emulate_mix_voice(
        voice=voice.ctypes.data,
        channels=voice.shape[0],
        stride=voice.shape[1],
        first=first,
        samples=samples,
        crop_samples=crop,
        segment=segment,
        mono=mono.ctypes.data,
        energies=energies.ctypes.data,
        order=order,
    )
    return mono, energies


def drawn(channels: int, n: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((channels, n)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([1, 2]),
    crop=st.integers(1, 2500),
    cut=st.integers(0, 2500),
    segment=st.integers(1, 900),
    first=st.integers(0, 50),
    seed=st.integers(0, 1 << 16),
    order=st.integers(0, 3),
)
def test_it_mixes_as_mix_down(
    channels: int, crop: int, cut: int, segment: int, first: int, seed: int, order: int
) -> None:
    """Also where the channels cancel in one segment, and where the recording ends within the crop."""
    samples = max(0, crop - cut)
    voice = drawn(channels, first + samples + 7, seed)
    if channels == 2:
        voice[1, first : first + segment] = -0.95 * voice[0, first : first + segment]
    mono, energies = mixed(voice, first, samples, crop, segment, order)
    wanted: Any = np.ascontiguousarray(voice[:, first : first + samples].T)
    np.testing.assert_array_equal(mono[:samples], mix_down(wanted, segment)[0])
    assert (mono[samples:] == 0).all()
    np.testing.assert_allclose(energies.sum(dtype=np.float64), (wanted.astype(float) ** 2).sum(), rtol=VOICE_ENERGY)


def test_the_louder_channel_is_taken_whichever_it_is() -> None:
    voice = drawn(2, 1000, seed=1)
    voice[1] = -1.05 * voice[0]
    np.testing.assert_array_equal(mixed(voice, 0, 1000, 1000, 1000)[0], voice[1])
    swapped = np.ascontiguousarray(voice[::-1])
    np.testing.assert_array_equal(mixed(swapped, 0, 1000, 1000, 1000)[0], voice[1])


def test_nan_stays_nan() -> None:
    voice = drawn(2, 600, seed=2)
    voice[0, 300] = np.nan
    mono, energies = mixed(voice, 0, 600, 600, 200)
    assert np.isnan(mono).sum() == 1
    assert np.isnan(energies).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"samples": 1001}, "beyond the voice"),
        ({"first": 1}, "beyond the voice"),
        ({"crop": 999}, "samples must lie"),
        ({"segment": 0, "crop": 1000}, "must be positive"),
        ({"channels": 3}, "one or two channels"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], message: str) -> None:
    asked = {"channels": 2, "first": 0, "samples": 1000, "crop": 1001, "segment": 100} | sizes
    with pytest.raises(ValueError, match=message):
        _csrc.emulate_mix_voice(
            voice=0,
            stride=1000,
            mono=0,
            energies=0,
            order=0,
            crop_samples=asked.pop("crop"),
            **asked,
        )
