"""Find tracks whose crops fall apart into two voices: duets, and recordings joined under one credit.

The crops of a track are split into the two groups that differ most. How different two voices are is learned from the
library: crops of two tracks of different singers are mixed and split in the same way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.pairs import unit_rows
from singerembed.search.calibration import Floats, calibrate_scores, chance
from singerembed.search.store import StoredIndex, Vectors

MIN_CROPS = 6  # of a track; with fewer there is nothing to split
_MAX_CROPS = 64  # of a track that are looked at, evenly spaced
_MIN_SHARE = 0.25  # of the crops in the smaller group
_ROUNDS = 10
_MIN_TRACKS = 20  # with MIN_CROPS; fewer are too few to learn from
_MAX_MIXED = 2000


def chance_of_two_voices(
    index: StoredIndex, tracks: NDArray[np.int64], singer: NDArray[np.int64], seed: int = 0
) -> Floats:
    """Return the chance, at even odds, that more than one voice is heard in each of `tracks` [n], float64 [n].

    `singer`: [n], -1 for none. NaN for tracks with fewer than MIN_CROPS crops, and for all where there are too few to
    learn from.
    """
    found = np.full(len(tracks), np.nan)
    counts = index.first_crop[tracks + 1] - index.first_crop[tracks]
    usable = np.flatnonzero(counts >= MIN_CROPS)
    credited = usable[singer[usable] >= 0]
    if len(usable) < _MIN_TRACKS or len(np.unique(singer[credited])) < 2:
        return found
    alone = np.array([split_score(_crops(index, int(tracks[row]))) for row in usable])
    rng = np.random.default_rng(seed)
    mixed = []
    for row in rng.choice(credited, min(len(credited), _MAX_MIXED), replace=False):
        others = credited[singer[credited] != singer[row]]
        first, second = _crops(index, int(tracks[row])), _crops(index, int(tracks[rng.choice(others)]))
        half = min(len(first), len(second)) // 2
        mixed.append(split_score(np.concatenate([first[:half], second[:half]])))
    slope, offset = calibrate_scores(np.concatenate([mixed, alone]), np.arange(len(mixed) + len(alone)) < len(mixed))
    found[usable] = chance(slope * alone + offset)
    return found


def split_score(crops: Vectors) -> float:
    """Return the cosine between the means of the two groups that vectors of length 1, [n, dim], fall into.

    Two-means on the sphere, begun with the two sides of the direction of greatest variance; each group keeps a quarter
    of the crops or more, so that a single odd crop is no voice.
    """
    centred = crops - crops.mean(axis=0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    least = max(1, int(np.ceil(_MIN_SHARE * len(crops))))
    group = _halves(along, least)
    for _ in range(_ROUNDS):
        means = unit_rows(np.stack([crops[group].mean(axis=0), crops[~group].mean(axis=0)]))
        after = _halves(crops @ (means[0] - means[1]), least)
        if (after == group).all():
            break
        group = after
    means = unit_rows(np.stack([crops[group].mean(axis=0), crops[~group].mean(axis=0)]))
    return float(means[0] @ means[1])


def _halves(along: Floats, least: int) -> NDArray[np.bool_]:
    """Rows above 0, but at least `least` of them, and as many below."""
    n = int(np.clip((along > 0).sum(), least, len(along) - least))
    group = np.zeros(len(along), bool)
    group[np.argsort(-along, kind="stable")[:n]] = True
    return group


def _crops(index: StoredIndex, track: int) -> Vectors:
    part = index.crops_of(track)
    n = part.stop - part.start
    return index.vectors["crops"].take(part.start + np.linspace(0, n - 1, min(n, _MAX_CROPS)).astype(np.int64))
