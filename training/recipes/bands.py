"""Accompaniment to mix voices with: made General MIDI, rendered by fluidsynth with a free sound font.

    apt install fluidsynth fluid-soundfont-gm
    python -m training.recipes.bands bands --count 200

writes `bands/0000.flac` and so on, to train with (`--backing`). Bands of seeds below 1000 are left for tests.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

import click
import numpy as np
import soundfile
from numpy.typing import NDArray
from tqdm import tqdm

from singerembed.errors import MissingDependencyError
from training.command import command

SOUND_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
RATE = 44_100
_TICKS = 480  # a beat
_BASSES = list(range(32, 40))
_CHORDS = [0, 1, 4, 5, 16, 18, 24, 25, 26, 27, 29, 30, 48, 50, 61, 88, 89]  # pianos, organs, guitars, strings, pads
_LEADS = [11, 40, 56, 65, 66, 71, 73, 80, 81]
_PROGRESSIONS = [
    [0, 7, 9, 5], [9, 5, 0, 7], [0, 5, 7, 5], [0, 9, 5, 7], [2, 7, 0, 9], [9, 7, 5, 4], [0, 10, 5, 0], [9, 2, 4, 9],
]  # fmt: skip
_MINOR = {2, 4, 9}  # roots, above the key's, whose chord is minor
_KICKS = [[0.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 2.5], [0.0, 1.5, 2.0]]  # beats of a bar
_DRUMS = 9  # channel
_FIRST_SEED = 1000  # to train with


class _Song:
    """Collects notes and writes them as a MIDI file of one track."""

    def __init__(self, beats_a_minute: int) -> None:
        tempo = round(60e6 / beats_a_minute)
        self._events: list[tuple[int, bytes]] = [(0, b"\xff\x51\x03" + tempo.to_bytes(3, "big"))]

    def program(self, channel: int, program: int, pan: int) -> None:
        self._events += [(0, bytes([0xC0 | channel, program])), (0, bytes([0xB0 | channel, 10, pan]))]

    def note(self, channel: int, pitch: int, start: float, beats: float, loudness: int) -> None:
        on, off = round(start * _TICKS), round((start + beats) * _TICKS)
        self._events += [(on, bytes([0x90 | channel, pitch, loudness])), (off, bytes([0x80 | channel, pitch, 0]))]

    def write(self, path: Path) -> None:
        track, at = b"", 0
        for tick, message in sorted(self._events, key=lambda event: event[0]):
            track += _variable_length(tick - at) + message
            at = tick
        track += b"\x00\xff\x2f\x00"
        head = b"MThd" + struct.pack(">IHHH", 6, 0, 1, _TICKS)
        path.write_bytes(head + b"MTrk" + struct.pack(">I", len(track)) + track)


def _variable_length(value: int) -> bytes:
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(0x80 | value & 0x7F)
    return bytes(reversed(digits))


def _compose(seconds: float, rng: np.random.Generator) -> _Song:
    """Bass, chords, drums and now and then a melody, over four chords; instruments, tempo and key are drawn."""
    tempo = int(rng.integers(68, 142))
    song = _Song(tempo)
    for channel, programs in enumerate((_BASSES, _CHORDS, _CHORDS, _LEADS)):
        song.program(channel, int(rng.choice(programs)), 64 if channel == 0 else int(rng.integers(20, 108)))
    key, roots = int(rng.integers(12)), _PROGRESSIONS[rng.integers(len(_PROGRESSIONS))]
    kicks, eighths = _KICKS[rng.integers(len(_KICKS))], bool(rng.integers(2))
    arpeggio, with_drums = bool(rng.integers(2)), rng.random() < 0.85
    for bar in range(int(seconds / 60 * tempo / 4) + 2):
        start, root = 4.0 * bar, roots[bar % 4]
        third = 3 if root in _MINOR else 4
        pitches = [48 + (key + root + step) % 12 + octave for step, octave in ((0, 0), (third, 12), (7, 12), (0, 12))]
        for beat in np.arange(0, 4, 0.5 if eighths else 1):
            song.note(0, 28 + (key + root) % 12, start + beat, 0.45, int(rng.integers(80, 110)))
        for i, pitch in enumerate(pitches):
            song.note(1, pitch, start, 3.9, int(rng.integers(55, 85)))
            for beat in np.arange(i * 0.5, 4, 2) if arpeggio else np.array([1, 3]):
                song.note(2, pitch + 12 * arpeggio, start + beat, 0.5, int(rng.integers(60, 95)))
        if with_drums:
            for beat in kicks:
                song.note(_DRUMS, 36, start + beat, 0.2, 110)
            for beat in (1, 3):
                song.note(_DRUMS, 38, start + beat, 0.2, 105)
            for beat in np.arange(0, 4, 0.5):
                song.note(_DRUMS, 42, start + beat, 0.1, int(rng.integers(50, 90)))
        if rng.random() < 0.4:
            for beat in np.arange(0, 4, 0.5):
                song.note(3, 60 + (key + int(rng.choice([0, 2, 4, 7, 9]))) % 12 + 12, start + beat, 0.5, 80)
    return song


def band(seconds: float, seed: int) -> NDArray[np.float32]:
    """Return a band in stereo, float32 [samples, 2] at 44.1 kHz.

    Raises MissingDependencyError without fluidsynth.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder) / "band.mid", Path(folder) / "band.wav"
        _compose(seconds + 2, rng).write(midi)
        command = ["fluidsynth", "-ni", "-q", "-g", "0.4", "-r", str(RATE), "-F", str(wav), SOUND_FONT, str(midi)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError as exc:
            install = "apt install fluidsynth fluid-soundfont-gm"
            raise MissingDependencyError("a band", "fluidsynth", install=install) from exc
        pcm, _ = soundfile.read(wav, dtype="float32", always_2d=True)
    start = round(RATE * rng.uniform(0, 2))
    part: NDArray[np.float32] = pcm[start : start + round(seconds * RATE)]
    return part


def mixed(voice: NDArray[np.float32], band_: NDArray[np.float32], voice_db: float) -> NDArray[np.float32]:
    """Put mono `voice` in the middle of `band_`, `voice_db` above it in energy while it sings; peak 0.9."""
    frames = voice[: len(voice) // 4410 * 4410].reshape(-1, 4410)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    singing = power[power > power.max() * 1e-3].mean()
    gain = np.sqrt(singing / (band_.mean(axis=1).astype(np.float64) ** 2).mean() * 10 ** (-voice_db / 10))
    mix = voice[:, np.newaxis] + gain * band_[: len(voice)]
    return np.asarray(0.9 * mix / np.abs(mix).max(), np.float32)


@command
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=200, help="Of bands.")
@click.option("--seconds", default=15.0, help="Of each.")
def main(folder: Path, count: int, seconds: float) -> None:
    """Render bands into FOLDER, mono FLAC."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(count), unit=" bands", disable=None):
        pcm = band(seconds, _FIRST_SEED + number).mean(axis=1)
        soundfile.write(folder / f"{number:04d}.flac", 0.9 * pcm / np.abs(pcm).max(), RATE)


if __name__ == "__main__":
    main()
