"""Turn scores of a track against a singer into likelihood ratios, by logistic regression on labelled tracks.

A likelihood ratio says how many times likelier a score is if the singer sings the track than if another does; it is
given as its natural logarithm. With prior odds it becomes a chance (Bruemmer and du Preez 2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import MissingDependencyError
from singerembed.evaluation.metrics import equal_error_rate
from singerembed.search.store import Vectors

MIN_SINGERS = 4  # with two tracks or more, so that some are left when others are left out
_FOLDS = 10
_OTHERS = 20  # singers that each track is compared with, drawn
_MAX_TRACKS = 20_000  # that are compared
_BINS = 10
_LARGEST_LLR = 300.0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """The line from score to log likelihood ratio, and how good it is on singers that it was not fitted on."""

    slope: float
    offset: float
    n_singers: int  # with two tracks or more
    n_same: int  # comparisons of a track with its own singer
    n_other: int
    eer: float  # of these comparisons, 0 to 1
    cllr: float  # bits; 1 for no information, 0 for all of it
    min_cllr: float  # what the best monotonous calibration would reach
    ece: float  # expected calibration error of the chance at even odds, 0 to 1

    def llr(self, scores: Any) -> Floats:
        """Return the log likelihood ratios of scores."""
        return np.asarray(self.slope * np.asarray(scores, np.float64) + self.offset)

    def ratios(self, scores: Any) -> Floats:
        """Return the likelihood ratios of scores, none so large that a sum of them would overflow."""
        llr = self.llr(scores)
        return np.asarray(np.exp(np.minimum(llr, _LARGEST_LLR, out=llr), out=llr))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Trials:
    """Comparisons of a track with a singer."""

    score: Floats  # [n]
    same: NDArray[np.bool_]  # [n], the track is credited to the singer
    track_singer: NDArray[np.int64]  # [n]
    singer: NDArray[np.int64]  # [n]


def chance(llr: Any) -> Floats:
    """Return the chance at even odds."""
    return np.asarray(1 / (1 + np.exp(-np.clip(llr, -500, 500))))


def singer_sums(vectors: Vectors, singer: NDArray[np.int64], n_singers: int) -> Vectors:
    """Return the sum of each singer's track vectors, float32 [singers, dim]; tracks of singer -1 count for nobody."""
    total = np.zeros((n_singers, vectors.shape[1]), np.float32)
    np.add.at(total, singer[singer >= 0], vectors[singer >= 0])
    return total


def own_scores(vectors: Vectors, singer: NDArray[np.int64], total: Vectors) -> Floats:
    """Return the score of each track against the other tracks of its singer; NaN without another or without singer."""
    rest = total[np.maximum(singer, 0)] - vectors
    length = np.linalg.norm(rest, axis=1)
    counts = np.bincount(singer[singer >= 0], minlength=len(total))
    usable = (singer >= 0) & (counts[np.maximum(singer, 0)] > 1) & (length > 1e-6)
    return np.where(usable, np.einsum("ij,ij->i", rest, vectors) / np.maximum(length, 1e-6), np.nan).astype(np.float64)


