"""Group tracks that sound like one singer, without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from singerembed import storage
from singerembed.errors import InputError, MissingDependencyError
from singerembed.search.store import StoredIndex, Vectors

DEFAULT_MIN_TRACKS = 2
MAX_TRACKS = 50_000  # every track is compared with every other
_REPLICATES = 10
_SHARE = 0.8  # of the tracks in a replicate


@dataclass(frozen=True)
class Groups:
    """The groups of the n tracks of a library."""

    track: NDArray[np.int64]  # [n], number in the index
    group: NDArray[np.int64]  # [n], the largest group is 0; -1: in none
    membership: NDArray[np.float64]  # [n], 0 to 1: how deep in its group a track lies
    stability: NDArray[np.float64]  # [groups], 0 to 1: how much comes back when a fifth of the tracks is left out

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.stability)


def group_tracks(index: StoredIndex, min_tracks: int = DEFAULT_MIN_TRACKS, seed: int = 0) -> Groups:
    """Group the tracks of `index` by HDBSCAN (Campello et al. 2013) on their vectors; each recording counts once.

    `min_tracks`: of a group, 2 or more. A group's stability is the mean, over replicates without a fifth of the tracks,
    of its best overlap (Jaccard) with a group that is found there (Hennig 2007). Raises InputError for fewer than
    twice `min_tracks` or more than MAX_TRACKS tracks, MissingDependencyError without scikit-learn.
    """
    track = np.flatnonzero(index.active)
    if len(track) < 2 * min_tracks:
        raise InputError(f"{len(track)} tracks are too few for groups of {min_tracks} or more")
    if len(track) > MAX_TRACKS:
        raise InputError(f"{len(track):,} tracks are too many to group: at most {MAX_TRACKS:,}. Give a part of them")
    vectors = index.vectors["tracks"].take(track)
    labels, membership = _hdbscan(vectors, min_tracks)
    order = np.argsort(-np.bincount(labels[labels >= 0]), kind="stable") if (labels >= 0).any() else np.empty(0, int)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    group = np.where(labels >= 0, rank[labels], -1) if len(order) else labels
    return Groups(track, group, membership, _stability(vectors, group, min_tracks, seed))


def _hdbscan(vectors: Vectors, min_tracks: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    try:
        from sklearn.cluster import HDBSCAN
    except ImportError as exc:
        raise MissingDependencyError("grouping", "scikit-learn", "search") from exc
    # One neighbour is enough to be dense: of the settings that were compared (docs/search.md) it keeps most apart.
    model = HDBSCAN(min_cluster_size=min_tracks, min_samples=1, cluster_selection_method="leaf", copy=True)
    labels = model.fit_predict(vectors.astype(np.float64))
    return np.asarray(labels, np.int64), np.asarray(model.probabilities_, np.float64)


def _stability(vectors: Vectors, group: NDArray[np.int64], min_tracks: int, seed: int) -> NDArray[np.float64]:
    n_groups = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    overlap = np.zeros((_REPLICATES, n_groups))
    for replicate in range(_REPLICATES if n_groups else 0):
        kept = np.sort(rng.choice(len(vectors), max(2 * min_tracks, round(_SHARE * len(vectors))), replace=False))
        found = _hdbscan(vectors[kept], min_tracks)[0]
        before = group[kept]
        both = (before >= 0) & (found >= 0)
        counts = np.zeros((n_groups, int(found.max()) + 1))
        np.add.at(counts, (before[both], found[both]), 1)
        sizes = np.bincount(before[before >= 0], minlength=n_groups)[:, np.newaxis]
        others = np.bincount(found[found >= 0], minlength=counts.shape[1])
        if counts.shape[1]:
            overlap[replicate] = (counts / np.maximum(sizes + others - counts, 1)).max(axis=1)
    return np.asarray(overlap.mean(axis=0))


def write_groups(index: StoredIndex, groups: Groups, path: str) -> None:
    """Write a row a track to the Parquet file `path`. Raises OutputError."""
    rows = pa.array(groups.track)
    grouped = groups.group >= 0
    sizes = np.bincount(groups.group[grouped], minlength=groups.n_groups)
    of_row = np.maximum(groups.group, 0)
    table = pa.table(
        {
            "track_id": index.tracks["track_id"].take(rows),
            "path": index.tracks["path"].take(rows),
            "group": pa.array(groups.group, pa.int64(), mask=~grouped),
            "membership": pa.array(groups.membership, pa.float64(), mask=~grouped),
            "group_tracks": pa.array(np.append(sizes, 0)[of_row], pa.int64(), mask=~grouped),
            "group_stability": pa.array(np.append(groups.stability, 0.0)[of_row], pa.float64(), mask=~grouped),
        }
    )
    with storage.writing(path), storage.publishing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
