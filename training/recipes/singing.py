"""Turns speech into singing with the WORLD vocoder (Morise et al., 2016), with new notes and a new vocal tract.

An identity is a speaker's spectral envelopes modified by a `Tract`, which warps their frequency axis and tilts them, so
that one speaker gives many identities. A clip moves through the speaker's frames with its own timing and pitch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from training.recipes.speakers import SAMPLE_RATE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports the deprecated pkg_resources
    import pyworld

FRAME_SECONDS = 0.005
FFT_SIZE = 2048  # WORLD's for 44.1 kHz and pitches from 71 Hz
_FLOOR = 1e-12
_LOUD_DB = -30.0  # relative to the loudest frame; vowels of notes must be louder
_MIN_VOWEL_FRAMES = 12
_ONSET_FRAMES = 16  # length of the consonant before a vowel
_TRACT_KNOTS_HZ = (100.0, 500.0, 1000.0, 1800.0, 2800.0, 4000.0, 6500.0, 12_000.0)
_SHARPNESS_HZ = 1200.0  # width of the moving average that separates formants from the envelope
_LOWEST_HZ, _HIGHEST_HZ = 75.0, 1100.0

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Speech:
    """The WORLD analysis of a speaker, in frames of 5 ms."""

    pitch: Samples  # Hz, [frames]; 0 where unvoiced
    log_power: NDArray[np.float32]  # natural logarithm of the envelope's power, [frames, 1025]
    aperiodicity: NDArray[np.float32]  # [frames, 1025], 0 to 1
    loudness_db: Samples  # [frames], relative to the loudest
    vowels: tuple[tuple[int, int], ...]  # first and last frame of loud voiced stretches
    band_hz: float  # bandwidth of the recording

    @property
    def median_pitch(self) -> float:
        """Median pitch of the voiced frames, Hz."""
        return float(np.median(self.pitch[self.pitch > 0]))


@dataclass(frozen=True)
class Tract:
    """Parameters that turn a speaker into an identity, equal in all its clips."""

    stretch: float  # of the frequency axis; above 1 is a shorter vocal tract
    knots: tuple[float, ...]  # further factors at _TRACT_KNOTS_HZ
    tilt_db: float  # per octave above 500 Hz
    sharpness: float  # factor on the height of formants
    breath: float  # exponent on aperiodicity: below 1 is breathier
    roll_off_db: float  # per octave, above the bandwidth of the recording
    vibrato_hz: float
    vibrato_cents: float
    jitter_cents: float
    glide_seconds: float  # from note to note
    lowest_hz: float  # of the range


def draw_tract(speech: Speech, rng: np.random.Generator, octaves: float = 0.42) -> Tract:
    """Draw an identity whose frequency axis is stretched by up to `octaves` either way; 0: the speaker's own tract."""
    stretch = float(2 ** rng.uniform(-octaves, octaves))
    own = octaves > 0
    return Tract(
        stretch=stretch,
        knots=tuple((2 ** (own * rng.normal(0, 0.06, len(_TRACT_KNOTS_HZ)))).tolist()),
        tilt_db=float(own * rng.normal(0, 1.5)),
        sharpness=float(1 + own * rng.uniform(-0.25, 0.25)),
        breath=float(2 ** (own * rng.uniform(-0.8, 0.8))),
        roll_off_db=float(rng.uniform(6, 14)),
        vibrato_hz=float(rng.uniform(4.5, 7)),
        vibrato_cents=float(rng.uniform(5, 90)),
        jitter_cents=float(np.exp(rng.uniform(np.log(2), np.log(25)))),
        glide_seconds=float(rng.uniform(0.02, 0.12)),
        # A shorter tract loosely correlates with a higher voice.
        lowest_hz=float(speech.median_pitch * stretch**0.8 * 2 ** rng.normal(-0.25, 0.2)),
    )


def analyse(pcm: Samples, rate: float) -> Speech:
    """Analyse speech. `pcm`: float64 [samples] at 44.1 kHz, recorded at `rate` Hz."""
    pitch, times = pyworld.dio(pcm, SAMPLE_RATE, frame_period=1000 * FRAME_SECONDS)
    pitch = pyworld.stonemask(pcm, pitch, times, SAMPLE_RATE)
    power = pyworld.cheaptrick(pcm, pitch, times, SAMPLE_RATE, fft_size=FFT_SIZE)
    aperiodicity = pyworld.d4c(pcm, pitch, times, SAMPLE_RATE, fft_size=FFT_SIZE).astype(np.float32)
    log_power = np.log(power + _FLOOR).astype(np.float32)
    loudness_db = 10 * np.log10(power.sum(axis=1) + _FLOOR)
    loudness_db -= loudness_db.max()
    band_hz = _bandwidth(log_power, rate)
    band = round(band_hz / SAMPLE_RATE * FFT_SIZE)
    # Above the bandwidth, extend the envelope flat from its edge; a tract rolls it off.
    edge = log_power[:, band - 8 : band].mean(axis=1, keepdims=True)
    log_power[:, band:] = edge
    aperiodicity[:, band:] = aperiodicity[:, band - 8 : band].mean(axis=1, keepdims=True)
    return Speech(pitch, log_power, aperiodicity, loudness_db, tuple(_vowels(pitch, loudness_db)), band_hz)


