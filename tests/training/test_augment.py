from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import parselmouth
import pytest
from numpy.typing import NDArray
from parselmouth.praat import call
from training_audio import tone, write

from singerembed.errors import SingerEmbedError, UsageError
from training import augment, pitch_worker
from training.augment import Augmenter, PitchShifter
from training.config import AugmentConfig
from training.reading import peak_normalised
from training.synthetic import SAMPLE_RATE, draw_singer, sing

ROOT = Path(__file__).parents[2]
NONE = AugmentConfig(pitch_probability=0, noise_probability=0, gain_probability=0, mask_probability=0)


@pytest.fixture(scope="module")
def voice() -> NDArray[np.float32]:
    rng = np.random.default_rng(4)
    clear = replace(draw_singer(rng), breath=0.005, jitter_cents=5, vibrato_cents=20, tremolo=0)  # pitch is to be read
    return sing(clear, 2.0, rng).astype(np.float32)


@pytest.fixture
def shifter() -> Iterator[PitchShifter]:
    shifter = PitchShifter()
    yield shifter
    shifter.close()


def median_pitch(pcm: NDArray[np.float32]) -> float:
    pitch = call(parselmouth.Sound(pcm.astype(float), SAMPLE_RATE), "To Pitch", 0.0, 75.0, 900.0)
    return float(call(pitch, "Get quantile", 0.0, 0.0, 0.5, "Hertz"))


def augmented(config: AugmentConfig, pcm: NDArray[np.float32], seed: int = 0) -> NDArray[np.float32]:
    return Augmenter(config, SAMPLE_RATE, shift_pitch=True)(pcm, np.random.default_rng(seed))


def test_nothing_asked_for_changes_nothing_but_the_peak(voice: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(augmented(NONE, voice), peak_normalised(voice))


@pytest.mark.parametrize("ratio", [1.3, 1 / 1.3])
def test_pitch_moves_by_the_ratio_and_the_spectral_envelope_stays(
    voice: NDArray[np.float32], shifter: PitchShifter, ratio: float
) -> None:
    shifted = shifter.shift(voice, SAMPLE_RATE, ratio, 1.0, seed=1)
    assert shifted.shape == voice.shape
    assert median_pitch(shifted) / median_pitch(voice) == pytest.approx(ratio, rel=0.05)
    # The vowel's formants would move by 30 % with a resampled voice, and the centre of the spectrum with them.
    assert spectral_centre(shifted) / spectral_centre(voice) == pytest.approx(1.0, abs=0.15)


def spectral_centre(pcm: NDArray[np.float32]) -> float:
    power = np.abs(np.fft.rfft(pcm)) ** 2
    frequencies = np.fft.rfftfreq(len(pcm), 1 / SAMPLE_RATE)
    band = (frequencies > 200) & (frequencies < 4000)
    return float((power * frequencies)[band].sum() / power[band].sum())


def test_a_shift_is_a_function_of_its_seed(voice: NDArray[np.float32], shifter: PitchShifter) -> None:
    other = PitchShifter()
    first = shifter.shift(voice, SAMPLE_RATE, 1.2, 1.3, seed=7)
    np.testing.assert_array_equal(first, shifter.shift(voice, SAMPLE_RATE, 1.2, 1.3, seed=7))
    np.testing.assert_array_equal(first, other.shift(voice, SAMPLE_RATE, 1.2, 1.3, seed=7))
    other.close()


def test_a_hang_in_praat_costs_the_limit_and_leaves_the_crop(
    voice: NDArray[np.float32], shifter: PitchShifter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "hanging.py"
    hanging.write_text("import sys, time\nsys.stdin.buffer.read(100)\ntime.sleep(600)\n")
    monkeypatch.setattr(pitch_worker, "__file__", str(hanging))
    # The request is larger than a pipe holds, and this worker reads only its beginning: writing hangs as well.
    started = time.monotonic()
    assert shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1, timeout_seconds=0.5) is voice
    assert time.monotonic() - started < 5
    monkeypatch.undo()
    assert shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1) is not voice  # the next call has a new process


def test_a_worker_that_dies_leaves_the_crop(
    voice: NDArray[np.float32], shifter: PitchShifter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1) is voice


