"""Surround a recording with silence, so that what lies around each of its crops can be read."""

from __future__ import annotations

from typing import Any

import numpy as np

from singerembed.audio.reader import PcmReader
from singerembed.model.mel import Pcm


class PaddedReader:
    """A recording with `padding` zeros before and after it. A `PcmReader`, whose sample 0 is the first zero."""

    def __init__(self, source: PcmReader, padding: int) -> None:
        self._source, self._padding = source, padding
        self.sample_rate = source.sample_rate
        self._position = 0
        self._n_read = 0  # of the source, since the last seek
        self._zeros_left: int | None = None  # behind the source's end; None: it was not reached

    @property
    def notes(self) -> list[str]:
        return self._source.notes

    def read(self, n: int) -> Pcm:
        before = min(n, max(0, self._padding - self._position))
        pcm: Any = self._source.read(n - before if self._zeros_left is None else 0)
        self._n_read += len(pcm)
        after = 0
        if len(pcm) < n - before:
            if self._zeros_left is None:
                self._source.read(1)  # where it ended by a failure, this raises it: silence must not stand for that
                begins_within = self._n_read or self._position <= self._padding
                self._zeros_left = self._padding if begins_within else 0
            after = min(n - before - len(pcm), self._zeros_left)
            self._zeros_left -= after
        self._position += before + len(pcm) + after
        if not before and not after:
            return pcm  # type: ignore[no-any-return]
        return np.concatenate([_zeros_like(pcm, before), pcm, _zeros_like(pcm, after)])

    def seek(self, sample: int) -> None:
        """See `PcmReader`; past the end of the recording, the zeros behind it are gone too."""
        self._source.seek(max(0, sample - self._padding))
        self._position, self._n_read, self._zeros_left = sample, 0, None

    def length(self) -> int:
        return self._source.length() + 2 * self._padding

    def check_complete(self) -> None:
        self._source.check_complete()

    def close(self) -> None:
        self._source.close()


def _zeros_like(pcm: Pcm, n: int) -> Any:
    return np.zeros((n, *pcm.shape[1:]), pcm.dtype)
