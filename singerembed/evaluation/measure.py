"""Computes the metrics of one model: error rates, rank and identification accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.embed import EmbeddedTable, standardised
from singerembed.evaluation.metrics import (
    Bools,
    ErrorCurve,
    Floats,
    Ints,
    effective_rank,
    equal_error_interval,
    equal_error_of,
    error_curve,
    mean_interval,
    normalised_rank,
)
from singerembed.evaluation.pairs import BLOCK_ROWS, Pairs, all_pairs, draw_pairs, draw_rank_scores, pair_scores
from singerembed.evaluation.probe import Identification, identify_singers
from singerembed.evaluation.result import Crops, EvaluationOptions, Measure, ModelResult
from singerembed.evaluation.scoring import Moments, fit_scoring, needs_second_moments

_NEAREST_QUERIES = 2000
_INTERVAL_PAIRS = 200_000  # pairs drawn for the interval of the error rate over all pairs
_INTERVAL_DRAWS = 20  # of so many, at most, where a condition leaves few of them
_MIN_PAIRS_OF_VALUE = 20  # of each kind; values of a condition with fewer are not reported


def measure_model(table: EmbeddedTable, crops: Crops, pairs: Pairs, options: EvaluationOptions) -> ModelResult:
    """Compute all metrics of a model; of several layers, for the one with the lowest equal error rate on `pairs`."""
    layer_eer = {}
    for name, embedding in table.layers.items():
        try:
            vectors = _vectors(embedding, options.scoring)
            layer_eer[name] = equal_error_of(error_curve(pairs.labels, pair_scores(vectors, pairs))).rate
        except ValueError:
            layer_eer[name] = float("nan")
    layer = min(layer_eer, key=lambda name: (math.isnan(layer_eer[name]), layer_eer[name]))
    embedding = standardised(table.layers[layer]) if table.facts.standardise else table.layers[layer]
    unit = _vectors(embedding, options.scoring)
    scores = pair_scores(unit, pairs)
    eer, threshold, curve = _equal_error(unit, crops, pairs, scores, options, None)
    identification, why_not = _identification(embedding, crops, options)
    return ModelResult(
        table=table,
        layer=layer,
        layer_eer=layer_eer if len(layer_eer) > 1 else {},
        unit=unit,
        eer=eer,
        threshold=threshold,
        centred=_centred_error(embedding, crops, pairs, options),
        effective_rank=effective_rank(embedding),
        mnr=_rank(unit, crops, pairs, options),
        nearest=_nearest(unit, crops, options),
        top1=_identified(identification, why_not, "top1"),
        top5=_identified(identification, why_not, "top5"),
        identification=identification,
        conditions=_conditions(unit, crops, pairs, scores, options),
        curve=curve,
        histogram=_histogram(pairs, scores),
    )


def _vectors(embedding: NDArray[np.float32], scoring: str) -> NDArray[np.float32]:
    """Rows of length 1 whose inner product is the score by the back end `scoring`, float32 [n, dim]."""
    moments = Moments(second=needs_second_moments(scoring))
    moments.add(embedding)
    return fit_scoring(scoring, moments).vectors(embedding)


def _equal_error(
    unit: NDArray[np.float32],
    crops: Crops,
    pairs: Pairs,
    scores: Floats,
    options: EvaluationOptions,
    condition: Callable[[Ints, Ints], Bools] | None,
) -> tuple[Measure, float, ErrorCurve | None]:
    """Return equal error rate, threshold and curve of the pairs whose rows satisfy `condition`."""
    if condition is not None:
        kept = condition(pairs.first, pairs.second)
        pairs, scores = pairs.select(kept), scores[kept]
    try:
        if options.every_pair:
            rows = np.arange(len(unit))
            accept = None if condition is None else _block_filter(condition, rows)
            found = all_pairs(unit, crops.singer, accept)
            rate, threshold, curve = found.eer.rate, found.eer.threshold, found.curve
            pairs = _interval_pairs(crops.singer, options.seed, condition)
            if min(pairs.labels.sum(), (~pairs.labels).sum()) < _MIN_PAIRS_OF_VALUE:
                return Measure(rate), threshold, curve
            scores = pair_scores(unit, pairs)
        else:
            curve = error_curve(pairs.labels, scores)
            rate, threshold = equal_error_of(curve).rate, equal_error_of(curve).threshold
    except ValueError as exc:
        return Measure(missing=str(exc)), float("nan"), None
    singers = crops.singer[pairs.first], crops.singer[pairs.second]
    return Measure.of(rate, equal_error_interval(pairs.labels, scores, singers, seed=options.seed)), threshold, curve


def _interval_pairs(singers: Ints, seed: int, condition: Callable[[Ints, Ints], Bools] | None) -> Pairs:
    """Draw pairs for an interval of the error rate over all pairs; with a condition that few satisfy, more of them."""
    drawn: list[Pairs] = []
    for i in range(1 if condition is None else _INTERVAL_DRAWS):
        pairs = draw_pairs(singers, _INTERVAL_PAIRS, seed + i, uniform=True)
        drawn.append(pairs if condition is None else pairs.select(condition(pairs.first, pairs.second)))
        if sum(map(len, drawn)) >= _INTERVAL_PAIRS // _INTERVAL_DRAWS:
            break
    return Pairs(*(np.concatenate([getattr(pairs, name) for pairs in drawn]) for name in ("first", "second", "labels")))


def _block_filter(condition: Callable[[Ints, Ints], Bools], rows: Ints) -> Callable[[slice, slice], Bools]:
    return lambda a, b: condition(rows[a, np.newaxis], rows[np.newaxis, b])


def _centred_error(embedding: NDArray[np.float32], crops: Crops, pairs: Pairs, options: EvaluationOptions) -> Measure:
    """Return the equal error rate with the mean of the embeddings subtracted before their cosine is taken."""
    unit = _vectors(embedding, "centred")
    return _equal_error(unit, crops, pairs, pair_scores(unit, pairs), options, None)[0]


def _nearest(unit: NDArray[np.float32], crops: Crops, options: EvaluationOptions) -> Measure:
    """Return the share of crops whose most similar crop of another recording is the same singer's.

    Of crops whose singer has another recording, at most _NEAREST_QUERIES, drawn; the candidates are all crops.
    """
    of_singer = np.unique(np.stack([crops.singer, crops.recording]), axis=1)[0]
    several = np.flatnonzero(np.bincount(of_singer)[crops.singer] > 1)
    if not len(several) or len(np.unique(crops.singer)) < 2:
        return Measure(missing="it needs two recordings of a singer, and a second singer")
    rng = np.random.default_rng(options.seed)
    queries = np.sort(rng.choice(several, min(len(several), _NEAREST_QUERIES), replace=False))
    right = np.empty(len(queries))
    for start in range(0, len(queries), BLOCK_ROWS):
        rows = queries[start : start + BLOCK_ROWS]
        best, who = np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int64)
        for left in range(0, len(unit), BLOCK_ROWS):
            part = slice(left, left + BLOCK_ROWS)
            scores = unit[rows] @ unit[part].T
            scores[crops.recording[rows, np.newaxis] == crops.recording[np.newaxis, part]] = -np.inf
            top = scores.argmax(axis=1)
            found = scores[np.arange(len(rows)), top]
            who = np.where(found > best, crops.singer[part][top], who)
            best = np.maximum(best, found)
        right[start : start + BLOCK_ROWS] = who == crops.singer[rows]
    return Measure.of(float(right.mean()), mean_interval(right, crops.singer[queries], seed=options.seed))


def _rank(unit: NDArray[np.float32], crops: Crops, pairs: Pairs, options: EvaluationOptions) -> Measure:
    try:
        drawn = draw_rank_scores(unit, crops.singer, pairs, seed=options.seed)
    except ValueError as exc:
        return Measure(missing=str(exc))
    ranks = normalised_rank(drawn.positive, drawn.distractors)
    return Measure.of(float(ranks.mean()), mean_interval(ranks, drawn.singer, seed=options.seed))


def _identification(
    embedding: NDArray[np.float32], crops: Crops, options: EvaluationOptions
) -> tuple[Identification | None, str]:
    if not options.identify:
        return None, "not asked for"
    try:
        return identify_singers(embedding, crops.singer, crops.recording, seed=options.seed), ""
    except ValueError as exc:
        return None, str(exc)


def _identified(identification: Identification | None, why_not: str, name: str) -> Measure:
    if identification is None:
        return Measure(missing=why_not)
    return Measure.of(getattr(identification, name), getattr(identification, f"{name}_interval"))


def _conditions(
    unit: NDArray[np.float32], crops: Crops, pairs: Pairs, scores: Floats, options: EvaluationOptions
) -> dict[str, Measure]:
    """Return equal error rates of pairs from two recordings, and of pairs with the same and different conditions."""
    tests: dict[str, Callable[[Ints, Ints], Bools]] = {
        "two recordings": lambda a, b: crops.recording[a] != crops.recording[b]
    }
    for column in options.within:
        tests[f"within {column}"] = _Sharing(crops.same_value(column))
    for column in options.conditions:
        value = crops.same_value(column)
        tests |= {f"{column}: same": _Sharing(value), f"{column}: different": _Sharing(value, apart=True)}
        for number, name in enumerate(sorted({r.conditions.get(column, "") for r in crops.recordings} - {""})):
            both = (value[pairs.first] == number) & (value[pairs.second] == number)
            n_positive = int(pairs.labels[both].sum())
            if min(n_positive, int(both.sum()) - n_positive) >= _MIN_PAIRS_OF_VALUE:
                tests[f"{column}: {name}"] = _Sharing(np.where(value == number, number, -1))
    return {name: _equal_error(unit, crops, pairs, scores, options, test)[0] for name, test in tests.items()}


@dataclass(frozen=True)
class _Sharing:
    """Filter of pairs with the same value, or, with `apart`, different values; -1 is no value."""

    value: Ints  # [n]
    apart: bool = False

    def __call__(self, first: Ints, second: Ints) -> Bools:
        a, b = self.value[first], self.value[second]
        return np.asarray(((a == b) ^ self.apart) & (a >= 0) & (b >= 0))


def _histogram(pairs: Pairs, scores: Floats) -> tuple[Floats, Ints, Ints] | None:
    if not len(pairs):
        return None
    edges = np.linspace(float(scores.min()) - 1e-6, float(scores.max()) + 1e-6, 61)
    return edges, np.histogram(scores[pairs.labels], edges)[0], np.histogram(scores[~pairs.labels], edges)[0]
