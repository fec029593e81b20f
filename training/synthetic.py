"""Generates a corpus of synthetic singers, on which a method can be tested within minutes.

A singer is a vocal tract (length, deviation of each formant, bandwidths), a glottis (spectral tilt, breath, jitter) and
a style (vibrato, tremolo, onset of notes, range). A recording is a melody in a part of the range, on vowels of random
frequency, through its own channel (equaliser, noise). Statistics of a crop's spectrum depend more on vowels, pitch and
channel than on the singer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.signal import lfilter, sosfilt

from singerembed.storage import writing
from training.command import command

SAMPLE_RATE = 44_100
# Formants of five vowels of a male voice, Hz: the means of Peterson and Barney (1952) for F1 to F3, and for F4 and F5
# those of a uniform tube of 17.5 cm.
VOWELS = {
    "i": (270, 2290, 3010, 3500, 4500),
    "e": (530, 1840, 2480, 3500, 4500),
    "a": (730, 1090, 2440, 3500, 4500),
    "o": (570, 840, 2410, 3500, 4500),
    "u": (300, 870, 2240, 3500, 4500),
}
BANDWIDTHS = (80.0, 90.0, 120.0, 160.0, 220.0)  # Hz
_RELEASE_SECONDS = 0.02
_NOTE_SECONDS = (0.2, 0.7)
_JITTER_SAMPLES = 441  # between random pitch deviations, interpolated: 10 ms
_RANGE = 18  # semitones; range of a singer
_TESSITURA = 9  # semitones; range of a melody, within that of the singer
_CHANNEL_DB = 10.0  # standard deviation of the channel's gains
_NOISE = (0.0003, 0.02)  # standard deviation relative to the voice's peak

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Singer:
    """The parameters of a singer, equal in all recordings."""

    tract: float  # factor on all formants: a shorter vocal tract has higher ones
    formant_deviation: tuple[float, ...]  # factors
    bandwidth: float  # factor
    tilt_hz: float  # corner of the source's low-pass
    breath: float  # noise relative to the pulses
    jitter_cents: float  # standard deviation of the random pitch deviation
    vibrato_hz: float
    vibrato_cents: float
    tremolo: float  # depth of the amplitude modulation by the vibrato
    onset_seconds: float  # attack time of a note
    lowest_midi: float  # lowest note of the range


def draw_singer(rng: np.random.Generator) -> Singer:
    """Draw a singer at random."""
    return Singer(
        tract=float(rng.uniform(0.8, 1.35)),
        formant_deviation=tuple(rng.uniform(0.88, 1.12, len(BANDWIDTHS)).tolist()),
        bandwidth=float(rng.uniform(0.5, 1.5)),
        tilt_hz=float(np.exp(rng.uniform(np.log(500), np.log(4000)))),
        breath=float(np.exp(rng.uniform(np.log(0.002), np.log(0.3)))),
        jitter_cents=float(np.exp(rng.uniform(np.log(1), np.log(60)))),
        vibrato_hz=float(rng.uniform(4, 8)),
        vibrato_cents=float(rng.uniform(0, 120)),
        tremolo=float(rng.uniform(0, 0.8)),
        onset_seconds=float(np.exp(rng.uniform(np.log(0.01), np.log(0.15)))),
        lowest_midi=float(rng.uniform(45, 57)),
    )


def sing(singer: Singer, seconds: float, rng: np.random.Generator) -> Samples:
    """Return a random melody on random vowels, float64 [samples] at 44.1 kHz with a peak of 0.9."""
    notes: list[Samples] = []
    remaining = round(seconds * SAMPLE_RATE)
    lowest = singer.lowest_midi + rng.uniform(0, _RANGE - _TESSITURA)
    midi = lowest + rng.uniform(0, _TESSITURA)
    vowels = rng.dirichlet(np.ones(len(VOWELS)))
    while remaining > 0:
        n_samples = min(remaining, round(rng.uniform(*_NOTE_SECONDS) * SAMPLE_RATE))
        midi = float(np.clip(midi + rng.normal(0, 4), lowest, lowest + _TESSITURA))
        notes.append(_note(singer, midi, str(rng.choice(list(VOWELS), p=vowels)), n_samples, rng))
        remaining -= n_samples
    pcm = _channel(np.concatenate(notes), rng)
    pcm = pcm / np.abs(pcm).max() + np.exp(rng.uniform(*np.log(_NOISE))) * rng.standard_normal(len(pcm))
    return np.asarray(pcm * 0.9 / np.abs(pcm).max())


def _note(singer: Singer, midi: float, vowel: str, n_samples: int, rng: np.random.Generator) -> Samples:
    vibrato = np.sin(2 * np.pi * (singer.vibrato_hz * np.arange(n_samples) / SAMPLE_RATE + rng.random()))
    knots = np.arange(0, n_samples + _JITTER_SAMPLES, _JITTER_SAMPLES)
    jitter = np.interp(np.arange(n_samples), knots, rng.standard_normal(len(knots)))
    cents = singer.vibrato_cents * vibrato + singer.jitter_cents * jitter
    source = _pulses(midi + cents / 100) + singer.breath * rng.standard_normal(n_samples)
    tilt = np.exp(-2 * np.pi * singer.tilt_hz / SAMPLE_RATE)
    voice = lfilter([1 - tilt], [1, -tilt], source)
    frequencies = singer.tract * np.array(VOWELS[vowel]) * np.array(singer.formant_deviation)
    voice = sosfilt(_resonators(frequencies, singer.bandwidth * np.array(BANDWIDTHS)), voice)
    onset, release = (
        min(round(seconds * SAMPLE_RATE), n_samples // 2) for seconds in (singer.onset_seconds, _RELEASE_SECONDS)
    )
    envelope = 1 - singer.tremolo * (1 + vibrato) / 2
    envelope[:onset] *= np.linspace(0, 1, onset)
    envelope[n_samples - release :] *= np.linspace(1, 0, release)
    loudness = 10 ** (rng.uniform(-12, 0) / 20)
    return np.asarray(loudness * envelope * voice / max(float(np.abs(voice).max()), 1e-9))


def _pulses(midi: Samples) -> Samples:
    """Return a band-limited pulse train of pitch `midi`: the closed form of a sum of equal cosines below Nyquist."""
    frequency = 440 * 2 ** ((midi - 69) / 12)
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    harmonics = int(0.45 * SAMPLE_RATE / frequency.max())
    half = np.sin(phase / 2)
    safe = np.where(np.abs(half) < 1e-6, 1.0, half)
    summed = np.where(np.abs(half) < 1e-6, 2 * harmonics + 1, np.sin((harmonics + 0.5) * phase) / safe)
    return (summed - 1) / (2 * harmonics)


def _resonators(frequencies: Samples, bandwidths: Samples) -> Samples:
    """Return two-pole resonators with gain 1 at 0 Hz, as second-order sections: Klatt (1980), equation 3."""
    radius = np.exp(-np.pi * bandwidths / SAMPLE_RATE)
    b = 2 * radius * np.cos(2 * np.pi * frequencies / SAMPLE_RATE)
    c = -(radius**2)
    zeros, ones = np.zeros_like(b), np.ones_like(b)
    return np.stack([1 - b - c, zeros, zeros, ones, -b, -c], axis=1)


def _channel(pcm: Samples, rng: np.random.Generator) -> Samples:
    """Apply a random equaliser with gains interpolated over log frequency, in the frequency domain."""
    frequencies = np.fft.rfftfreq(len(pcm), 1 / SAMPLE_RATE)
    knots = np.geomspace(60, 16_000, 7)
    gain_db = np.interp(np.log(frequencies + 1), np.log(knots), rng.normal(0, _CHANNEL_DB, len(knots)))
    return np.fft.irfft(np.fft.rfft(pcm) * 10 ** (gain_db / 20), len(pcm))


def make_corpus(folder: Path, *, singers: int, recordings: int, seconds: float, seed: int, first: int = 0) -> None:
    """Write `folder`/singer-000/0.wav and so on, mono PCM16 at 44.1 kHz.

    Singer n and its recording m are functions of the seed; `first` is the number of the first recording.
    """
    for number in range(singers):
        singer = draw_singer(np.random.default_rng((seed, number)))
        home = folder / f"singer-{number:03d}"
        home.mkdir(parents=True, exist_ok=True)
        for recording in range(first, first + recordings):
            rng = np.random.default_rng((seed, number, recording))
            soundfile.write(home / f"{recording}.wav", sing(singer, seconds, rng), SAMPLE_RATE, subtype="PCM_16")


@command
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--singers", default=40, type=click.IntRange(min=1), help="How many.")
@click.option("--recordings", default=4, type=click.IntRange(min=1), help="Of each singer.")
@click.option("--seconds", default=12.0, type=click.FloatRange(min=0.5), help="Of each recording.")
@click.option("--seed", default=0, help="Another seed gives other singers.")
@click.option(
    "--first", default=0, type=click.IntRange(min=0), help="Number of the first recording: others of the same singers."
)
def main(folder: Path, singers: int, recordings: int, seconds: float, seed: int, first: int) -> None:
    """Make a corpus of synthetic singers in FOLDER, one folder for each."""
    with writing(str(folder)):
        make_corpus(folder, singers=singers, recordings=recordings, seconds=seconds, seed=seed, first=first)
    click.echo(f"wrote    {singers * recordings} recordings of {singers} singers to {folder}")


if __name__ == "__main__":
    main()
