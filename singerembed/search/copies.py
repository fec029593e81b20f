"""Find tracks that are the same recording in two formats.

Embeddings tell voices apart and not recordings: two songs of one singer may be as near as two formats of one song. How
loud one crop is beside the next tells recordings apart, and encoders leave it as it is, but for a gain that is the same
for all of a recording. Copies are alike in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singerembed.search.store import StoredVectors, Vectors

# What two copies have in common, and below how many crops nothing is said; measured in docs/search.md.
NEAR_COPY = 0.95  # mean cosine of the crops at the same places
LEVEL_DB = 0.1  # root mean square of the differences of their levels, the mean difference left out
MIN_CROPS = 6  # which also lie apart, or side by side: with overlaps it takes more
MIN_SPREAD_DB = 5 * LEVEL_DB  # standard deviation of a track's levels: what is always as loud cannot be told by them

_COMPONENTS = 16  # directions in which tracks are compared before their crops are
_STRETCHES = 16  # whose levels are compared with them
_SAMPLE = 4096  # tracks that directions are found on
_SLACK = 0.05  # float16 vectors and float32 products are not exact
_TRACKS = 4096  # that are compared with those before them, and with each other, at a time
_ROWS, _COLUMNS = 64, 16_384  # of products that are held at a time
_READ = 4096  # vectors that are read at a time
Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TracksAndCrops:
    """What tracks are compared by; crops are in the order of their tracks."""

    n_crops: Numbers  # [tracks], 0 where a track's crops are not stored
    coherence: Floats  # [tracks], length of the mean of the crops' vectors
    crop: NDArray[np.int32]  # [crops], place in the recording
    start: NDArray[np.float64]  # [crops], seconds
    end: NDArray[np.float64]  # [crops], seconds
    rms_dbfs: Floats  # [crops], NaN where unknown
    track_vectors: StoredVectors  # [tracks, dim], of length 1
    crop_vectors: StoredVectors  # [crops, dim], of length 1


def find_copies(library: TracksAndCrops, counts: NDArray[np.bool_], first_new: int) -> dict[int, int]:
    """Return the tracks from number `first_new` on that are copies, and the track that each is a copy of.

    `counts`: [tracks], False for tracks that are left out. A track is a copy of the first one before it that is no copy
    itself and is alike: crops at the same places, MIN_CROPS or more, over as long a time as these take side by side;
    levels that vary by MIN_SPREAD_DB, and differ by LEVEL_DB at most once the mean difference is subtracted; and a mean
    cosine of NEAR_COPY at least. No pair that is alike is overlooked.
    """
    first_crop = np.concatenate([[0], np.cumsum(library.n_crops)])
    tracks = np.flatnonzero(counts & (library.n_crops >= MIN_CROPS))
    copies: dict[int, int] = {}
    if not (tracks >= first_new).any():
        return copies
    some = tracks[np.linspace(0, len(tracks) - 1, min(len(tracks), _SAMPLE)).astype(np.int64)]
    directions = _main_directions(library.track_vectors.take(some), _COMPONENTS)
    n_crops = library.n_crops[tracks]
    for n in np.unique(n_crops[tracks >= first_new]).tolist():
        as_long = tracks[n_crops == n]
        crops = first_crop[as_long, np.newaxis] + np.arange(n)
        first, last = crops[:, 0], crops[:, -1]
        told = library.rms_dbfs[crops].std(axis=1) >= MIN_SPREAD_DB  # not if one is NaN
        told &= library.end[last] - library.start[first] >= MIN_CROPS * (library.end[first] - library.start[first])
        if told.sum() > 1:
            _Comparison(library, as_long[told], crops[told], directions).find(first_new, copies)
    return copies


def _main_directions(rows: Floats, n: int) -> Floats:
    """Return up to `n` orthonormal directions in which `rows` [rows, dim] are large, [dim, n]."""
    return np.asarray(np.linalg.eigh(rows.T @ rows)[1][:, -n:], np.float32)


class _Comparison:
    """Tracks with equally many crops, in an order in which copies are near each other."""

    def __init__(self, library: TracksAndCrops, tracks: Numbers, crops: Numbers, directions: Vectors) -> None:
        """`tracks`: [n], ascending. `crops`: [n, crops of a track]. `directions`: [dim, k], orthonormal."""
        self._vectors = library.crop_vectors
        level = library.rms_dbfs[crops]
        level -= level.mean(axis=1, keepdims=True)
        stretches = _stretches(level)
        key = (stretches @ _main_directions(stretches[:_SAMPLE], 1))[:, 0].astype(np.float64)
        self._window = LEVEL_DB * np.sqrt(level.shape[1]) * (1 + _SLACK)  # of the key, in which copies lie
        places = np.unique(library.crop[crops], axis=0, return_inverse=True)[1].ravel()
        key += places * (2 * self._window + np.ptp(key))  # crops at other places are no copies
        order = np.argsort(key, kind="stable")
        self._key, self._tracks, self._crops, self._level = key[order], tracks[order], crops[order], level[order]
        parts = [tracks[first : first + _READ] for first in range(0, len(tracks), _READ)]
        projected = np.concatenate([library.track_vectors.take(part) @ directions for part in parts])
        projected *= library.coherence[tracks, np.newaxis]
        self._left, self._right = self._features(projected[order], stretches[order])

    def _features(self, projected: Floats, stretches: Floats) -> tuple[Floats, Floats]:
        """Return two matrices [n, k]; for copies the inner product of a row of each is -1 or more.

        It is -1/2 times a sum of two squared distances, each in units of the largest that copies have. Means and
        projections bring tracks nearer to each other, so that those of all crops are at least as far.
        """
        features = np.hstack(
            [projected / np.sqrt(2 - 2 * NEAR_COPY), stretches / (LEVEL_DB * np.sqrt(self._crops.shape[1]))]
        ).astype(np.float32)
        half, one = -(features**2).sum(axis=1, keepdims=True) / 2, np.ones((len(features), 1), np.float32)
        return np.hstack([features, half, one]), np.hstack([features, one, half])

    def find(self, first_new: int, copies: dict[int, int]) -> None:
        """Add to `copies` those among the tracks from number `first_new` on."""
        new = np.flatnonzero(self._tracks >= first_new)
        new = new[np.argsort(self._tracks[new])]
        is_copy = np.zeros(len(self._tracks), bool)
        for first in range(0, len(new), _TRACKS):
            block = np.sort(new[first : first + _TRACKS])
            pairs = [self._alike(*pair) for pair in self._candidates(block, is_copy)]
            later, earlier = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
            order = np.lexsort([self._tracks[earlier], self._tracks[later]])
            for row, other in zip(later[order].tolist(), earlier[order].tolist(), strict=True):
                if not is_copy[row] and not is_copy[other]:
                    is_copy[row] = True
                    copies[int(self._tracks[row])] = int(self._tracks[other])

    def _candidates(self, block: Numbers, is_copy: NDArray[np.bool_]) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield rows of `block` with rows of earlier tracks that may be alike, [pairs] each."""
        for first in range(0, len(block), _ROWS):
            rows = block[first : first + _ROWS]
            lowest, highest = self._key[rows[[0, -1]]].tolist()
            ends = [lowest - self._window, highest + self._window]
            start, stop = np.searchsorted(self._key, ends).tolist()
            for column in range(start, stop, _COLUMNS):
                end = min(stop, column + _COLUMNS)
                near = self._left[rows] @ self._right[column:end].T >= -1 - _SLACK
                row, other = np.divmod(np.flatnonzero(near), end - column)
                row, other = rows[row], other + column
                wanted = (self._tracks[other] < self._tracks[row]) & ~is_copy[other]
                wanted &= np.abs(self._key[row] - self._key[other]) <= self._window
                row, other = row[wanted], other[wanted]
                as_loud = np.square(self._level[row] - self._level[other]).mean(axis=1) <= LEVEL_DB**2
                yield row[as_loud], other[as_loud]

    def _alike(self, row: Numbers, other: Numbers) -> NDArray[np.int64]:
        """Return those pairs whose crops are alike, [2, pairs]."""
        n_crops = self._crops.shape[1]
        size, kept = max(1, _READ // n_crops), np.ones(len(row), bool)
        for first in range(0, len(row), size):
            part = slice(first, first + size)
            one, two = (self._vectors.take(self._crops[of[part]].ravel()) for of in (row, other))
            score = np.einsum("ij,ij->i", one, two).reshape(-1, n_crops)
            kept[part] = score.mean(axis=1) >= NEAR_COPY
        return np.stack([row[kept], other[kept]])


def _stretches(level: Floats) -> Floats:
    """Return sums over up to _STRETCHES stretches of `level` [n, crops], [n, stretches], scaled so that no distance
    grows.
    """
    n = level.shape[1]
    starts = np.linspace(0, n, min(n, _STRETCHES), endpoint=False).astype(np.int64)
    sizes = np.diff([*starts.tolist(), n])
    return np.asarray(np.add.reduceat(level, starts, axis=1) / np.sqrt(sizes), np.float32)
