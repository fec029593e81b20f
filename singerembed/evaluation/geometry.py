"""Geometry of embeddings: similarities between singers, clustering, a t-SNE map in 3D, and confusions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.baselines.base import one_thread, require
from singerembed.evaluation.metrics import Floats, Ints

DRAWS = 100  # pairs of crops per pair of singers, as on the poster of the official work
_PERPLEXITY = 30.0
_BLOCK_DRAWS = 1 << 15


def average_similarity(unit: NDArray[np.float32], singers: Ints, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Return the mean cosine similarity of `draws` random pairs of crops for each pair of singers.

    `unit`: [n, dim], rows of length 1. The result is [singers, singers], symmetric. On the diagonal the two crops
    differ; it is NaN for a singer with one crop.
    """
    rng = np.random.default_rng(seed)
    rows = np.argsort(singers, kind="stable")
    n_rows = np.bincount(singers)
    start = np.cumsum(n_rows) - n_rows
    first, second = np.triu_indices(len(n_rows))
    means = np.empty(len(first))
    step = max(1, _BLOCK_DRAWS // draws)
    for begin in range(0, len(first), step):
        a, b = first[begin : begin + step, np.newaxis], second[begin : begin + step, np.newaxis]
        one = rng.integers(0, n_rows[a], (len(a), draws))
        other = rng.integers(0, np.where(a == b, np.maximum(n_rows[b] - 1, 1), n_rows[b]), (len(a), draws))
        other = np.where(a == b, (one + 1 + other) % n_rows[b], other)
        left, right = unit[rows[start[a] + one]], unit[rows[start[b] + other]]
        means[begin : begin + step] = np.einsum("pdk,pdk->pd", left, right).mean(axis=1)
    means[(first == second) & (n_rows[first] < 2)] = np.nan
    matrix = np.empty((len(n_rows), len(n_rows)))
    matrix[first, second] = matrix[second, first] = means
    return matrix


def cluster_order(similarity: Floats) -> Ints:
    """Order the singers with similar ones adjacent: average linkage on 1 - similarity, optimal leaf order."""
    if len(similarity) < 3:
        return np.arange(len(similarity))
    hierarchy = require("scipy.cluster.hierarchy", "the heat map", "scipy")
    distance = 1 - similarity[np.triu_indices(len(similarity), k=1)]
    tree = hierarchy.linkage(np.maximum(distance, 0), "average", optimal_ordering=True)
    return np.asarray(hierarchy.leaves_list(tree), np.int64)


def map_3d(unit: NDArray[np.float32], *, seed: int = 0) -> NDArray[np.float32]:
    """Return a 3D t-SNE (van der Maaten and Hinton 2008) of cosine distances, float32 [n, 3]; zeros below 5 rows.

    Perplexity is 30, or less for few rows. Distances between separate groups mean nothing in such a map.
    """
    if len(unit) < 5:
        return np.zeros((len(unit), 3), np.float32)
    manifold = require("sklearn.manifold", "the map of embeddings", "scikit-learn")
    tsne = manifold.TSNE(
        n_components=3,
        perplexity=min(_PERPLEXITY, (len(unit) - 1) / 3),
        init="pca",
        random_state=seed,
        # scikit-learn's "auto" is never below 50: with a few hundred rows single points then move far away, and the
        # final KL divergence is twice as high (192 rows: 0.50 against 0.21).
        learning_rate=max(len(unit) / 48, 10.0),
        angle=0.8,  # in three dimensions 0.5 takes twice as long for the same picture
        max_iter=500,
    )
    # On unit vectors the Euclidean distance gives the same neighbours as the cosine, and is faster.
    with one_thread():
        return np.asarray(tsne.fit_transform(unit), np.float32)


def spread_sample(singers: Ints, limit: int, *, seed: int = 0) -> Ints:
    """Return at most `limit` row indices, ascending, spread over singers as evenly as their numbers of crops allow."""
    if len(singers) <= limit:
        return np.arange(len(singers))
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(singers))
    order = shuffled[np.argsort(singers[shuffled], kind="stable")]
    n_rows = np.bincount(singers)
    rank = np.arange(len(order)) - (np.cumsum(n_rows) - n_rows)[singers[order]]  # of a row among the rows of its singer
    return np.sort(order[np.argsort(rank, kind="stable")[:limit]])


@dataclass(frozen=True)
class Cohesion:
    """Similarity among the crops of one singer, and the singers they are confused with."""

    singer: int
    n_crops: int
    n_recordings: int
    within: float  # mean similarity of two of the singer's crops; NaN with one crop
    nearest: int  # the most similar other singer; -1 with one singer
    nearest_similarity: float  # mean similarity to that singer
    recognised: float  # share of crops whose nearest centroid is the singer's own; NaN with one recording
    confused_with: int  # the most frequent other nearest centroid; -1 if there is none
    confusions: int  # number of crops nearest to it


def cohesion(similarity: Floats, confusions: Ints, singers: Ints, recordings: Ints) -> list[Cohesion]:
    """Return one entry per singer, from the results of `average_similarity` and `centroid_confusions`."""
    n_recordings = np.bincount(np.unique(np.stack([singers, recordings]), axis=1)[0], minlength=len(similarity))
    n_crops = np.bincount(singers, minlength=len(similarity))
    entries = []
    for singer, row in enumerate(similarity):
        others = np.delete(np.arange(len(row)), singer)
        nearest = int(others[np.argmax(row[others])]) if len(others) else -1
        wrong = confusions[singer].copy()
        counted, wrong[singer] = int(wrong.sum()), 0
        worst = int(np.argmax(wrong))
        entries.append(
            Cohesion(
                singer=singer,
                n_crops=int(n_crops[singer]),
                n_recordings=int(n_recordings[singer]),
                within=float(row[singer]),
                nearest=nearest,
                nearest_similarity=float(row[nearest]) if nearest >= 0 else float("nan"),
                recognised=float(confusions[singer, singer] / counted) if counted else float("nan"),
                confused_with=worst if wrong[worst] else -1,
                confusions=int(wrong[worst]),
            )
        )
    return entries


def centroid_confusions(unit: NDArray[np.float32], singers: Ints, recordings: Ints) -> Ints:
    """Count the nearest centroid of each crop: int64 [true singers, nearest singers].

    The centroid of a crop's own singer leaves out the crop's recording, so that a crop is never compared with itself or
    its song; crops of singers with one recording are not counted.
    """
    n = int(singers.max()) + 1
    sums = np.zeros((n, unit.shape[1]))
    np.add.at(sums, singers, unit)
    counts = np.zeros((n, n), np.int64)
    n_crops = np.bincount(singers, minlength=n)
    order = np.argsort(recordings, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(recordings[order])) + 1):
        singer = int(singers[rows[0]])
        if n_crops[singer] == len(rows):
            continue
        centroids = sums.copy()
        centroids[singer] -= unit[rows].sum(axis=0)
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
        counts[singer] += np.bincount(np.argmax(unit[rows] @ centroids.T, axis=1), minlength=n)
    return counts
