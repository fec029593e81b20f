"""Back ends of scores on a labelled output: equal error rates and nearest neighbours of crops of different songs.

python -m benchmarks.scoring OUT.parquet [--singer-column singer] [--song-column song]

OUT.parquet is an output of `singerembed run` with a column of singers and one of songs. Back ends that read labels are
fitted without the singers of the pair that is scored.
"""

from __future__ import annotations

import argparse
from itertools import combinations_with_replacement

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.trials import Trials
from singerembed.evaluation.scoring import Moments, Scoring, fit_scoring

Floats = NDArray[np.float32]


def moments(rows: Floats) -> Moments:
    found = Moments(second=True)
    found.add(rows)
    return found


def unlabelled(kind: str, rows: Floats) -> Floats:
    vectors = fit_scoring(kind, moments(rows)).vectors(rows)
    return vectors @ vectors.T


def lda(rows: Floats, singer: NDArray[np.int64]) -> Floats:
    """Scores of each pair by a back end that has seen neither of its singers."""
    scores = np.empty((len(rows), len(rows)), np.float32)
    for a, b in combinations_with_replacement(range(singer.max() + 1), 2):
        seen = (singer != a) & (singer != b)
        others = [moments(rows[singer == other]) for other in np.unique(singer[seen])]
        fitted: Scoring = fit_scoring("lda", moments(rows[seen]), others)
        block = fitted.vectors(rows[singer == a]) @ fitted.vectors(rows[singer == b]).T
        scores[np.ix_(singer == a, singer == b)] = block
        scores[np.ix_(singer == b, singer == a)] = block.T
    return scores


def normalised_scores(scores: Floats, cohort: int | None = None) -> NDArray[np.float64]:
    """Return adaptive symmetric normalisation of scores [n, n] of rows against each other, float64 [n, n].

    Each score is given in standard deviations from the mean of the highest `cohort` scores of either row (None: of
    all), and the two are averaged (Matejka et al. 2017). For comparisons: it did not win, so no index uses it.
    """
    n = len(scores)
    others = np.sort(np.asarray(scores, np.float64)[~np.eye(n, dtype=bool)].reshape(n, n - 1), axis=1)
    near = others[:, -cohort:] if cohort else others
    mean, deviation = near.mean(axis=1), np.maximum(near.std(axis=1), 1e-9)
    return np.asarray(((scores - mean[:, np.newaxis]) / deviation[:, np.newaxis] + (scores - mean) / deviation) / 2)


def report(name: str, scores: Floats, trials: Trials) -> None:
    right = trials.nearest(scores)
    print(f"{name:<34} EER {trials.rate(scores):5.1f} %   nearest crop of another song right {right:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--singer-column", default="singer")
    parser.add_argument("--song-column", default="song")
    arguments = parser.parse_args()
    table = pq.read_table(arguments.output)
    table = table.filter(table["embedding"].is_valid())
    rows = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    trials = Trials(*(table[name].to_pylist() for name in (arguments.singer_column, arguments.song_column)))
    for kind in ("cosine", "centred", "whitened"):
        report(kind, unlabelled(kind, rows), trials)
    report("lda", lda(rows, trials.singer), trials)
    for kind in ("cosine", "centred"):
        scores = unlabelled(kind, rows)
        for cohort in (20, None):
            normalised = normalised_scores(scores, cohort).astype(np.float32)
            report(f"{kind}, as-norm with {cohort or 'all'}", normalised, trials)


if __name__ == "__main__":
    main()