def test_a_worker_that_never_works_ends_the_training(
    voice: NDArray[np.float32], shifter: PitchShifter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on without pitch shifts, and nobody would know."""
    for _ in range(4):
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            assert shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1) is voice
    assert shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1) is not voice  # counting begins anew
    monkeypatch.setattr(sys, "executable", "/bin/false")
    shifter.close()
    for _ in range(4):
        assert shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1) is voice
    with pytest.raises(SingerEmbedError, match=r"could not be shifted 5 times in succession.*pitch_probability"):
        shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1)


def test_a_training_does_not_load_praat() -> None:
    """Which is under the GPL, and runs in a process of its own."""
    code = "import sys, training.train; print('parselmouth' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_an_interrupt_is_not_the_workers(voice: NDArray[np.float32], shifter: PitchShifter) -> None:
    first = shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1)
    process = shifter._process
    assert process is not None
    process.send_signal(signal.SIGINT)
    np.testing.assert_array_equal(shifter.shift(voice, SAMPLE_RATE, 1.2, 1.0, seed=1), first)
    assert process is shifter._process
    assert process.poll() is None


def test_unvoiced_audio_and_silence_come_back_as_they_are(shifter: PitchShifter) -> None:
    for pcm in (np.zeros(22_050, np.float32), np.zeros(100, np.float32)):
        np.testing.assert_array_equal(shifter.shift(pcm, SAMPLE_RATE, 1.3, 1.5, seed=1), pcm)


def test_noise_has_the_amplitude_asked_for(voice: NDArray[np.float32]) -> None:
    config = NONE.model_copy(update={"noise_probability": 1.0, "noise_amplitude": (0.02, 0.02)})
    difference = augmented(config, voice) - peak_normalised(voice)
    assert float(difference.std()) == pytest.approx(0.02, rel=0.02)


def test_gain_and_mask_stay_in_their_ranges(voice: NDArray[np.float32]) -> None:
    gained = NONE.model_copy(update={"gain_probability": 1.0})
    peaks = [float(np.abs(augmented(gained, voice, seed)).max()) for seed in range(20)]
    assert 10 ** (-6 / 20) - 1e-6 <= min(peaks) < max(peaks) <= 1.0
    masked = NONE.model_copy(update={"mask_probability": 1.0})
    ones = np.ones(40_000, np.float32)
    shares = [float((augmented(masked, ones, seed) == 0).mean()) for seed in range(20)]
    assert 0 < max(shares) <= 1 / 8


def test_a_crop_is_a_function_of_its_generator_and_leaves_the_global_ones(voice: NDArray[np.float32]) -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    config = AugmentConfig(pitch_probability=0.0)
    first, second = augmented(config, voice, 1), augmented(config, voice, 1)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, augmented(config, voice, 2))
    assert (random.random(), np.random.random()) == expected


def test_transforms_of_audiomentations_by_name(voice: NDArray[np.float32]) -> None:
    config = NONE.model_copy(update={"channel": ({"transform": "PolarityInversion", "p": 1.0},)})
    np.testing.assert_array_equal(augmented(config, voice), -peak_normalised(voice))
    for fields, message in (
        ({"transform": "Nonsense"}, "Nonsense"),
        ({"transform": "Gain", "loudness": 3}, "loudness"),
    ):
        with pytest.raises(UsageError, match=message):
            Augmenter(NONE.model_copy(update={"channel": (fields,)}), SAMPLE_RATE, shift_pitch=False)


def test_half_of_the_ratios_are_reciprocals() -> None:
    rng = np.random.default_rng(0)
    ratios = np.array([augment.draw_ratio(1.3, rng) for _ in range(2000)])
    assert 1 / 1.3 <= ratios.min() < 0.8
    assert 1.28 < ratios.max() <= 1.3
    assert (ratios > 1).mean() == pytest.approx(0.5, abs=0.05)


# --- accompaniment --------------------------------------------------------------------------------------------------


def test_accompaniment_is_mixed_as_loud_as_drawn(voice: NDArray[np.float32], tmp_path: Path) -> None:
    write(tmp_path / "a" / "tone.flac", 0.01 * tone(4.0) / 0.5)
    write(tmp_path / "short.flac", tone(0.5))
    write(tmp_path / "silent.flac", np.zeros(4 * SAMPLE_RATE))
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    config = NONE.model_copy(update={"backing": str(tmp_path), "backing_probability": 1.0, "backing_db": (6.0, 6.0)})
    augmenter = Augmenter(config, SAMPLE_RATE, shift_pitch=False, crop_seconds=2.0)
    crop = voice[: 2 * SAMPLE_RATE]
    made = [augmenter(crop, np.random.default_rng(seed)) for seed in range(6)]
    mix = made[0].astype(np.float64)
    assert len(mix) == len(crop)
    # What is left after the voice is taken out is the band: a tone of 440 Hz.
    band = mix - (mix @ crop) / float(crop @ crop) * crop
    spectrum = np.abs(np.fft.rfft(band))
    assert np.argmax(spectrum) / 2.0 == pytest.approx(440, abs=1)
    assert 20 * np.log10(np.linalg.norm(mix - band) / np.linalg.norm(band)) == pytest.approx(6.0, abs=0.5)
    np.testing.assert_array_equal(made[0], augmenter(crop, np.random.default_rng(0)))
    assert not np.array_equal(made[0], made[1])


def test_accompaniment_under_the_second_crop_of_a_pair_only(voice: NDArray[np.float32], tmp_path: Path) -> None:
    write(tmp_path / "tone.flac", tone(4.0))
    fields = {"backing": str(tmp_path), "backing_probability": 1.0, "backing_db": (0.0, 0.0), "backing_crops": "second"}
    augmenter = Augmenter(NONE.model_copy(update=fields), SAMPLE_RATE, shift_pitch=False, crop_seconds=2.0)
    crop = voice[: 2 * SAMPLE_RATE]
    first, second = (augmenter(crop, np.random.default_rng(0), first=first) for first in (True, False))
    np.testing.assert_array_equal(first, augmenter(crop, np.random.default_rng(1), first=True))  # nothing is drawn
    alone = Augmenter(NONE, SAMPLE_RATE, shift_pitch=False)
    np.testing.assert_array_equal(first, alone(crop, np.random.default_rng(0)))
    assert abs(float(second @ crop)) < 0.9 * np.linalg.norm(second) * np.linalg.norm(crop)


def test_a_folder_without_accompaniment_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "short.flac", tone(0.5))
    config = NONE.model_copy(update={"backing": str(tmp_path)})
    with pytest.raises(UsageError, match=r"holds no recording of 2 s or more"):
        Augmenter(config, SAMPLE_RATE, shift_pitch=False, crop_seconds=2.0)
