"""Error rates, ranks and their confidence intervals, computed from scores with NumPy.

Definitions follow the official evaluation (github SonyCSLParis/ssl-singer-identity, `eval.py`), whose equal error rate
is that of SUPERB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

CONFIDENCE = 0.95  # level of all intervals
REPLICATES = 200  # bootstrap replicates


@dataclass(frozen=True)
class EqualErrorRate:
    """The error rate at which false acceptance and false rejection rates are equal."""

    rate: float  # 0 to 1
    threshold: float  # pairs with this score or a higher one are accepted


@dataclass(frozen=True)
class Interval:
    """A confidence interval; NaN if there was no data."""

    low: float
    high: float


@dataclass(frozen=True)
class ErrorCurve:
    """Error rates at each distinct score, from the highest threshold, which accepts nothing, to the lowest."""

    threshold: Floats  # [k], descending; the first is infinite
    false_acceptance: Floats  # [k], ascending from 0 to 1
    false_rejection: Floats  # [k], descending from 1 to 0


def error_curve(labels: Bools, scores: Floats, weights: Floats | None = None) -> ErrorCurve:
    """Return the error rates of accepting pairs whose score reaches a threshold.

    `labels`: [n], True for a pair of one singer. `scores`: [n], higher is more similar; tied scores are accepted
    together. `weights`: [n], the weight of each pair. Raises ValueError for NaN, or without a pair of each kind.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    return _curve_of_sorted(labels[order], scores[order], None if weights is None else weights[order])


def curve_of_counts(scores: Floats, positive: Floats, negative: Floats) -> ErrorCurve:
    """As `error_curve`, from distinct `scores` [k], descending, and the number of pairs of each kind at each score."""
    accepted_positive, accepted_negative = np.cumsum(positive, dtype=float), np.cumsum(negative, dtype=float)
    if not len(scores) or accepted_positive[-1] <= 0 or accepted_negative[-1] <= 0:
        raise ValueError("an error rate needs pairs of one singer and pairs of two singers")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN")
    return ErrorCurve(
        threshold=np.concatenate([[np.inf], scores]),
        false_acceptance=np.concatenate([[0.0], accepted_negative / accepted_negative[-1]]),
        false_rejection=np.concatenate([[1.0], 1 - accepted_positive / accepted_positive[-1]]),
    )


def _curve_of_sorted(labels: Bools, scores: Floats, weights: Floats | None) -> ErrorCurve:
    last = _last_of_ties(scores)
    weights = np.ones(len(scores)) if weights is None else weights
    positive, negative = np.cumsum(weights * labels)[last], np.cumsum(weights * ~labels)[last]
    return curve_of_counts(scores[last], np.diff(positive, prepend=0.0), np.diff(negative, prepend=0.0))


def _last_of_ties(scores: Floats) -> Ints:
    return np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1) if len(scores) else np.empty(0, np.int64)


def equal_error_rate(labels: Bools, scores: Floats, weights: Floats | None = None) -> EqualErrorRate:
    """Return the equal error rate; arguments and errors as `error_curve`.

    The ROC curve is interpolated linearly between distinct scores and intersected with the line of equal error rates,
    as the official code does with scikit-learn's `roc_curve` and a root finder.
    """
    return equal_error_of(error_curve(labels, scores, weights))


def equal_error_of(curve: ErrorCurve) -> EqualErrorRate:
    """Return the equal error rate of a curve."""
    gap = curve.false_rejection - curve.false_acceptance  # falls from 1 to -1
    after = int(np.argmax(gap <= 0))
    before = after - 1
    share = gap[before] / (gap[before] - gap[after])
    rate = curve.false_acceptance[before] + share * (curve.false_acceptance[after] - curve.false_acceptance[before])
    upper = curve.threshold[before] if np.isfinite(curve.threshold[before]) else curve.threshold[after]
    return EqualErrorRate(float(rate), float(upper + share * (curve.threshold[after] - upper)))


# --- ranks ----------------------------------------------------------------------------------------------------------