def _bandwidth(log_power: NDArray[np.float32], rate: float) -> float:
    """Return the bandwidth of speech in Hz: below half the rate, and below any drop of 20 dB within 600 Hz."""
    mean_db = 10 / np.log(10) * log_power.mean(axis=0)
    width = round(600 / SAMPLE_RATE * FFT_SIZE)
    fall = mean_db[:-width] - mean_db[width:]
    first = round(3000 / SAMPLE_RATE * FFT_SIZE)
    cliffs = np.flatnonzero(fall[first:] > 20) + first
    cliff = cliffs[0] * SAMPLE_RATE / FFT_SIZE if len(cliffs) else np.inf
    return float(min(cliff, 0.45 * rate, 16_000.0))


def _vowels(pitch: Samples, loudness_db: Samples) -> list[tuple[int, int]]:
    is_loud = np.concatenate([[False], (pitch > 0) & (loudness_db > _LOUD_DB), [False]])
    edges = np.flatnonzero(np.diff(is_loud.astype(int)))
    runs = zip(edges[::2], edges[1::2] - 1, strict=True)
    return [(int(first), int(last)) for first, last in runs if last - first >= _MIN_VOWEL_FRAMES]


# --- score ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """The score of a clip: position in the speech, pitch and level of each frame of 5 ms."""

    frame: Samples  # index of the speech frame, fractional
    pitch: Samples  # Hz; 0 where unvoiced
    gain_db: Samples


def draw_notes(speech: Speech, tract: Tract, seconds: float, rng: np.random.Generator) -> Score:
    """Draw a melody: each note is a consonant at its own speed, then a held vowel."""
    total = round(seconds / FRAME_SECONDS)
    frames, midi, gains, voiced = [], [], [], []
    lowest = float(_midi(tract.lowest_hz)) + rng.uniform(0, 8)
    note = float(lowest + rng.uniform(0, 9))
    pace = float(np.exp(rng.uniform(np.log(0.25), np.log(0.9))))
    dynamics = rng.uniform(0, 12)
    length = 0
    while length < total:
        first, last = speech.vowels[rng.integers(len(speech.vowels))]
        onset = np.arange(max(0, first - _ONSET_FRAMES), first, dtype=float)
        held = max(8, round(pace * float(np.exp(rng.normal(0, 0.5))) / FRAME_SECONDS))
        # Pass through the vowel once, slower in its middle, where it is loudest.
        middle = first + int(np.argmax(speech.loudness_db[first : last + 1]))
        reach = rng.uniform(0.1, 0.5)
        path = np.interp(
            np.linspace(0, 1, held),
            [0, 0.15, 0.85, 1],
            [first, middle - reach * (middle - first), middle + reach * (last - middle), last],
        )
        note = float(np.clip(note + rng.normal(0, 3.5), lowest, lowest + 12))
        frames.append(np.concatenate([onset, path]))
        voiced.append(np.concatenate([speech.pitch[onset.astype(int)] > 0, np.full(held, True)]))
        midi.append(np.full(len(onset) + held, round(note)))
        # Bring all vowels to one level, so that only the melody sets the dynamics.
        gains.append(np.full(len(onset) + held, -speech.loudness_db[middle] - rng.uniform(0, dynamics)))
        length += len(onset) + held
        if rng.random() < 0.12:
            rest = round(rng.uniform(0.05, 0.4) / FRAME_SECONDS)
            frames.append(np.full(rest, float(last)))
            voiced.append(np.full(rest, False))
            midi.append(np.full(rest, round(note)))
            gains.append(np.full(rest, -80.0))
            length += rest
    course = _smoothed(np.concatenate(midi)[:total], tract.glide_seconds)
    course = course + _vibrato(tract, total, rng)
    pitch = np.where(np.concatenate(voiced)[:total], 440 * 2 ** ((course - 69) / 12), 0.0)
    gain = _smoothed(np.concatenate(gains)[:total], 0.02)
    return Score(np.concatenate(frames)[:total], np.where(pitch > 0, _within_range(pitch), 0.0), gain)


