"""The detector of voices in crops of mixes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RATE
from numpy.typing import NDArray

from singerembed.model.mel import MelExtractor
from singerembed.model.spec import ModelSpec
from singerembed.model.vocal_activity import VocalDetector, activity_features

GOLDEN = Path(__file__).parents[1] / "golden" / "crops"
CROP = 4 * RATE
TIMES = np.arange(CROP) / RATE


@pytest.fixture(scope="module")
def detector() -> VocalDetector:
    return VocalDetector(ModelSpec(name="", method=""))


def sung(name: str) -> NDArray[np.float32]:
    pcm, rate = soundfile.read(GOLDEN / f"{name}.wav", dtype="float32", always_2d=True)
    assert rate == RATE
    return np.asarray(pcm[:CROP].mean(axis=1), np.float32)


@cache
def band(seed: int) -> NDArray[np.float32]:
    """Struck chords, a bass and drums, a beat every half second."""
    rng = np.random.default_rng(seed)
    out = np.zeros(CROP)
    for i in range(8):
        after = np.maximum(0, TIMES - i / 2)
        struck = np.exp(-3 * after) * (i / 2 <= TIMES)
        root = 55 * 2 ** (rng.integers(12) / 12)
        for times in (1, 2, 4, 5, 6, 8):
            for k in range(1, 9):
                out += struck * np.sin(2 * np.pi * k * times * root * after) / k**1.5
        out += 3 * rng.standard_normal(CROP) * np.exp(-30 * after) * (i / 2 <= TIMES)
    return np.asarray(0.9 * out / np.abs(out).max(), np.float32)


@pytest.mark.parametrize("name", ["alto", "bass", "soprano", "tenor"])
def test_a_voice_over_a_band_is_told_from_the_band_alone(detector: VocalDetector, name: str) -> None:
    voice = sung(name)
    for seed in (1, 2):
        alone = band(seed)
        as_loud = alone * np.float32(np.sqrt((voice**2).mean() / (alone**2).mean()))
        assert detector.score(alone) < 0 < detector.score(voice + as_loud) < detector.score(voice)


def test_the_score_does_not_depend_on_the_level_or_the_type(detector: VocalDetector) -> None:
    crop = sung("alto") + np.float32(0.1) * band(1)
    crop *= np.float32(0.9) / np.abs(crop).max()
    assert detector.score(np.asarray(crop / 4, np.float32)) == pytest.approx(detector.score(crop), abs=0.5)
    assert detector.score(np.round(crop * 32767).astype(np.int16)) == pytest.approx(detector.score(crop), abs=0.5)


def test_features_of_crops_do_not_depend_on_each_other() -> None:
    rng = np.random.default_rng(0)
    crops = (0.1 * rng.standard_normal((3, CROP))).astype(np.float32)
    mel = MelExtractor(ModelSpec(name="", method="", normalise=1.0)).log_mel(crops).mel
    together = activity_features(mel)
    for i in range(3):
        np.testing.assert_array_equal(activity_features(mel[i : i + 1])[0], together[i])


def test_other_crops_and_mel_bands_are_not_for_it() -> None:
    assert VocalDetector.fits(ModelSpec(name="", method=""))
    assert not VocalDetector.fits(ModelSpec(name="", method="", n_mels=64))
    assert not VocalDetector.fits(ModelSpec(name="", method="", crop_samples=CROP // 2))
