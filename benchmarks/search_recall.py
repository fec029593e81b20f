"""Recall of the quantised vectors of an index at more rows than fit on a disk, against exact search.

python -m benchmarks.search_recall OUT.parquet --rows 10000000 --folder /scratch

Rows are drawn as those of benchmarks/search_scale.py, made anew whenever they are read, and rounded to float16 as an
index stores them. What FAISS writes into the folder stays there. Every row is compared with the queries. Their
candidates are ranked again by those scores, as `singerembed search` ranks them by the stored vectors.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.vector_index import CROPS_A_SINGER, Floats, Mixture, Nearest
from singerembed.search.nearest import candidates, read_quantised, write_quantised

K = 10
BLOCK = 16_384  # rows that are made at a time: as many as an index adds at a time, so that none is made twice


class MadeVectors:
    """Stands for the stored vectors of an index; row i is a crop of singer i // CROPS_A_SINGER."""

    def __init__(self, mixture: Mixture, n: int) -> None:
        self._mixture, self._n = mixture, n
        self.dim = mixture.dim

    def __len__(self) -> int:
        return self._n

    def block(self, first: int) -> Floats:
        """Return the rows from `first`, a multiple of BLOCK, to the next, float32 [n, dim]."""
        rows = np.arange(first, min(first + BLOCK, self._n))
        singer = rows // CROPS_A_SINGER % len(self._mixture.centre)
        return self._mixture.rows(len(rows), 1 + first, singer).astype(np.float16).astype(np.float32)

    def take(self, rows: NDArray[np.int64]) -> Floats:
        """Return the vectors of `rows` [n], which ascend, float32 [n, dim]."""
        parts = []
        for number in np.unique(rows // BLOCK):
            wanted = rows[rows // BLOCK == number]
            parts.append(self.block(int(number) * BLOCK)[wanted - number * BLOCK])
        return np.concatenate(parts)


def scores(
    vectors: MadeVectors, queries: Floats, found: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows nearest to each query among all rows, and among its candidates `found`, both [queries, K]."""
    nearest = Nearest(len(queries), K)
    ranked = np.full(found.shape, -np.inf, np.float32)
    for first in range(0, len(vectors), BLOCK):
        block = queries @ vectors.block(first).T
        query, place = np.nonzero((found >= first) & (found < first + BLOCK))
        ranked[query, place] = block[query, found[query, place] - first]
        nearest.add(block)
    order = np.argsort(-ranked, axis=1, kind="stable")[:, :K]
    return nearest.rows, np.take_along_axis(found, order, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    mixture = Mixture(arguments.output, max(2, arguments.rows // CROPS_A_SINGER), 1.0)
    vectors, path = MadeVectors(mixture, arguments.rows), arguments.folder / "made.faiss"
    started, busy = time.monotonic(), time.process_time()
    write_quantised(path, vectors, None)
    print(
        f"{arguments.rows:,} rows made and added in {time.monotonic() - started:.0f} s "
        f"({time.process_time() - busy:.0f} s of processor time), {path.stat().st_size / 1e9:.2f} GB",
        flush=True,
    )
    quantised, allowed = read_quantised(path), np.ones(len(vectors), bool)
    queries, times, rows = mixture.rows(arguments.queries, seed=0), [], []
    for query in queries:
        started = time.perf_counter()
        rows.append(candidates(quantised, query[np.newaxis], K, allowed)[0])
        times.append(time.perf_counter() - started)
    truth, found = scores(vectors, queries, np.stack(rows))
    right = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, found, strict=True))
    median, high = np.quantile(times, [0.5, 0.95]) * 1000
    print(f"recall@{K} {right / truth.size:.4f}; candidates of a query in {median:.1f} ms (95 %: {high:.1f} ms)")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
