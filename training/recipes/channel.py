"""Simulates recording channels: equaliser, room, compression, band limits, accompaniment, noise and a codec.

The channel of each clip is drawn independently, so that it carries no information about the singer.
"""

from __future__ import annotations

import io
from typing import cast

import av
import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, sosfilt

from training.recipes.speakers import SAMPLE_RATE

_EQUALISER_KNOTS_HZ = np.geomspace(60, 18_000, 9)
_CODECS = {"libmp3lame": ("mp3", (32, 160)), "aac": ("adts", (32, 160)), "libopus": ("ogg", (12, 96))}  # kbit/s
_OPUS_RATE = 48_000

Samples = NDArray[np.float64]


def through_channel(pcm: Samples, rng: np.random.Generator, strength: float = 1.0) -> Samples:
    """Return `pcm`, float64 [samples] at 44.1 kHz, through a random channel, with a peak of 0.9.

    `strength` scales the probability of each effect.
    """
    pcm = _equalised(pcm, rng)
    if rng.random() < 0.5 * strength:
        pcm = _in_a_room(pcm, rng)
    if rng.random() < 0.2 * strength:  # compression and saturation
        drive = rng.uniform(1, 4)
        pcm = np.tanh(drive * pcm / np.abs(pcm).max()) / drive
    if rng.random() < 0.3 * strength:
        pcm = pcm + _backing(len(pcm), rng) * _rms(pcm) * 10 ** (rng.uniform(-30, -8) / 20)
    pcm = pcm + _noise(len(pcm), rng) * _rms(pcm) * 10 ** (-rng.uniform(15, 60) / 20)
    if rng.random() < 0.5 * strength:
        pcm = sosfilt(butter(4, np.exp(rng.uniform(*np.log([3400, 16_000]))), fs=SAMPLE_RATE, output="sos"), pcm)
    if rng.random() < 0.5 * strength:
        pcm = sosfilt(butter(2, rng.uniform(40, 250), "high", fs=SAMPLE_RATE, output="sos"), pcm)
    pcm = 0.9 * pcm / np.abs(pcm).max()
    return _coded(pcm, rng) if rng.random() < 0.3 * strength else np.asarray(pcm)


def _equalised(pcm: Samples, rng: np.random.Generator) -> Samples:
    """Apply gains interpolated over log frequency."""
    frequencies = np.maximum(np.fft.rfftfreq(len(pcm), 1 / SAMPLE_RATE), 1)
    gains_db = rng.normal(0, rng.uniform(0, 6), len(_EQUALISER_KNOTS_HZ))
    curve = np.interp(np.log(frequencies), np.log(_EQUALISER_KNOTS_HZ), gains_db)
    return np.fft.irfft(np.fft.rfft(pcm) * 10 ** (curve / 20), len(pcm))


def _in_a_room(pcm: Samples, rng: np.random.Generator) -> Samples:
    """Add reverberation: low-passed noise with exponential decay."""
    decay = np.exp(rng.uniform(*np.log([0.1, 1.5])))  # seconds to -60 dB
    n_samples = round(decay * SAMPLE_RATE)
    tail = rng.standard_normal(n_samples) * 10 ** (-3 * np.arange(n_samples) / n_samples)
    tail = sosfilt(butter(1, rng.uniform(1500, 10_000), fs=SAMPLE_RATE, output="sos"), tail)
    tail[: round(rng.uniform(0, 0.02) * SAMPLE_RATE)] = 0
    tail *= 10 ** (-rng.uniform(0, 20) / 20) / np.sqrt((tail**2).sum())
    return np.asarray(pcm + fftconvolve(pcm, tail)[: len(pcm)])


def _backing(n_samples: int, rng: np.random.Generator) -> Samples:
    """Return chords of plucked tones and noise beats, like the residue of source separation."""
    beat = round(rng.uniform(0.25, 0.8) * SAMPLE_RATE)
    mix = np.zeros(n_samples + beat)
    times = np.arange(beat) / SAMPLE_RATE
    for start in range(0, n_samples, beat):
        root = rng.integers(36, 60)
        for semitones in (0, rng.choice([3, 4]), 7):
            hz = 440 * 2 ** ((root + semitones + 12 * rng.integers(3) - 69) / 12)
            partials = np.arange(1, 7)[:, None]
            tone = (np.sin(2 * np.pi * hz * partials * times + rng.random((6, 1)) * 6) / partials).sum(axis=0)
            mix[start : start + beat] += tone * np.exp(-times * rng.uniform(1, 6))
        mix[start : start + beat] += rng.uniform(0, 3) * rng.standard_normal(beat) * np.exp(-times * 40)
    return mix[:n_samples] / _rms(mix)


def _noise(n_samples: int, rng: np.random.Generator) -> Samples:
    """Return noise of random colour: power falls by 0 to 6 dB per octave."""
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20 * n_samples / SAMPLE_RATE) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, n_samples)
    return np.asarray(noise / _rms(noise))


def _coded(pcm: Samples, rng: np.random.Generator) -> Samples:
    """Encode and decode with a random lossy codec, preserving the length."""
    codec = str(rng.choice(list(_CODECS)))
    container, kbits = _CODECS[codec]
    buffer = io.BytesIO()
    rate = _OPUS_RATE if codec == "libopus" else SAMPLE_RATE
    with av.open(buffer, "w", format=container) as output:
        stream = cast(av.AudioStream, output.add_stream(codec, rate=rate, layout="mono"))
        stream.bit_rate = int(1000 * np.exp(rng.uniform(*np.log(kbits))))
        frame = av.AudioFrame.from_ndarray(pcm.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        resampler = av.AudioResampler(stream.format, "mono", rate, stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(piece))
    buffer.seek(0)
    with av.open(buffer, "r") as coded:
        resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE)
        frames = [piece.to_ndarray()[0] for frame in coded.decode(audio=0) for piece in resampler.resample(frame)]
    back = np.clip(np.concatenate(frames).astype(np.float64)[: len(pcm)], -1.0, 1.0)
    return np.pad(back, (0, len(pcm) - len(back)))


def _rms(pcm: Samples) -> float:
    return float(np.sqrt(np.mean(pcm**2))) + 1e-12
