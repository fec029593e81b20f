"""Find the vectors nearest to a query: exactly, or by a quantised FAISS index and then by the stored vectors.

FAISS was chosen among five libraries by `benchmarks/vector_index.py` (docs/search.md): an inverted file over principal
components in 8 bits a number builds fastest, is smallest, and grows without a rebuild.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import MissingDependencyError
from singerembed.search.store import StoredVectors, Vectors

# Below this many rows all are compared: 4 to 40 ms a query on two cores.
EXACT_ROWS = 50_000
_BLOCK = 16_384  # rows that are compared, or added, at a time: 64 MB as float32
_COMPONENTS = 128
_TRAINING_ROWS = 100_000
# Lists that are looked through, and candidates that are compared with the stored vectors.
_PROBES = 512
_CANDIDATES = 500


def nearest(
    vectors: StoredVectors, queries: Vectors, k: int, allowed: NDArray[np.bool_], quantised: Any | None = None
) -> tuple[NDArray[np.int64], Vectors]:
    """Return the `k` rows nearest to each query and their scores, [queries, k], best first; -1 where there are fewer.

    `queries`: float32 [queries, dim], of length 1. `allowed`: [rows], False for rows that do not count. `quantised`:
    what `read_quantised` returned; None compares all rows. Equal scores are ordered by row.
    """
    if quantised is None or int(allowed.sum()) <= EXACT_ROWS:
        return _exact(vectors, queries, k, allowed)
    found = candidates(quantised, queries, k, allowed)
    rows, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    for i, candidate in enumerate(found):
        kept = np.sort(candidate[candidate >= 0])
        again = vectors.take(kept) @ queries[i]
        order = np.argsort(-again, kind="stable")[:k]
        rows[i, : len(order)], scores[i, : len(order)] = kept[order], again[order]
    return rows, scores


def candidates(quantised: Any, queries: Vectors, k: int, allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return rows that may be among the `k` nearest to each query, [queries, n], -1 where there are fewer than n."""
    faiss = _faiss()
    parameters = faiss.SearchParametersIVF(nprobe=_PROBES)
    if not allowed.all():
        parameters.sel = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    inner = faiss.extract_index_ivf(quantised)
    turned = quantised.chain.at(0).apply(queries)
    return np.asarray(inner.search(turned, max(k, _CANDIDATES), params=parameters)[1], np.int64)


def _exact(
    vectors: StoredVectors, queries: Vectors, k: int, allowed: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], Vectors]:
    wanted = np.flatnonzero(allowed)
    rows, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    for first in range(0, len(wanted), _BLOCK):
        block = wanted[first : first + _BLOCK]
        rows = np.hstack([rows, np.broadcast_to(block, (len(queries), len(block)))])
        scores = np.hstack([scores, queries @ vectors.take(block).T])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    lacking = ((0, 0), (0, max(0, k - rows.shape[1])))
    return np.pad(rows, lacking, constant_values=-1), np.pad(scores, lacking, constant_values=-np.inf)


def write_quantised(path: Path, vectors: StoredVectors, before: Path | None) -> None:
    """Write a quantised index of `vectors`; one of the first rows, at `before`, is added to instead of made anew.

    Raises OSError, and MissingDependencyError without faiss.
    """
    faiss = _faiss()
    if before is not None:
        index = faiss.read_index(str(before))
    else:
        n_lists = int(2 ** np.round(np.log2(4 * np.sqrt(len(vectors)))))
        components = min(_COMPONENTS, vectors.dim)
        # Vectors have length 1, so distances give the order of inner products. They survive the mean that the PCA
        # subtracts, which inner products do not: with those, recall was 0.94.
        index = faiss.index_factory(vectors.dim, f"PCA{components},IVF{n_lists},SQ8", faiss.METRIC_L2)
        n_training = min(len(vectors), _TRAINING_ROWS)
        faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1  # otherwise it prints a warning
        some = np.sort(np.random.default_rng(0).choice(len(vectors), n_training, replace=False))
        index.train(vectors.take(some))
    for rows in _blocks(index.ntotal, len(vectors)):
        index.add(vectors.take(rows))
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as exc:  # the system's words come last, in brackets
        raise OSError(str(exc).rpartition("(")[2].rstrip(")")) from exc


def read_quantised(path: Path) -> Any:
    """Open a quantised index, memory-mapped. Raises MissingDependencyError without faiss."""
    faiss = _faiss()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists)
    lists.prefetch_nthread = 0  # otherwise it starts 32 threads for each query
    return index


def _blocks(first: int, last: int) -> Iterable[NDArray[np.int64]]:
    return (np.arange(start, min(start + _BLOCK, last)) for start in range(first, last, _BLOCK))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as exc:
        raise MissingDependencyError(f"an index of more than {EXACT_ROWS:,} vectors", "faiss", "search") from exc
    return faiss
