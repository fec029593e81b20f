from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from training import losses
from training.metrics import CropLabels, mean_normalised_rank, spread, verification_metrics


def test_mean_rank_is_what_the_area_under_the_curve_says() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.normal(size=(1, 40))
    positive, negative = np.zeros((1, 40), bool), np.zeros((1, 40), bool)
    positive[0, :10], negative[0, 10:] = True, True
    area = roc_auc_score(positive[0], similarity[0])
    assert mean_normalised_rank(similarity, positive, negative) == pytest.approx((1 - area) * 30 / 31)


def test_pairs_are_of_different_recordings_where_there_are_some() -> None:
    labels = CropLabels(singers=np.array([0, 0, 0, 1]), recordings=np.array([0, 0, 1, 2]))
    assert {tuple(pair) for pair in np.argwhere(labels.same_singer())} == {(0, 2), (2, 0), (1, 2), (2, 1)}
    unlabelled = CropLabels(singers=np.array([0, 0, 1, 1]), recordings=np.array([0, 0, 1, 1]))
    assert {tuple(pair) for pair in np.argwhere(unlabelled.same_singer())} == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_one_singer_cannot_be_validated() -> None:
    labels = CropLabels(singers=np.array([0, 0]), recordings=np.array([0, 1]))
    with pytest.raises(ValueError, match="two singers"):
        verification_metrics(np.eye(2, dtype=np.float32), labels)


def test_separate_singers_are_told_apart() -> None:
    embeddings = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    labels = CropLabels(singers=np.repeat(np.arange(3), 4), recordings=np.arange(12) // 2)
    metrics = verification_metrics(embeddings, labels)
    assert metrics["eer"] == pytest.approx(0.0)
    assert metrics["mean_rank"] == pytest.approx(0.0)
    assert metrics["alignment"] == pytest.approx(0.0)
    assert metrics["effective_rank"] == pytest.approx(2.0)


def test_alignment_is_the_loss_of_the_same_name_over_the_pairs() -> None:
    embeddings = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    labels = CropLabels(singers=np.repeat(np.arange(3), 4), recordings=np.arange(12) // 2)
    unit = torch.nn.functional.normalize(torch.from_numpy(embeddings))
    first, second = np.nonzero(np.triu(labels.same_singer()))
    expected = float(losses.alignment(unit[first], unit[second]))
    assert verification_metrics(embeddings, labels)["alignment"] == pytest.approx(expected, rel=1e-5)


def test_spread_of_a_constant_and_of_a_basis() -> None:
    assert float(spread(torch.ones(8, 16))) == pytest.approx(0.0, abs=1e-6)
    assert float(spread(torch.eye(8))) == pytest.approx(1 - 1 / 8)
