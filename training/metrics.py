"""Validation metrics of embeddings. `singerembed evaluate` is the full evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from singerembed.evaluation.metrics import effective_rank, equal_error_rate
from training import losses

Floats = NDArray[np.floating]
METRICS = ("eer", "mean_rank", "alignment", "uniformity", "spread", "effective_rank")


@dataclass(frozen=True)
class CropLabels:
    """Singer and recording of each row of the embeddings, as numbers, [n] each."""

    singers: NDArray[np.int64]
    recordings: NDArray[np.int64]

    def same_singer(self) -> NDArray[np.bool_]:
        """Return a mask [n, n] of positive pairs: one singer in two recordings.

        If no singer has two recordings, as in unlabelled data, they are two crops of one recording.
        """
        singers = self.singers[:, None] == self.singers[None, :]
        recordings = self.recordings[:, None] == self.recordings[None, :]
        across = singers & ~recordings
        return np.asarray(across if across.any() else recordings & ~np.eye(len(self.singers), dtype=bool))

    def other_singer(self) -> NDArray[np.bool_]:
        """Return a mask [n, n] of negative pairs: two singers."""
        return np.asarray(self.singers[:, None] != self.singers[None, :])


def verification_metrics(embeddings: Floats, labels: CropLabels) -> dict[str, float]:
    """Return the METRICS of embeddings [n, dim].

    All pairs of crops are compared by cosine similarity. Raises ValueError without two singers.
    """
    unit = F.normalize(torch.from_numpy(embeddings).float(), dim=1)
    similarity = (unit @ unit.T).numpy()
    positive, negative = labels.same_singer(), labels.other_singer()
    if not positive.any() or not negative.any():
        raise ValueError("validation needs two singers, and two crops of one of them")
    once = np.triu(np.ones_like(positive), k=1)
    scores, of_others = similarity[positive & once], similarity[negative & once]
    is_positive = np.arange(len(scores) + len(of_others)) < len(scores)
    return {
        "eer": equal_error_rate(is_positive, np.concatenate([scores, of_others])).rate,
        "mean_rank": mean_normalised_rank(similarity, positive, negative),
        # `losses.alignment` of unit vectors: the squared distance is 2 - 2 cos. The pairs themselves would take
        # gigabytes.
        "alignment": float(2 - 2 * scores.mean(dtype=np.float64)),
        "uniformity": float(losses.uniformity(unit)),
        "spread": float(spread(unit)),
        "effective_rank": effective_rank(embeddings),
    }


def mean_normalised_rank(similarity: Floats, positive: NDArray[np.bool_], negative: NDArray[np.bool_]) -> float:
    """Return the mean normalised rank of each positive among its anchor's negatives: 0 is best, 0.5 is chance.

    As in the official code, but over all positives and negatives instead of drawn ones; ties count half.
    """
    ranks = []
    for row, is_positive, is_negative in zip(similarity, positive, negative, strict=True):
        others = np.sort(row[is_negative])
        mine = row[is_positive]
        below = (np.searchsorted(others, mine, side="left") + np.searchsorted(others, mine, side="right")) / 2
        ranks.append((len(others) - below) / (len(others) + 1))
    return float(np.concatenate(ranks).mean())


def spread(z: Tensor) -> Tensor:
    """Return the total variance of the directions of `z`, [batch, dim]: 0 if all are equal, 1 if their mean is 0."""
    return 1 - F.normalize(z.float(), dim=1).mean(dim=0).square().sum()
