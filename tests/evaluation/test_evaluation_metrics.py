"""Error rates and ranks against the official values, scikit-learn, and counting by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from tolerances import EER_OFFICIAL, SHARE

from singerembed.evaluation.metrics import (
    bootstrap_over_singers,
    effective_rank,
    equal_error_interval,
    equal_error_rate,
    error_curve,
    mean_interval,
    normalised_rank,
)
from singerembed.evaluation.pairs import pair_scores, pairs_of_names, read_pair_file, unit_rows

GOLDEN = Path(__file__).parents[1] / "golden"

# Scores with many ties, and without.
scored_pairs = st.lists(
    st.tuples(st.booleans(), st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1))), min_size=2, max_size=60
).filter(lambda pairs: len({label for label, _ in pairs}) == 2)


def arrays(pairs: list[tuple[bool, float]]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    labels, scores = zip(*pairs, strict=True)
    return np.array(labels), np.array(scores)


def equal_error_by_hand(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Walk down the thresholds one by one; between two of them both rates are straight lines."""
    before = (0.0, 1.0)
    for threshold in sorted(set(scores.tolist()), reverse=True):
        now = (float(np.mean(scores[~labels] >= threshold)), float(np.mean(scores[labels] < threshold)))
        if now[1] <= now[0]:
            share = (before[1] - before[0]) / ((before[1] - before[0]) - (now[1] - now[0]))
            return before[0] + share * (now[0] - before[0])
        before = now
    raise AssertionError("the curves must meet")


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((GOLDEN / "evaluation.json").read_text(encoding="utf-8"))
    table = np.load(GOLDEN / "evaluation_in.npz")
    row_of = {str(name): i for i, name in enumerate(table["names"])}
    pairs, missing = pairs_of_names(read_pair_file(str(GOLDEN / "evaluation_pairs.txt")), row_of)
    assert missing == 0
    return values | {"labels": pairs.labels, "scores": pair_scores(unit_rows(table["embedding"]), pairs)}


def test_the_official_equal_error_rate(official: dict[str, Any]) -> None:
    rate = equal_error_rate(official["labels"], official["scores"]).rate
    assert rate == pytest.approx(official["eer"], abs=EER_OFFICIAL)


def test_the_official_equal_error_rate_of_tied_scores(official: dict[str, Any]) -> None:
    rate = equal_error_rate(official["labels"], np.round(official["scores"], 2)).rate
    assert rate == pytest.approx(official["eer_scores_rounded_to_2_decimals"], abs=EER_OFFICIAL)


@given(scored_pairs)
def test_equal_error_rate_is_where_the_curves_meet(pairs: list[tuple[bool, float]]) -> None:
    labels, scores = arrays(pairs)
    found = equal_error_rate(labels, scores)
    assert found.rate == pytest.approx(equal_error_by_hand(labels, scores), abs=SHARE)
    assert np.isfinite(found.threshold)


@given(scored_pairs)
def test_the_curve_is_scikit_learns(pairs: list[tuple[bool, float]]) -> None:
    labels, scores = arrays(pairs)
    curve = error_curve(labels, scores)
    false_acceptance, true_acceptance, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_acceptance, false_acceptance, atol=SHARE)
    np.testing.assert_allclose(1 - curve.false_rejection, true_acceptance, atol=SHARE)
    np.testing.assert_array_equal(curve.threshold, thresholds)


