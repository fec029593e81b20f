"""Singer identification: a linear classifier on frozen embeddings, tested on held-out recordings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.baselines.base import one_thread, require
from singerembed.evaluation.metrics import Floats, Interval, Ints, mean_interval

FOLDS = 5
TOP = 5
_ITERATIONS = 300


@dataclass(frozen=True)
class Identification:
    """Top-1 and top-5 accuracy of the classifier, 0 to 1."""

    top1: float
    top1_interval: Interval
    top5: float
    top5_interval: Interval
    n_singers: int  # with at least two recordings; others cannot be in both training and test set
    n_crops: int
    folds: int
    predicted: Ints  # [n], top-1 prediction; -1 for crops of singers that were left out


def identify_singers(embedding: Floats, singers: Ints, recordings: Ints, *, seed: int = 0) -> Identification:
    """Cross-validate a linear probe: multinomial logistic regression on standardised embeddings.

    `embedding`: [n, dim]. `singers`, `recordings`: [n]. All crops of a recording are in one fold, so that channel and
    song cannot identify the singer. Intervals are over singers. Raises ValueError if fewer than two singers have two
    recordings, and MissingDependencyError without scikit-learn.
    """
    linear_model = require("sklearn.linear_model", "singer identification", "scikit-learn")
    model_selection = require("sklearn.model_selection", "singer identification", "scikit-learn")
    preprocessing = require("sklearn.preprocessing", "singer identification", "scikit-learn")
    n_recordings = _recordings_of_singers(singers, recordings)
    kept = np.flatnonzero(n_recordings[singers] > 1)
    able = np.unique(singers[kept])
    if len(able) < 2:
        raise ValueError("identification needs two singers with two recordings each")
    folds = int(min(FOLDS, n_recordings[able].min()))
    splitter = model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    guesses = np.full((len(kept), TOP), -1, np.int64)
    for train, test in splitter.split(kept, singers[kept], recordings[kept]):
        scaler = preprocessing.StandardScaler().fit(embedding[kept[train]])
        probe = linear_model.LogisticRegression(max_iter=_ITERATIONS)
        with warnings.catch_warnings(), one_thread():
            warnings.simplefilter("ignore")  # not converged after 300 steps, which does not affect accuracy
            probe.fit(scaler.transform(embedding[kept[train]]), singers[kept[train]])
        guesses[test] = _best(probe, scaler.transform(embedding[kept[test]]))
    right = guesses == singers[kept][:, np.newaxis]
    first, among = right[:, 0].astype(float), right.any(axis=1).astype(float)
    predicted = np.full(len(singers), -1, np.int64)
    predicted[kept] = guesses[:, 0]
    return Identification(
        top1=float(first.mean()),
        top1_interval=mean_interval(first, singers[kept]),
        top5=float(among.mean()),
        top5_interval=mean_interval(among, singers[kept]),
        n_singers=len(able),
        n_crops=len(kept),
        folds=folds,
        predicted=predicted,
    )


def _recordings_of_singers(singers: Ints, recordings: Ints) -> Ints:
    """Count the recordings of each singer, by index."""
    pairs = np.unique(np.stack([singers, recordings]), axis=1)
    return np.bincount(pairs[0], minlength=int(singers.max()) + 1)


def _best(probe: object, features: NDArray[np.floating]) -> Ints:
    """Return the TOP most probable singers of each row, in order; -1 if there are fewer singers."""
    probability = probe.predict_proba(features)  # type: ignore[attr-defined]
    order = np.argsort(-probability, axis=1, kind="stable")[:, :TOP]
    best = np.full((len(features), TOP), -1, np.int64)
    best[:, : order.shape[1]] = probe.classes_[order]  # type: ignore[attr-defined]
    return best
