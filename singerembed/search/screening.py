"""Screen a whole output against the singers of an index, and say how often that raises a false alarm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import InputError
from singerembed.search.calibration import Calibration
from singerembed.search.library import Library, check_engine, check_separator
from singerembed.search.query import Index, chances_of
from singerembed.search.store import MIN_LENGTH, Vectors, singer_name, track_vector

_MAX_BATCH = 512  # tracks that are compared with all singers at a time
_MAX_SCORES = 4_000_000  # that are held at a time
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
    of another engine, and InputError for an index that is not calibrated.
    """
    _check_calibrated(index)
    library = Library([output])
    check_engine(library.engine, index.stored.engine, output, str(index.stored.folder))
    check_separator(library.separator, index.stored.separator, output, str(index.stored.folder))
    column = index.stored.singer_column or ""
    profiles = index.stored.profiles
    tracks = library.tracks()
    while batch := list(islice(tracks, _batch_size(len(profiles.names)))):
        whole = np.stack([track_vector(index.stored.scoring.vectors(track.embedding)) for track in batch])
        score = profiles.scores(whole)
        chance = index.chances(score, profiles.n_tracks)
        assert chance is not None
        order = _highest(score, n_singers)
        for i, track in enumerate(batch):
            credited = singer_name(track.columns.get(column))
            best = order[i, 0]
            if chance[i, best] >= min_chance and credited != profiles.names[best]:
                singers = [(profiles.names[j], round(float(score[i, j]), 6), float(chance[i, j])) for j in order[i]]
                yield ScreenedTrack(*track.key, credited, singers)


def false_alarms(index: Index, min_chance: float, seed: int = 0) -> FalseAlarms:
    """Count, on tracks of the index, how often a singer is named at `min_chance` who is not theirs."""
    calibration = _check_calibrated(index)
    stored, profiles = index.stored, index.stored.profiles
    number = {name: i for i, name in enumerate(profiles.names)}
    singer = np.array([number.get(name, -1) for name in stored.singers])
    singer[~stored.active] = -1
    tracks = np.flatnonzero(singer >= 0)
    tracks = np.sort(np.random.default_rng(seed).choice(tracks, min(len(tracks), _SAMPLE), replace=False))
    here = profiles.n_tracks > 0
    n_singers, size = int(here.sum()), _batch_size(len(here))
    unknown = known = found = n_known = 0
    for first in range(0, len(tracks), size):
        block = tracks[first : first + size]
        own, each = singer[block], np.arange(len(block))
        vectors = stored.vectors["tracks"].take(block)
        others = calibration.ratios(profiles.scores(vectors))
        others[:, ~here] = 0.0
        others[each, own] = 0.0
        best, total = others.max(axis=1), others.sum(axis=1)
        unknown += int((chances_of(best, total, n_singers - 1) >= min_chance).sum())
        rest = profiles.total[own] - vectors
        length = np.maximum(np.linalg.norm(rest, axis=1), MIN_LENGTH)
        several = profiles.n_tracks[own] > 1
        ratio = calibration.ratios(np.einsum("ij,ij->i", rest, vectors) / length)
        chance = chances_of(np.maximum(best, ratio), total + ratio, n_singers)
        named = (chance >= min_chance) & several
        n_known += int(several.sum())
        known += int((named & (best > ratio)).sum())
        found += int((named & (best <= ratio)).sum())
    per_mille = 1000 / max(1, n_known)
    return FalseAlarms(len(tracks), 1000 * unknown / max(1, len(tracks)), known * per_mille, found * per_mille)


def _batch_size(n_singers: int) -> int:
    """How many tracks are compared with all singers at a time."""
    return max(1, min(_MAX_BATCH, _MAX_SCORES // max(1, n_singers)))


def _highest(score: Vectors, k: int) -> NDArray[np.int64]:
    """Return the columns of the `k` highest scores of each row, [rows, k], highest first; fewer columns, fewer."""
    k = min(k, score.shape[1])
    found = np.sort(np.argpartition(score, -k, axis=1)[:, -k:], axis=1)
    order = np.argsort(-np.take_along_axis(score, found, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(found, order, axis=1))


def _check_calibrated(index: Index) -> Calibration:
    if index.stored.singer_column is None:
        raise InputError(
            f"{index.stored.folder} has no column of singers, and screening names singers. Make the index with "
            "--singer-column"
        )
    if index.calibration is None:
        raise InputError(
            f"{index.stored.folder} has fewer than four singers with two tracks or more, or no likeness among these "
            "tracks: chances cannot be calibrated on it. Add labelled tracks"
        )
    return index.calibration
