"""Pairs of crops, read from a file, drawn, or all of them, and their similarities in bounded memory."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import InputError
from singerembed.evaluation.metrics import (
    Bools,
    EqualErrorRate,
    ErrorCurve,
    Floats,
    Ints,
    curve_of_counts,
    equal_error_of,
)

BLOCK_ROWS = 1024  # rows of a block of similarities: 1024 x 1024 float32 are 4 MB
_BINS = 1 << 16
_COMPRESS_AT = 1 << 20  # number of collected scores at which equal ones are merged


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows of an embedding table."""

    first: Ints  # [n]
    second: Ints  # [n]
    labels: Bools  # [n], True: one singer

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, mask: Bools) -> Pairs:
        """Return the pairs where `mask` [n] is True."""
        return Pairs(self.first[mask], self.second[mask], self.labels[mask])


def unit_rows(embedding: Floats) -> NDArray[np.float32]:
    """Return `embedding` [n, dim] with rows scaled to length 1, as float32; rows of zeros stay zero."""
    norm = np.linalg.norm(embedding.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(embedding / np.maximum(norm, 1e-8), np.float32)


def pair_scores(unit: NDArray[np.float32], pairs: Pairs) -> NDArray[np.float32]:
    """Return the cosine similarity of each pair, float32 [n]. `unit`: [rows, dim], rows of length 1.

    Computed in blocks, so that only a few rows are copied at a time.
    """
    scores = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), BLOCK_ROWS * 8):
        part = slice(start, start + BLOCK_ROWS * 8)
        scores[part] = np.einsum("ij,ij->i", unit[pairs.first[part]], unit[pairs.second[part]])
    return scores


# --- the official format --------------------------------------------------------------------------------------------


def read_pair_file(path: str) -> list[tuple[bool, str, str]]:
    """Read lines `label,path1,path2`, label 1 for one singer: the official format. Raises InputError with the line.

    A path with a comma or a quotation mark is quoted, as in CSV.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read the pair file {path}: {getattr(exc, 'strerror', None) or exc}") from exc
    rows = []
    reader = csv.reader(lines)
    for fields in reader:
        if not any(fields):
            continue
        if len(fields) != 3 or fields[0] not in {"0", "1"}:
            raise InputError(
                f"{path} line {reader.line_num}: expected label,path1,path2 with label 0 or 1, got "
                f"{','.join(fields)[:80]!r}"
            )
        rows.append((fields[0] == "1", fields[1].strip(), fields[2].strip()))
    if not rows:
        raise InputError(f"{path} holds no pairs")
    return rows


def pairs_of_names(rows: list[tuple[bool, str, str]], row_of: Mapping[str, int]) -> tuple[Pairs, int]:
    """Return the pairs as row indices, and the number of lines with a name not in `row_of`, such as a silent crop."""
    known = [(row_of[a], row_of[b], label) for label, a, b in rows if a in row_of and b in row_of]
    table = np.array(known, np.int64).reshape(-1, 3)
    return Pairs(table[:, 0], table[:, 1], table[:, 2].astype(bool)), len(rows) - len(known)


def write_pair_file(path: str, pairs: Pairs, names: list[str]) -> None:
    """Write `pairs` in the format that is read above; `names` are the names of the rows."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for label, a, b in zip(pairs.labels, pairs.first, pairs.second, strict=True):
            writer.writerow((int(label), names[a], names[b]))


# --- drawing --------------------------------------------------------------------------------------------------------


def draw_pairs(singers: Ints, count: int, seed: int, *, uniform: bool = False) -> Pairs:
    """Draw `count` pairs, half of one singer and half of two; deterministic for a seed.

    `singers`: singer of each row, [n]. As in the official `create_speaker_pairs.py`, singers are drawn first, then a
    crop of each, so that all singers have equal weight; but a crop is never paired with itself. `uniform`: all pairs of
    a kind are equally likely instead. If no singer has two crops, or there is only one singer, one kind is missing.
    """
    rng = np.random.default_rng(seed)
    rows = np.argsort(singers, kind="stable")
    n_rows = np.bincount(singers)
    start = np.cumsum(n_rows) - n_rows
    present, several = np.flatnonzero(n_rows), np.flatnonzero(n_rows > 1)
    n_positive = count // 2 if len(several) else 0
    n_negative = count - count // 2 if len(present) > 1 else 0

    ways = n_rows[several] * (n_rows[several] - 1.0) if uniform else np.ones(len(several))
    who = rng.choice(several, n_positive, p=ways / ways.sum()) if n_positive else np.empty(0, np.int64)
    one = rng.integers(0, n_rows[who])
    other = (one + 1 + rng.integers(0, n_rows[who] - 1)) % n_rows[who] if n_positive else one
    positive = rows[start[who] + one], rows[start[who] + other]

    left, right = _two_singers(rng, n_rows[present] ** float(uniform), n_negative)
    left, right = present[left], present[right]
    negative = rows[start[left] + rng.integers(0, n_rows[left])], rows[start[right] + rng.integers(0, n_rows[right])]

    order = rng.permutation(n_positive + n_negative)
    labels = np.arange(n_positive + n_negative) < n_positive
    first, second = (np.concatenate([p, n])[order] for p, n in zip(positive, negative, strict=True))
    return Pairs(first, second, labels[order])