def draw_trials(vectors: Vectors, singer: NDArray[np.int64], total: Vectors, seed: int = 0) -> Trials:
    """Compare tracks with their own singer, itself left out, and with other singers, drawn.

    Singers with one track are compared with no-one: a profile of one track is not what a credit is checked against.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(singer[singer >= 0], minlength=len(total))
    several = np.flatnonzero(counts > 1)
    own = own_scores(vectors, singer, total)
    tracks = np.flatnonzero(~np.isnan(own))
    tracks = np.sort(rng.choice(tracks, min(len(tracks), _MAX_TRACKS), replace=False))
    unit = total[several] / np.maximum(np.linalg.norm(total[several], axis=1, keepdims=True), 1e-6)
    if len(several) <= _OTHERS + 1:
        other = np.tile(np.arange(len(several)), (len(tracks), 1))
    else:
        other = rng.integers(len(several), size=(len(tracks), _OTHERS))
    first, second = np.repeat(tracks, other.shape[1]), other.ravel()
    apart = singer[first] != several[second]
    first, second = first[apart], second[apart]
    score = np.concatenate(
        [own[tracks], *(np.einsum("ij,ij->i", vectors[first[a : a + 4096]], unit[second[a : a + 4096]])
                        for a in range(0, len(first), 4096))]
    )  # fmt: skip
    return Trials(
        score,
        np.arange(len(score)) < len(tracks),
        np.concatenate([singer[tracks], singer[first]]),
        np.concatenate([singer[tracks], several[second]]),
    )


def calibrate(trials: Trials, seed: int = 0) -> Calibration | None:
    """Fit the calibration on `trials`; None where there are fewer than MIN_SINGERS singers with two tracks, or where
    scores are no higher for a track's own singer than for others, and say nothing.

    How good it is, is measured on folds of singers: what is tested involves a singer that the fit has not seen. Raises
    MissingDependencyError without scikit-learn.
    """
    singers = np.unique(trials.singer[trials.same])
    if len(singers) < MIN_SINGERS:
        return None
    slope, offset = calibrate_scores(trials.score, trials.same)
    if slope <= 0:
        return None
    fold_of = np.full(int(max(trials.singer.max(), trials.track_singer.max())) + 1, -1)
    fold_of[singers] = np.random.default_rng(seed).permutation(len(singers)) % min(_FOLDS, len(singers))
    llr, same = list[Floats](), list[NDArray[np.bool_]]()
    for fold in range(min(_FOLDS, len(singers))):
        involved = (fold_of[trials.singer] == fold) | (fold_of[trials.track_singer] == fold)
        if trials.same[~involved].any() and (~trials.same[~involved]).any():
            a, b = calibrate_scores(trials.score[~involved], trials.same[~involved])
            llr.append(a * trials.score[involved] + b)
            same.append(trials.same[involved])
    tested, truth = np.concatenate(llr), np.concatenate(same)
    return Calibration(
        slope, offset, len(singers), int(trials.same.sum()), int((~trials.same).sum()),
        equal_error_rate(trials.same, trials.score).rate, cllr(tested, truth), _min_cllr(tested, truth),
        expected_calibration_error(tested, truth),
    )  # fmt: skip


def cllr(llr: Floats, same: NDArray[np.bool_]) -> float:
    """Return the cost of log likelihood ratios in bits, with equal weight on both kinds of comparison."""
    return float((np.logaddexp(0, -llr[same]).mean() + np.logaddexp(0, llr[~same]).mean()) / (2 * np.log(2)))


def expected_calibration_error(llr: Floats, same: NDArray[np.bool_]) -> float:
    """Return how far chances at even odds lie from the share that came true, on average over ten bins of chance."""
    p, weight = chance(llr), np.where(same, 0.5 / max(1, same.sum()), 0.5 / max(1, (~same).sum()))
    of_bin = np.minimum((p * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(of_bin, weight * p, _BINS) - np.bincount(of_bin, weight * same, _BINS)
    return float(np.abs(gap).sum())


def _min_cllr(llr: Floats, same: NDArray[np.bool_]) -> float:
    isotonic = _sklearn("sklearn.isotonic").IsotonicRegression(y_min=1e-6, y_max=1 - 1e-6)
    weight = np.where(same, 0.5 / same.sum(), 0.5 / (~same).sum())
    best = isotonic.fit_transform(llr, same.astype(float), sample_weight=weight)
    return cllr(np.log(best / (1 - best)), same)


def calibrate_scores(score: Floats, same: NDArray[np.bool_]) -> tuple[float, float]:
    """Return slope and offset of the logistic regression of `same` [n] on `score` [n], both kinds of equal weight."""
    model = _sklearn("sklearn.linear_model").LogisticRegression(C=1e3, class_weight="balanced")
    model.fit(score[:, np.newaxis], same)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def singer_numbers(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct names in order, and the number of each track's singer, int64 [tracks]; -1 for no name."""
    distinct = sorted(set(names) - {""})
    number = {name: i for i, name in enumerate(distinct)}
    return distinct, np.array([number.get(name, -1) for name in names], np.int64)


def _sklearn(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as exc:
        raise MissingDependencyError("calibrated likelihood ratios", "scikit-learn", "search") from exc