@given(scored_pairs, st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_a_weight_is_a_repetition(pairs: list[tuple[bool, float]], weights: list[int]) -> None:
    labels, scores = arrays(pairs)
    repeats = np.array(weights[: len(labels)])
    repeated = np.repeat(labels, repeats)
    assume(repeated.any() and not repeated.all())
    assert equal_error_rate(labels, scores, repeats.astype(float)).rate == pytest.approx(
        equal_error_rate(repeated, np.repeat(scores, repeats)).rate, abs=SHARE
    )


@pytest.mark.parametrize(
    ("positive", "negative", "rate"),
    [([1.0, 2.0], [0.0], 0.0), ([0.0], [1.0], 1.0), ([0.5, 0.5], [0.5], 0.5), ([0.0, 1.0], [0.0, 1.0], 0.5)],
)
def test_known_rates(positive: list[float], negative: list[float], rate: float) -> None:
    labels = np.repeat([True, False], [len(positive), len(negative)])
    assert equal_error_rate(labels, np.array(positive + negative)).rate == rate


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_one_kind_of_pair_has_no_rate(labels: list[bool]) -> None:
    with pytest.raises(ValueError, match="two singers"):
        equal_error_rate(np.array(labels, bool), np.zeros(len(labels)))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        equal_error_rate(np.array([True, False]), np.array([np.nan, 0.0]))
    with pytest.raises(ValueError, match="NaN"):
        normalised_rank(np.zeros(1), np.array([[np.nan]]))


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.integers(-2, 2))
def test_rank_counts_nearer_distractors_and_half_of_the_tied(distractors: list[int], positive: int) -> None:
    ours = normalised_rank(np.array([float(positive)]), np.array([distractors], float))[0]
    # The mean of a stable sort with the positive placed before all ties and one with it placed after.
    first = sorted([(-positive, 0), *((-d, 1) for d in distractors)]).index((-positive, 0))
    last = sorted([(-positive, 1), *((-d, 0) for d in distractors)]).index((-positive, 1))
    assert ours == pytest.approx((first + last) / 2 / (len(distractors) + 1), abs=SHARE)


def test_an_interval_over_singers_covers_the_rate_and_is_wider_than_one_over_pairs() -> None:
    rng = np.random.default_rng(0)
    singers = rng.integers(0, 20, (2, 4000))
    labels = singers[0] == singers[1]
    easy = rng.standard_normal(20)  # some singers are easier than others
    scores = rng.standard_normal(4000) + labels * (1.5 + easy[singers[0]])
    interval = equal_error_interval(labels, scores, (singers[0], singers[1]))
    assert interval.low < equal_error_rate(labels, scores).rate < interval.high
    values = (scores[labels] > 1).astype(float)
    alone = np.arange(len(values))  # each pair a singer of its own: the bootstrap over pairs
    over_pairs, over_singers = mean_interval(values, alone), mean_interval(values, singers[0][labels])
    assert over_singers.high - over_singers.low > over_pairs.high - over_pairs.low


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(0, 5))
def test_every_draw_has_as_many_singers_as_there_are(n_singers: int, seed: int) -> None:
    interval = bootstrap_over_singers(lambda drawn: float(drawn.sum()), n_singers, replicates=5, seed=seed)
    assert interval.low == interval.high == n_singers


def test_an_interval_does_not_depend_on_how_singers_are_numbered() -> None:
    """Those in no pair are not drawn."""
    rng = np.random.default_rng(0)
    singers = np.repeat(np.arange(10), 6)
    values = rng.uniform(size=60) + singers / 10
    assert mean_interval(values, singers) == mean_interval(values, 90 + singers)
    first, second = rng.integers(10, size=(2, 400))
    labels, scores = first == second, rng.standard_normal(400) + (first == second)
    assert equal_error_interval(labels, scores, (first, second)) == equal_error_interval(
        labels, scores, (7 * first + 5, 7 * second + 5)
    )


def test_equal_rows_have_no_effective_rank() -> None:
    """Whatever rounding leaves of them when their mean is subtracted."""
    for value in (0.1, 1.0, 1e-12, 1e6 / 3):
        assert np.isnan(effective_rank(np.full((3, 5), value, np.float32)))
        assert np.isnan(effective_rank(np.full((7, 3), value)))


def test_a_statistic_that_never_exists_has_no_interval() -> None:
    def never(_drawn: Any) -> float:
        raise ValueError

    assert np.isnan(bootstrap_over_singers(never, 3).low)


# --- dimensions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(400, 12), (10, 300)])
def test_the_effective_rank_is_the_one_of_the_singular_values(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape) * np.linspace(0.1, 2, shape[1]) + 5
    energy = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    share = energy[energy > 1e-12] / energy.sum()
    assert effective_rank(rows) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_the_effective_rank_counts_directions() -> None:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((50, 4)))[0].T
    assert effective_rank(rng.standard_normal((9, 1)) * directions[:1] + 3) == pytest.approx(1.0)
    equal = np.concatenate([directions, -directions])  # four directions, of one variance
    assert effective_rank(equal) == pytest.approx(4.0)
    assert np.isnan(effective_rank(np.ones((5, 3))))
