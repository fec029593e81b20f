"""Reads stretches of recordings, and accompaniment to mix under crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.catalog.read import AUDIO_SUFFIXES
from singerembed.errors import TrackError, UsageError
from training.recordings import Recording, measured

Samples = NDArray[np.float32]

_READ_TIMEOUT_SECONDS = 60.0
_DRAWS = 8
_QUIET = 1e-4  # root mean square of accompaniment, full scale 1, below which another stretch is drawn


def read_crop(path: str, start_seconds: float, n_samples: int, sample_rate: int) -> Samples:
    """Read mono float32 [n_samples] from `start_seconds` on, padded with zeros after the end of the recording.

    Raises TrackError.
    """
    limit = TimeLimit(_READ_TIMEOUT_SECONDS)
    with limit.counting(), open_recording(path, sample_rate, limit) as reader:
        reader.seek(round(start_seconds * sample_rate))
        pcm = reader.read(n_samples)
    if pcm.dtype == np.int16:
        pcm = pcm.astype(np.float32) / np.float32(32768)
    return np.pad(pcm, (0, n_samples - len(pcm))).astype(np.float32, copy=False)


class Backing:
    """Recordings of accompaniment, stretches of which are mixed under crops."""

    def __init__(self, folder: str, seconds: float, sample_rate: int) -> None:
        """Find the recordings of at least `seconds` below `folder`. Raises UsageError if there are none."""
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        self._recordings = measured([Recording(str(path), "") for path in paths], seconds)
        self._sample_rate = sample_rate
        if not self._recordings:
            raise UsageError(f"augment.backing: {folder} holds no recording of {seconds:g} s or more that can be read")

    def under(self, pcm: Samples, voice_db: float, rng: np.random.Generator) -> Samples:
        """Return `pcm`, float32 [samples], over a random stretch, `voice_db` above it in energy.

        A recording that cannot be read any more, or is silent there, is replaced by another; after some, `pcm` comes
        back as it is.
        """
        for _ in range(_DRAWS):
            recording = self._recordings[rng.integers(len(self._recordings))]
            start = rng.uniform(0, recording.seconds - len(pcm) / self._sample_rate)
            try:
                band = read_crop(recording.path, max(0.0, start), len(pcm), self._sample_rate)
            except TrackError:
                continue
            level = float(np.sqrt(np.square(band, dtype=np.float64).mean()))
            if level > _QUIET:
                gain = np.sqrt(np.square(pcm, dtype=np.float64).mean()) / level * 10 ** (-voice_db / 20)
                return np.asarray(pcm + np.float32(gain) * band, np.float32)
        return pcm