def draw_phrases(speech: Speech, tract: Tract, seconds: float, rng: np.random.Generator) -> Score:
    """Draw running speech, slower or faster, with its pitch moved to the tract's range and scaled."""
    total = round(seconds / FRAME_SECONDS)
    speed = rng.uniform(0.5, 1.2)
    needed = round(total * speed)
    start = rng.integers(max(1, len(speech.pitch) - needed))
    frame = np.clip(start + speed * np.arange(total), 0, len(speech.pitch) - 1)
    pitch = speech.pitch[frame.astype(int)]
    moved = _midi(tract.lowest_hz) + rng.uniform(0, 16)
    melody = moved + rng.uniform(0.15, 1.5) * (_midi(np.maximum(pitch, 1.0)) - _midi(speech.median_pitch))
    if rng.random() < 0.5:  # like singing: attracted to whole semitones
        melody = melody + rng.uniform(0.5, 1) * (_smoothed(np.round(melody), 0.04) - melody)
    melody = melody + rng.uniform(0, 0.5) * _vibrato(tract, total, rng)
    return Score(frame, np.where(pitch > 0, _within_range(440 * 2 ** ((melody - 69) / 12)), 0.0), np.zeros(total))


def _vibrato(tract: Tract, total: int, rng: np.random.Generator) -> Samples:
    """Return pitch deviations in semitones: vibrato of varying depth, and slow jitter."""
    times = np.arange(total) * FRAME_SECONDS
    depth = tract.vibrato_cents * np.clip(
        _smoothed(rng.uniform(-0.3, 1.6, total // 60 + 2).repeat(60)[:total], 0.1), 0, 1
    )
    jitter = _smoothed(rng.standard_normal(total) * tract.jitter_cents * 3, 0.03)
    return np.asarray((depth * np.sin(2 * np.pi * (tract.vibrato_hz * times + rng.random())) + jitter) / 100)


def _within_range(pitch: Samples) -> Samples:
    """Transpose by whole octaves into the range of WORLD."""
    above = np.ceil(np.log2(np.maximum(pitch, 1.0).max() / _HIGHEST_HZ))
    pitch = pitch / 2 ** max(0.0, above)
    return np.maximum(pitch, _LOWEST_HZ)


def _midi(hz: Samples | float) -> Samples:
    return np.asarray(69 + 12 * np.log2(np.asarray(hz) / 440))


def _smoothed(course: Samples, seconds: float) -> Samples:
    size = max(1, round(seconds / FRAME_SECONDS))
    return np.asarray(uniform_filter1d(np.asarray(course, float), size, mode="nearest"))


# --- synthesis ------------------------------------------------------------------------------------------------------


def render(speech: Speech, tract: Tract, score: Score, effort_db: float) -> Samples:
    """Synthesise `score`: float64 [samples] at 44.1 kHz. `effort_db`: spectral tilt per octave; 0: as spoken."""
    frequencies = np.arange(speech.log_power.shape[1]) * SAMPLE_RATE / FFT_SIZE
    below = np.floor(score.frame).astype(int)
    above = np.minimum(below + 1, len(speech.pitch) - 1)
    share = (score.frame - below).astype(np.float32)[:, None]
    log_power = speech.log_power[below] * (1 - share) + speech.log_power[above] * share
    source = frequencies / _stretch(tract, frequencies) * FFT_SIZE / SAMPLE_RATE
    source = np.clip(source, 0, log_power.shape[1] - 1.001)
    left = source.astype(int)
    weight = (source - left).astype(np.float32)
    log_power = log_power[:, left] * (1 - weight) + log_power[:, left + 1] * weight
    width = round(_SHARPNESS_HZ / SAMPLE_RATE * FFT_SIZE)
    mean = uniform_filter1d(log_power, width, axis=1, mode="nearest")
    log_power = mean + np.float32(tract.sharpness) * (log_power - mean)
    octaves = np.log2(np.maximum(frequencies, 500) / 500)
    tilt_db = (tract.tilt_db + effort_db) * np.minimum(octaves, 4)
    band_hz = speech.band_hz * tract.stretch
    tilt_db = tilt_db - tract.roll_off_db * np.log2(np.maximum(frequencies, band_hz) / band_hz)
    gain = (tilt_db[None] + score.gain_db[:, None]) * (np.log(10) / 10)
    aperiodicity = np.clip(speech.aperiodicity[below], 1e-3, 1.0) ** tract.breath
    aperiodicity[score.pitch == 0] = 1.0
    pcm = pyworld.synthesize(
        np.ascontiguousarray(score.pitch),
        np.exp(log_power.astype(np.float64) + gain),
        np.clip(aperiodicity.astype(np.float64), 1e-3, 1.0 - 1e-3),
        SAMPLE_RATE,
        1000 * FRAME_SECONDS,
    )
    return np.asarray(pcm / max(float(np.abs(pcm).max()), 1e-9))


def _stretch(tract: Tract, frequencies: Samples) -> Samples:
    own = np.interp(np.log(np.maximum(frequencies, 1)), np.log(_TRACT_KNOTS_HZ), tract.knots)
    return np.asarray(tract.stretch * own)
