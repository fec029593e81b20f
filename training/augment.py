"""Augmentations of a crop: formant-preserving pitch shift, accompaniment, channel, noise, gain, time mask."""

from __future__ import annotations

import contextlib
import os
import random
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import audiomentations
import numpy as np
from numpy.typing import NDArray

from singerembed.errors import SingerEmbedError, UsageError
from training import pitch_worker
from training.config import AugmentConfig
from training.reading import Backing, peak_normalised

Samples = NDArray[np.float32]

# Praat takes 0.05 s for a 4 s crop. The limit is much higher, because a crop that times out only on a busy machine
# would make two runs differ.
PITCH_TIMEOUT_SECONDS = 20.0
_MAX_FAILURES = 5


class Augmenter:
    """Draws and applies the augmentations. All randomness comes from the generator passed to a call."""

    def __init__(
        self, config: AugmentConfig, sample_rate: int, *, shift_pitch: bool, crop_seconds: float = 0.0
    ) -> None:
        """`shift_pitch`: False if pitch was shifted beforehand. `crop_seconds`: of crops, for the backing.

        Raises UsageError for an unknown transform, or a folder without accompaniment.
        """
        self._config = config
        self._sample_rate = sample_rate
        self._pitch = PitchShifter() if shift_pitch and config.pitch_probability > 0 else None
        self._backing = Backing(config.backing, crop_seconds, sample_rate) if config.backing else None
        self._channel = [_transform(fields) for fields in config.channel]
        self._others = [
            audiomentations.AddGaussianNoise(*config.noise_amplitude, p=config.noise_probability),
            audiomentations.Gain(*config.gain_db, p=config.gain_probability),
            audiomentations.TimeMask(min_band_part=0.0, max_band_part=config.mask_fraction, p=config.mask_probability),
        ]

    def __call__(self, pcm: Samples, rng: np.random.Generator, *, first: bool = False) -> Samples:
        """Return an augmented copy of `pcm`, float32 [samples], of the same length.

        `first`: it is the first of a pair, which has no accompaniment with `backing_crops: second`.
        """
        config = self._config
        backing = None if first and config.backing_crops == "second" else self._backing
        if self._pitch is not None and rng.random() < config.pitch_probability:
            ratio, range_ratio = draw_ratio(config.pitch_ratio, rng), draw_ratio(config.pitch_range_ratio, rng)
            pcm = self._pitch.shift(pcm, self._sample_rate, ratio, range_ratio, seed=int(rng.integers(2**31)))
        if backing is not None and rng.random() < config.backing_probability:
            pcm = backing.under(pcm, rng.uniform(*config.backing_db), rng)
        with _global_generators_seeded(int(rng.integers(2**32))):
            for transform in self._channel:
                pcm = transform(pcm, self._sample_rate)
            # Pitch shift and channel change the level; the noise amplitude is relative to a peak of 1.
            pcm = peak_normalised(pcm)
            for transform in self._others:
                pcm = transform(pcm, self._sample_rate)
        return pcm


class PitchShifter:
    """Runs `pitch_worker.shift_pitch` with a time limit, in a worker process started at the first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0  # in succession

    def shift(
        self,
        pcm: Samples,
        sample_rate: int,
        ratio: float,
        range_ratio: float,
        seed: int,
        timeout_seconds: float = PITCH_TIMEOUT_SECONDS,
    ) -> Samples:
        """Return `pcm` shifted, or `pcm` itself if Praat crashes or exceeds the time limit.

        Raises SingerEmbedError after _MAX_FAILURES of that in succession: it does not work here.
        """
        process = self._running()
        deadline = time.monotonic() + timeout_seconds
        try:
            header = pitch_worker.REQUEST.pack(len(pcm), sample_rate, ratio, range_ratio, seed)
            requests, replies = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
            _write(requests, header + pcm.tobytes(), deadline)
            (length,) = pitch_worker.REPLY.unpack(_read(replies, pitch_worker.REPLY.size, deadline))
            shifted = np.frombuffer(_read(replies, 4 * length, deadline), np.float32)
        except (TimeoutError, EOFError, BrokenPipeError) as exc:
            self.close()
            self._failures += 1
            if self._failures == _MAX_FAILURES:
                raise SingerEmbedError(
                    f"pitch could not be shifted {_MAX_FAILURES} times in succession ({type(exc).__name__}): does "
                    f"{sys.executable} -c 'import parselmouth' work? augment.pitch_probability: 0 leaves it out"
                ) from exc
            return pcm
        self._failures = 0
        return shifted

    def close(self) -> None:
        """Kill the worker process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # -P: keeps the file's folder, whose modules have common names, off the module search path.
            command = [sys.executable, "-P", str(Path(pitch_worker.__file__))]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            os.set_blocking(
                cast(IO[bytes], self._process.stdin).fileno(), False
            )  # a hung worker must not block our writes
            weakref.finalize(self, self._process.kill)
        return self._process


def _write(pipe: IO[bytes], data: bytes, deadline: float) -> None:
    """Write all of `data`. Raises TimeoutError after `deadline`, and BrokenPipeError if the process has ended."""
    while data:
        _, ready, _ = select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        data = data[os.write(pipe.fileno(), data) :]


def _read(pipe: IO[bytes], size: int, deadline: float) -> bytearray:
    """Read `size` bytes. Raises TimeoutError after `deadline`, and EOFError if the process has ended."""
    received = bytearray()
    while len(received) < size:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        chunk = os.read(pipe.fileno(), size - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received


def draw_ratio(largest: float, rng: np.random.Generator) -> float:
    """Draw uniformly from 1 to `largest`, and with probability 0.5 return the reciprocal."""
    ratio = rng.uniform(1.0, largest)
    return 1 / ratio if rng.random() < 0.5 else ratio


def _transform(
    fields: Mapping[str, Any],
) -> Any:  # a transform of audiomentations; they have no common public type
    arguments = dict(fields)
    name = arguments.pop("transform", None)
    kind = getattr(audiomentations, name, None) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(
            f"augment.channel: {name!r} is not a transform of audiomentations {audiomentations.__version__}"
        )
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AssertionError, OSError) as exc:
        reason = str(exc) or f"these arguments cannot be: {arguments}"
        raise UsageError(f"augment.channel: {name}: {reason}") from exc


@contextlib.contextmanager
def _global_generators_seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that audiomentations uses, and restore them, so that crops are reproducible."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
