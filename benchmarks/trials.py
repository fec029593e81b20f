"""Equal error rates and nearest neighbours of crops of different songs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.metrics import equal_error_rate

Scores = NDArray[np.floating]
Ints = NDArray[np.int64]


class Trials:
    """All pairs of crops of two songs; a song that two singers sing is two."""

    def __init__(self, singers: Sequence[object], songs: Sequence[object]) -> None:
        """`singers`, `songs`: of each crop."""
        singer = np.unique([str(one) for one in singers], return_inverse=True)[1]
        song = np.unique([f"{a}\0{b}" for a, b in zip(singers, songs, strict=True)], return_inverse=True)[1]
        first, second = np.triu_indices(len(singer), 1)
        apart = song[first] != song[second]
        self.first, self.second = first[apart], second[apart]
        self.singer, self.song = singer, song
        self.same = singer[self.first] == singer[self.second]

    def rate(self, scores: Scores, drawn: Ints | None = None) -> float:
        """Equal error rate in %. `drawn`: how often a bootstrap drew each singer."""
        weights = None
        if drawn is not None:
            a, b = drawn[self.singer[self.first]], drawn[self.singer[self.second]]
            weights = (a * np.where(self.same, 1, b)).astype(float)
        return 100 * equal_error_rate(self.same, scores[self.first, self.second], weights).rate

    def nearest(self, scores: Scores) -> float:
        """How often the nearest crop of another song is the singer's, in %."""
        hidden = np.where(self.song[:, np.newaxis] == self.song, -np.inf, scores)
        return float(100 * (self.singer[hidden.argmax(axis=1)] == self.singer).mean())
