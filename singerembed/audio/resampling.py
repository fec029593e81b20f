"""Resample a recording as it is read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import soxr

from singerembed.audio.reader import PcmReader
from singerembed.model.mel import Pcm

# soxr's HQ filter is a few hundred input samples long; a warm-up of this length leaves no trace of the cut.
_WARMUP_SECONDS = 0.1
_READ_SECONDS = 4.0


class ResamplingReader:
    """soxr over the continuous signal, so that a sample does not depend on which crops were asked for."""

    def __init__(self, source: PcmReader, sample_rate: int, channels: int = 1) -> None:
        self._source, self._channels = source, channels
        self._nothing = np.empty(0 if channels == 1 else (0, channels), np.float32)
        self.sample_rate = sample_rate
        self._restart()

    @property
    def notes(self) -> list[str]:
        return self._source.notes

    def length(self) -> int:
        return round(self._source.length() * self.sample_rate / self._source.sample_rate)

    def _restart(self) -> None:
        self._soxr = soxr.ResampleStream(self._source.sample_rate, self.sample_rate, self._channels, dtype="float32")
        self._pending: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        self._ended = False

    def read(self, n: int) -> Pcm:
        have = sum(map(len, self._pending))
        if self._ended and not have and n:
            self._source.read(1)  # where it ended by a failure, this raises it
        block = round(_READ_SECONDS * self._source.sample_rate)
        while have < n and not self._ended:
            pcm = self._source.read(block)
            self._ended = len(pcm) < block
            chunk = self._soxr.resample_chunk(np.ascontiguousarray(pcm, np.float32), last=self._ended)
            self._pending.append(chunk)
            have += len(chunk)
        joined = np.concatenate(self._pending) if self._pending else self._nothing
        self._pending = [joined[n:]]
        return joined[:n]

    def seek(self, sample: int) -> None:
        """Restart the filter a little before `sample`, at an input sample that coincides with an output sample."""
        common = math.gcd(self.sample_rate, self._source.sample_rate)
        out_step, in_step = self.sample_rate // common, self._source.sample_rate // common
        steps = max(0, sample - round(_WARMUP_SECONDS * self.sample_rate)) // out_step
        self._source.seek(steps * in_step)
        self._restart()
        self.read(sample - steps * out_step)

    def check_complete(self) -> None:
        self._source.check_complete()

    def close(self) -> None:
        self._source.close()
