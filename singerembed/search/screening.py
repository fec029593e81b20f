"""Screen a whole output against the singers of an index, and say how often that raises a false alarm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import UsageError
from singerembed.search.build import track_vector
from singerembed.search.library import Library, check_engine
from singerembed.search.query import Index
from singerembed.search.store import Vectors

_BATCH = 512  # tracks that are compared at a time
_SAMPLE = 5_000  # tracks of the index that false alarms are counted on


@dataclass(frozen=True)
class ScreenedTrack:
    """A track of the output that sounds like a singer of the index."""

    track_id: str
    path: str
    credited: str  # empty if the output does not say
    singers: list[tuple[str, float, float]]  # nearest first: singer, score, chance


@dataclass(frozen=True)
class FalseAlarms:
    """What a threshold of the chance does to tracks of the index itself, out of a thousand each."""

    n_tracks: int  # tracks that this was measured on
    unknown: float  # singers taken out of the index before: named as somebody else
    known: float  # singers left in, the track taken out: named as somebody else
    found: float  # the same: named as themselves


def screen(index: Index, output: str, min_chance: float, n_singers: int = 3) -> Iterator[ScreenedTrack]:
    """Yield the tracks of `output` whose nearest singer has at least `min_chance`, in the order of the output.

    A track credited to its nearest singer is left out, where both sides say who sings. Raises UsageError for an output
    of another engine, and for an index that is not calibrated.
    """
    _check_calibrated(index)
    library = Library([output])
    check_engine(library.engine, index.stored.engine, output, str(index.stored.folder))
    column = index.stored.singer_column or ""
    profiles = index.stored.profiles
    tracks = library.tracks()
    while batch := list(islice(tracks, _BATCH)):
        whole = np.stack([track_vector(index.stored.scoring.vectors(track.embedding)) for track in batch])
        score = _scores(whole, profiles.total)
        chance = index.chances(score, profiles.n_tracks)
        assert chance is not None
        order = np.argsort(-score, axis=1, kind="stable")[:, :n_singers]
        for i, track in enumerate(batch):
            credited = str(track.columns.get(column) or "")
            best = order[i, 0]
            if chance[i, best] >= min_chance and credited != profiles.names[best]:
                singers = [(profiles.names[j], round(float(score[i, j]), 6), float(chance[i, j])) for j in order[i]]
                yield ScreenedTrack(*track.key, credited, singers)


def false_alarms(index: Index, min_chance: float, seed: int = 0) -> FalseAlarms:
    """Count, on tracks of the index, how often a singer is named at `min_chance` who is not theirs."""
    _check_calibrated(index)
    stored, profiles = index.stored, index.stored.profiles
    number = {name: i for i, name in enumerate(profiles.names)}
    singer = np.array([number.get(name, -1) for name in stored.singers])
    singer[~stored.active] = -1
    tracks = np.flatnonzero(singer >= 0)
    tracks = np.sort(np.random.default_rng(seed).choice(tracks, min(len(tracks), _SAMPLE), replace=False))
    unknown = known = found = n_known = 0
    for first in range(0, len(tracks), _BATCH):
        block = tracks[first : first + _BATCH]
        own, each = singer[block], np.arange(len(block))
        vectors = stored.vectors["tracks"].take(block)
        score = _scores(vectors, profiles.total)
        score[each, own] = -1.0
        counts = np.broadcast_to(profiles.n_tracks, score.shape).copy()
        counts[each, own] = 0
        unknown += int((_chances(index, score, counts).max(axis=1) >= min_chance).sum())
        rest = profiles.total[own] - vectors
        length = np.maximum(np.linalg.norm(rest, axis=1), 1e-6)
        several = profiles.n_tracks[own] > 1
        score[each, own] = np.where(several, np.einsum("ij,ij->i", rest, vectors) / length, -1.0)
        counts[each, own] = profiles.n_tracks[own] - 1
        chance = _chances(index, score, counts)
        best = chance.argmax(axis=1)
        named = (chance.max(axis=1) >= min_chance) & several
        n_known += int(several.sum())
        known += int((named & (best != own)).sum())
        found += int((named & (best == own)).sum())
    per_mille = 1000 / max(1, n_known)
    return FalseAlarms(len(tracks), 1000 * unknown / max(1, len(tracks)), known * per_mille, found * per_mille)


def _chances(index: Index, score: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    chance = index.chances(score, counts)
    assert chance is not None
    return chance


def _scores(vectors: Vectors, total: Vectors) -> Vectors:
    return np.asarray(vectors @ (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6)).T)


def _check_calibrated(index: Index) -> None:
    if index.stored.singer_column is None:
        raise UsageError(
            f"{index.stored.folder} has no column of singers, and screening names singers. Make the index with "
            "--singer-column"
        )
    if index.calibration is None:
        raise UsageError(
            f"{index.stored.folder} has fewer than four singers with two tracks or more: chances cannot be calibrated "
            "on it. Add labelled tracks"
        )