def normalised_rank(positive: Floats, distractors: Floats) -> Floats:
    """Return the share of candidates nearer to the query than its positive, [q]; 0 is best, 0.5 is chance.

    `positive`: [q], similarity of each query to its positive. `distractors`: [q, n], to crops of other singers. As in
    the official code the positive is a candidate too, so the divisor is n + 1. There an unstable sort decides ties;
    here a tied distractor counts half. Raises ValueError for NaN.
    """
    if np.isnan(positive).any() or np.isnan(distractors).any():
        raise ValueError("similarities hold NaN")
    nearer = (distractors > positive[:, np.newaxis]).sum(axis=1)
    tied = (distractors == positive[:, np.newaxis]).sum(axis=1)
    return np.asarray((nearer + tied / 2) / (distractors.shape[1] + 1))


# --- dimensions ---------------------------------------------------------------------------------------------------


def effective_rank(embedding: Floats) -> float:
    """Return how many directions embeddings [n, dim] use: 1 if they lie on a line, at most min(n - 1, dim).

    It is exp of the entropy of the squared singular values of the centred rows, as shares of their sum (Roy and
    Vetterli 2007, who do not square). NaN without two different rows.
    """
    rows = np.asarray(embedding, np.float64)
    rows = rows - rows.mean(axis=0)
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    energy = np.clip(np.linalg.eigvalsh(gram), 0, None)
    # What is left of equal rows when their mean is subtracted is rounding.
    if energy.sum() <= (np.finfo(np.float64).eps * np.abs(embedding).max(initial=0)) ** 2 * embedding.size:
        return float("nan")
    share = energy[energy > 0] / energy.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


# --- bootstrap over singers -----------------------------------------------------------------------------------------


def bootstrap_over_singers(
    statistic: Callable[[Ints], float], n_singers: int, *, replicates: int = REPLICATES, seed: int = 0
) -> Interval:
    """Return the percentile interval of `statistic`, called with how often each singer was drawn, int64 [n_singers].

    Singers are resampled, not pairs: crops of one singer are correlated, so resampled pairs would give intervals that
    are far too narrow. Draws for which `statistic` raises ValueError (no pairs left) are skipped.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(replicates):
        drawn = np.bincount(rng.integers(n_singers, size=n_singers), minlength=n_singers)
        try:
            values.append(statistic(drawn))
        except ValueError:
            continue
    if not values:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def equal_error_interval(
    labels: Bools, scores: Floats, singers: tuple[Ints, Ints], *, replicates: int = REPLICATES, seed: int = 0
) -> Interval:
    """Return the interval of the equal error rate over singers.

    `singers`: singer of the first and of the second crop of each pair, [n] each. The weight of a pair is how often its
    singer was drawn, or for two singers the product; two copies of one singer form no pair.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    labels, scores = labels[order], scores[order]
    # Singers in no pair are not drawn: the interval must not depend on how singers are numbered.
    present, numbers = np.unique(np.concatenate([singers[0][order], singers[1][order]]), return_inverse=True)
    first, second = numbers[: len(order)], numbers[len(order) :]

    def rate(drawn: Ints) -> float:
        weights = drawn[first] * np.where(labels, 1, drawn[second])
        return equal_error_of(_curve_of_sorted(labels, scores, weights.astype(float))).rate

    return bootstrap_over_singers(rate, len(present), replicates=replicates, seed=seed)


def mean_interval(values: Floats, singers: Ints, *, replicates: int = REPLICATES, seed: int = 0) -> Interval:
    """Return the interval, over singers, of the mean of `values` [n]; `singers` [n] is the singer of each value."""
    present, numbers = np.unique(singers, return_inverse=True)
    n_singers = len(present)
    sums, counts = np.bincount(numbers, values, n_singers), np.bincount(numbers, minlength=n_singers)

    def mean(drawn: Ints) -> float:
        if not drawn @ counts:
            raise ValueError("no values")
        return float(drawn @ sums / (drawn @ counts))

    return bootstrap_over_singers(mean, n_singers, replicates=replicates, seed=seed)