def _two_singers(rng: np.random.Generator, weights: Floats, count: int) -> tuple[Ints, Ints]:
    """Draw `count` pairs of different indices, each with probability proportional to the product of its weights."""
    if not count:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    share = weights / weights.sum()
    # P(i, j) ~ w_i w_j. Given i, j is drawn with w_j / (1 - w_i), so i must be drawn with w_i (1 - w_i).
    first = rng.choice(len(weights), count, p=share * (1 - share) / (share * (1 - share)).sum())
    # Invert the cumulative weights without the first index: positions at or beyond its start skip its interval.
    end = np.cumsum(share)
    position = rng.random(count) * (1 - share[first])
    position += np.where(position >= end[first] - share[first], share[first], 0.0)
    second = np.minimum(np.searchsorted(end, position, side="right"), len(weights) - 1)
    clash = second == first  # possible only by rounding
    second[clash] = (first[clash] + 1) % len(weights)
    return first, second


# --- all pairs ------------------------------------------------------------------------------------------------------

PairFilter = Callable[[slice, slice], Bools]  # rows, columns -> mask of accepted pairs, [rows, columns]


@dataclass(frozen=True)
class AllPairs:
    """Error rates over all pairs."""

    eer: EqualErrorRate  # exact
    curve: ErrorCurve  # from 65 536 bins over the range of the scores, for plots
    n_positive: int
    n_negative: int


def all_pairs(unit: NDArray[np.float32], singers: Ints, accept: PairFilter | None = None) -> AllPairs:
    """Return the exact equal error rate of all n (n - 1) / 2 pairs of rows, in memory independent of their number.

    A first pass counts scores in bins and finds the bin where both error rates are equal; a second pass uses the single
    scores of that bin. `accept` selects pairs. Raises ValueError without a pair of each kind, or for NaN.
    """
    if np.isnan(unit).any():
        raise ValueError("embeddings hold NaN")
    low, high = _sampled_range(unit)
    counts = np.zeros((2, _BINS), np.int64)
    for scores, labels in _blocks(unit, singers, accept):
        bins = _bin(scores, low, high)
        counts[0] += np.bincount(bins[~labels], minlength=_BINS)
        counts[1] += np.bincount(bins[labels], minlength=_BINS)
    coarse_scores = np.linspace(high, low, _BINS)
    curve = curve_of_counts(coarse_scores, counts[1, ::-1].astype(float), counts[0, ::-1].astype(float))
    crossing = _BINS - int(np.argmax(curve.false_rejection - curve.false_acceptance <= 0))
    # The ROC segment with the intersection may start at the last distinct score above the bin and end in the bin.
    values, positive, negative = _scores_in_bin(unit, singers, accept, (low, high), crossing)
    above, below = slice(crossing + 1, None), slice(0, crossing)
    fine_scores = np.concatenate([[np.inf], values, [-np.inf]])
    fine = curve_of_counts(
        fine_scores,
        np.concatenate([[counts[1, above].sum()], positive, [counts[1, below].sum()]]),
        np.concatenate([[counts[0, above].sum()], negative, [counts[0, below].sum()]]),
    )
    found = equal_error_of(fine)
    threshold = found.threshold if np.isfinite(found.threshold) else float(values[0])
    return AllPairs(EqualErrorRate(found.rate, threshold), curve, int(counts[1].sum()), int(counts[0].sum()))


