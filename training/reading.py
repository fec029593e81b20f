"""Reads stretches of recordings, and accompaniment to mix under crops."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.catalog.read import AUDIO_SUFFIXES
from singerembed.errors import TrackError, UsageError
from training.config import TrainConfig
from training.recordings import Recording, measured

Samples = NDArray[np.float32]

_READ_TIMEOUT_SECONDS = 60.0
_DRAWS = 8
_QUIET = 1e-4  # root mean square of accompaniment, full scale 1, below which another stretch is drawn

# A crop that is mostly silence is drawn again, up to this many times; then the most active one is taken.
DRAWS_PER_CROP = 8
# A frame is active if it is louder than this, relative to the crop's peak.
ACTIVE_DB = -40.0
ACTIVE_FRAME_SECONDS = 0.05
_log = logging.getLogger(__name__)
_warned: set[str] = set()


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


def active_share(pcm: Samples, sample_rate: int, silence_dbfs: float) -> float:
    """Return the share of frames louder than 40 dB below the peak; -1 for silence, or a crop with NaN or infinity."""
    peak = float(np.abs(pcm).max())
    if not 10 ** (silence_dbfs / 20) < peak < math.inf:
        return -1.0
    frame = round(ACTIVE_FRAME_SECONDS * sample_rate)
    frames = pcm[: len(pcm) // frame * frame].reshape(-1, frame)
    power = np.einsum("ij,ij->i", frames, frames) / frame
    return float((power > (peak * 10 ** (ACTIVE_DB / 20)) ** 2).mean())


def peak_normalised(pcm: Samples) -> Samples:
    """Divide by the largest magnitude; silence is returned unchanged."""
    peak = float(np.abs(pcm).max())
    return pcm / np.float32(peak) if peak > 0 else pcm


def draw_crop(
    recording: Recording, path: str, n_samples: int, sample_rate: int, config: TrainConfig, rng: np.random.Generator
) -> tuple[Samples, float]:
    """Draw a peak-normalised crop of `recording` that is not mostly silent, from `path`, the file or a variant of it.

    Return it, float32 [n_samples], and its start in the file in seconds. A shorter recording is padded with zeros, even
    if the file continues after it. Raises TrackError if it cannot be read or all drawn crops are silent.
    """
    latest = max(0.0, recording.seconds - n_samples / sample_rate)
    n_there = min(n_samples, round(recording.seconds * sample_rate))
    best, best_start, best_share = None, 0.0, -1.0
    for _ in range(DRAWS_PER_CROP):
        start = recording.start + rng.uniform(0.0, latest)
        pcm = read_crop(path, start, n_there, sample_rate)
        share = active_share(pcm, sample_rate, config.data.silence_dbfs)
        if share > best_share:
            best, best_start, best_share = pcm, start, share
        if best_share >= config.data.min_active:
            break
    if best is None:
        raise TrackError("silent", f"{DRAWS_PER_CROP} crops drawn at random are all silent")
    return np.pad(peak_normalised(best), (0, n_samples - n_there)), best_start


def warn_once(path: str, problem: str) -> None:
    """Warn of a file that cannot be used, once per process and not in every epoch."""
    if path not in _warned:
        _warned.add(path)
        _log.warning("%s: %s", path, problem)
