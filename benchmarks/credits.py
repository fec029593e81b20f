"""What `verify` finds of credits that are wrong on purpose, and how well `cluster` groups tracks by their singers.

python -m benchmarks.credits OUT.parquet [--singer-column singer] [--draws 50]

OUT.parquet is an output of `singerembed run` with a column of singers that is right. Credits are made wrong in two
ways: a fifth of all tracks are credited to another singer, drawn anew each time; and half of a singer's tracks, at most
twenty, are given to another, for each pair of singers of whom the first has six tracks or more. Figures are medians, in
brackets from the 10th to the 90th percentile of the draws or pairs. Other tracks of the same song are not left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, v_measure_score

from singerembed.search.build import index_of
from singerembed.search.cluster import group_tracks
from singerembed.search.store import StoredIndex
from singerembed.search.verify import MIN_TRACKS, verify_credits

SHARE = 0.2
MOST_GIVEN = 20
Names = NDArray[np.str_]


def swapped(singer: Names, draws: int) -> Iterator[Names]:
    """Yield credits of which a fifth is wrong: each of those tracks is credited to another singer, drawn."""
    names = np.unique(singer)
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        credited = singer.copy()
        for row in rng.choice(len(singer), round(SHARE * len(singer)), replace=False):
            credited[row] = rng.choice(names[names != singer[row]])
        yield credited


def given_away(singer: Names) -> Iterator[Names]:
    """Yield, for each pair of singers, credits in which tracks of the first are the second's."""
    for first, second in permutations(np.unique(singer), 2):
        rows = np.flatnonzero(singer == first)
        credited = singer.copy()
        credited[rows[: min(MOST_GIVEN, len(rows) // 2)]] = second
        if len(rows) >= 2 * MIN_TRACKS:
            yield credited


def report(name: str, index: StoredIndex, column: str, singer: Names, trials: Iterator[Names]) -> None:
    """Print how well `verify` tells wrong credits from right ones."""
    tracks = index.tracks
    found = dict[str, list[float]]()
    n_wrong = []
    for credited in trials:
        at = tracks.schema.get_field_index(column)
        index.tracks = tracks.set_column(at, column, pa.array(credited))
        result = verify_credits(index, column)
        checked = np.flatnonzero(np.isfinite(result.credits.llr))
        wrong = (credited != singer)[result.credits.track]
        suspects = result.suspects(1.0)[: int(wrong[checked].sum())]
        n_wrong.append(len(suspects))
        named = np.array(result.singers)[result.credits.other[suspects]]
        right = wrong[suspects] & (named == singer[result.credits.track[suspects]])
        for what, value in (
            ("area under the ROC curve", roc_auc_score(wrong[checked], -result.credits.llr[checked])),
            ("wrong ones among as many first suspects", wrong[suspects].mean()),
            ("of these with the right singer named", right.sum() / max(1, wrong[suspects].sum())),
            ("Cllr", result.calibration.cllr), ("Cllr at best", result.calibration.min_cllr),
            ("calibration error", result.calibration.ece), ("equal error rate", result.calibration.eer),
        ):  # fmt: skip
            found.setdefault(what, []).append(float(value))
    index.tracks = tracks
    print(f"{name}: {len(n_wrong)} times, {np.median(n_wrong):g} wrong credits that could be checked")
    for what, values in found.items():
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
        print(f"  {what}: {middle:.2f} ({low:.2f} to {high:.2f})")


def report_groups(index: StoredIndex, singer: Names) -> None:
    """Print how well groups are singers; for the V-measure, a track in no group is a group of its own."""
    groups = group_tracks(index)
    truth = np.unique(singer[groups.track], return_inverse=True)[1]
    grouped = groups.group >= 0
    alone = np.where(grouped, groups.group, groups.n_groups + np.arange(len(truth)))
    largest = [np.bincount(truth[groups.group == group]).max() for group in range(groups.n_groups)]
    print(
        f"cluster: V-measure {v_measure_score(truth, alone):.2f}; {grouped.sum()} of {len(truth)} tracks in "
        f"{groups.n_groups} groups of purity {sum(largest) / max(1, grouped.sum()):.2f}, V-measure of these "
        f"{v_measure_score(truth[grouped], groups.group[grouped]):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--singer-column", default="singer")
    parser.add_argument("--draws", type=int, default=50)
    arguments = parser.parse_args()
    with index_of(arguments.output, arguments.singer_column) as index:
        singer = np.array(index.tracks[arguments.singer_column].to_pylist(), np.str_)
        counts = np.unique(singer[index.active], return_counts=True)[1]
        engine = index.engine
        print(
            f"engine {engine['name']} ({engine['sha256'][:12]}...): {index.active.sum()} tracks, "
            f"{len(index.vectors['crops'])} crops, {len(counts)} singers, {(counts >= MIN_TRACKS).sum()} of them with "
            f"{MIN_TRACKS} tracks or more"
        )
        fit = verify_credits(index, arguments.singer_column).calibration
        print(
            f"credits as they are: equal error rate {fit.eer:.3f}, Cllr {fit.cllr:.2f} (at best {fit.min_cllr:.2f}), "
            f"calibration error {fit.ece:.2f}"
        )
        report("a fifth swapped", index, arguments.singer_column, singer, swapped(singer, arguments.draws))
        report("given to another", index, arguments.singer_column, singer, given_away(singer))
        report_groups(index, singer)


if __name__ == "__main__":
    main()