def _blocks(
    unit: NDArray[np.float32], singers: Ints, accept: PairFilter | None
) -> Iterator[tuple[NDArray[np.float32], Bools]]:
    """Yield scores and labels of all pairs, block by block; bit-identical in each pass."""
    n = len(unit)
    for top in range(0, n, BLOCK_ROWS):
        rows = slice(top, min(top + BLOCK_ROWS, n))
        for left in range(top, n, BLOCK_ROWS):
            columns = slice(left, min(left + BLOCK_ROWS, n))
            wanted = np.ones((rows.stop - rows.start, columns.stop - columns.start), bool)
            if left == top:
                wanted = np.triu(wanted, k=1)
            if accept is not None:
                wanted &= accept(rows, columns)
            scores = (unit[rows] @ unit[columns].T)[wanted]
            yield scores, (singers[rows, np.newaxis] == singers[np.newaxis, columns])[wanted]


def _sampled_range(unit: NDArray[np.float32]) -> tuple[float, float]:
    """Return the approximate range of the scores, for the bins only: scores outside fall into the end bins."""
    some = unit[np.linspace(0, len(unit) - 1, min(len(unit), 512)).astype(int)]
    scores = (some @ some.T)[np.triu_indices(len(some), k=1)]
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (-1.0, 1.0)
    margin = max(1e-6, 0.05 * (high - low))
    return low - margin, high + margin


def _bin(scores: NDArray[np.float32], low: float, high: float) -> Ints:
    return np.clip((scores.astype(np.float64) - low) * (_BINS / (high - low)), 0, _BINS - 1).astype(np.int64)


def _scores_in_bin(
    unit: NDArray[np.float32], singers: Ints, accept: PairFilter | None, span: tuple[float, float], index: int
) -> tuple[Floats, Floats, Floats]:
    """Return the distinct scores of one bin, descending, and the number of pairs of one and of two singers at each."""
    held: list[_Scores] = [(np.empty(0, np.float32), np.empty(0), np.empty(0))]
    n_held = 0
    for scores, labels in _blocks(unit, singers, accept):
        inside = _bin(scores, *span) == index
        if inside.any():
            held.append((scores[inside], labels[inside].astype(float), (~labels[inside]).astype(float)))
            n_held += int(inside.sum())
        if n_held > _COMPRESS_AT:
            held, n_held = [_distinct(held)], 0
    values, positive, negative = _distinct(held)
    return values[::-1], positive[::-1], negative[::-1]


_Scores = tuple[NDArray[np.float32], Floats, Floats]  # scores, and pairs of one and of two singers that have them


def _distinct(parts: list[_Scores]) -> _Scores:
    scores, positive, negative = (np.concatenate(column) for column in zip(*parts, strict=True))
    values, of_value = np.unique(scores, return_inverse=True)
    counts = [np.bincount(of_value, kind, len(values)).astype(float) for kind in (positive, negative)]
    return np.asarray(values, np.float32), counts[0], counts[1]


# --- ranks ----------------------------------------------------------------------------------------------------------

QUERIES, DISTRACTORS = 1000, 512  # as in the official evaluation


@dataclass(frozen=True)
class RankScores:
    """Similarities to compute ranks from."""

    singer: Ints  # [q], of the queries
    positive: NDArray[np.float32]  # [q]
    distractors: NDArray[np.float32]  # [q, n]


def draw_rank_scores(
    unit: NDArray[np.float32], singers: Ints, pairs: Pairs, *, seed: int, queries: int = QUERIES, n: int = DISTRACTORS
) -> RankScores:
    """Draw queries, positives and distractors of the official rank metric, and return their similarities.

    Queries and positives are the first `queries` pairs of one singer. The `n` distractors of each are drawn without
    replacement from the rows of other singers in `pairs`; if there are fewer than `n`, all are taken (the official
    code fails). The official code excludes every path that contains the query singer's name, so singer10 too for
    singer1; here singers are compared. Raises ValueError without a query, or with only one singer.
    """
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero(pairs.labels)[:queries]
    pool = np.unique(np.concatenate([pairs.first, pairs.second]))
    if not len(chosen) or len(np.unique(singers[pool])) < 2:
        raise ValueError("a rank needs pairs of one singer, and a second singer")
    others_of = {who: pool[singers[pool] != who] for who in np.unique(singers[pairs.first[chosen]])}
    n = min(n, *(len(others) for others in others_of.values()))
    positive, distractors = np.empty(len(chosen), np.float32), np.empty((len(chosen), n), np.float32)
    for i, pair in enumerate(chosen):
        query = unit[pairs.first[pair]]
        rows = rng.choice(others_of[singers[pairs.first[pair]]], n, replace=False)
        positive[i] = query @ unit[pairs.second[pair]]
        distractors[i] = unit[rows] @ query
    return RankScores(singers[pairs.first[chosen]], positive, distractors)
