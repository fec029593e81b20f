"""Make the example recordings: python examples/make_examples.py

Four synthetic singers (a glottal pulse train through the formants of a vocal tract of each one's own length), each with
melodies and vowels of several songs, in one codec a file. Everything here is made by this script and is CC0.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.signal import lfilter

HERE = Path(__file__).parent
RATE = 44_100
# Formants of an average adult in Hz and their bandwidths: a, e, i, o, u (Peterson and Barney, 1952, rounded).
VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
UPPER_FORMANTS = (3400, 4500)
BANDWIDTHS = (80, 90, 120, 150, 200)


@dataclass(frozen=True)
class Singer:
    name: str
    lowest_note: int  # MIDI
    formant_scale: float  # 1 is the average adult; longer tracts have lower formants
    vibrato_hz: float
    vibrato_semitones: float
    breath: float
    tilt: float  # one-pole low-pass on the source: how soft the voice is


SINGERS = (
    Singer("bass", 41, 0.86, 5.1, 0.35, 0.010, 0.93),
    Singer("tenor", 50, 0.95, 5.8, 0.50, 0.006, 0.88),
    Singer("alto", 56, 1.08, 5.4, 0.25, 0.020, 0.90),
    Singer("soprano", 62, 1.18, 6.3, 0.60, 0.008, 0.85),
)
MELODIES = (
    (0, 2, 4, 5, 7, 5, 4, 2, 0),
    (7, 4, 0, 4, 7, 12, 9, 7),
    (0, 0, 7, 7, 9, 9, 7, 5, 4, 2),
    (12, 11, 9, 7, 9, 4, 5, 7),
)


def sing(singer: Singer, melody: tuple[int, ...], seconds: float, seed: int) -> NDArray[np.float64]:
    """One song, float64 [samples], peak 0.7."""
    rng = np.random.default_rng(seed)
    n = round(seconds * RATE)
    notes = np.array([melody[i % len(melody)] for i in range(int(seconds / 0.45) + 1)])
    samples = np.arange(n)
    glide = lfilter([0.0008], [1, -0.9992], notes[(samples / (0.45 * RATE)).astype(int)] - notes[0]) + notes[0]
    vibrato = singer.vibrato_semitones * np.sin(2 * np.pi * singer.vibrato_hz * samples / RATE)
    f0 = 440 * 2 ** ((singer.lowest_note + glide + vibrato - 69) / 12)
    phase = np.cumsum(f0 / RATE)
    pulses = np.diff(np.floor(phase), prepend=0)  # one impulse a period
    source = lfilter([1 - singer.tilt], [1, -singer.tilt], pulses) + singer.breath * rng.standard_normal(n) * 0.1
    song = np.zeros(n)
    syllable = round(0.9 * RATE)
    for start in range(0, n, syllable):
        part = source[start : start + syllable + 2000]
        for formant, bandwidth in zip((*VOWELS[rng.integers(len(VOWELS))], *UPPER_FORMANTS), BANDWIDTHS, strict=True):
            part = resonate(part, formant * singer.formant_scale, bandwidth)
        fade = np.minimum(1, np.minimum(np.arange(len(part)) / 2000, np.arange(len(part), 0, -1) / 2000))
        song[start : start + len(part)] += part * fade
    return 0.7 * song / np.abs(song).max()


def resonate(x: NDArray[np.float64], hz: float, bandwidth: float) -> NDArray[np.float64]:
    """Two-pole resonator of unit gain at 0 Hz (Klatt, 1980)."""
    radius = np.exp(-np.pi * bandwidth / RATE)
    b, c = 2 * radius * np.cos(2 * np.pi * hz / RATE), -radius * radius
    return np.asarray(lfilter([1 - b - c], [1, -b, -c], x))


def write(path: Path, song: NDArray[np.float64]) -> None:
    """Encode by the file's suffix; .opus is stereo at 48 kHz, .m4a AAC."""
    if path.suffix == ".m4a":
        write_aac(path, song)
        return
    if path.suffix == ".opus":
        positions = np.arange(0, len(song), RATE / 48_000)
        stereo = np.stack([np.interp(positions, np.arange(len(song)), song)] * 2, axis=1)
        soundfile.write(path, stereo * [1.0, 0.8], 48_000, format="OGG", subtype="OPUS")
        return
    subtype = {".wav": "PCM_16", ".flac": "PCM_24", ".mp3": "MPEG_LAYER_III", ".ogg": "VORBIS"}[path.suffix]
    with soundfile.SoundFile(path, "w", RATE, 1, subtype=subtype) as file:
        for block in np.array_split(song, len(song) // RATE):  # libsndfile's Vorbis encoder overflows on long writes
            file.write(block)


def write_aac(path: Path, song: NDArray[np.float64]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        for start in range(0, len(song) - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(
                song[np.newaxis, start : start + 1024].astype(np.float32), "fltp", "mono"
            )
            frame.rate, frame.pts = RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> None:
    suffixes = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus")
    rows = []
    for number, (singer, song) in enumerate((s, i) for i in range(3) for s in SINGERS):
        seconds = 8.0 + 2.0 * song
        audio = sing(singer, MELODIES[(number + song) % len(MELODIES)], seconds, seed=number)
        if song == 2:  # a rest, as between the lines of a song
            audio[4 * RATE : 8 * RATE] = 0
        path = HERE / "audio" / f"{singer.name}_{song + 1}{suffixes[number % len(suffixes)]}"
        path.parent.mkdir(exist_ok=True)
        write(path, audio)
        rows.append((f"{singer.name}-{song + 1}", f"audio/{path.name}", singer.name, f"song {song + 1}"))
    with (HERE / "catalog.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("track_id", "path", "singer", "title"), *rows])


if __name__ == "__main__":
    main()
