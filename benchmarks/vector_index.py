"""Vector indexes on a mixture made of real embeddings: recall, query time, build time, memory and disk.

python -m benchmarks.vector_index OUT.parquet --rows 1000000 --folder /scratch [--methods SQ8,HNSW,...] [--json FILE]

OUT.parquet is an output of `singerembed run` (one row a crop; overlapping crops, as of --hop 0.1, give more to draw
from). A row of the mixture is a made-up singer's centre, which is a convex combination of the means of three real
tracks, plus the residuals of two real crops from their track's mean; it is centred and scaled to length 1 as
`singerembed index` does, and stored as float16. Queries are drawn in the same way and are not in the mixture. Exact
search is NumPy over all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.command import errors_on_one_line
from singerembed.errors import UsageError

BLOCK = 20_000  # rows that are made, or compared, at a time
CROPS_A_SINGER = 50
K = 10
QUERIES = 500
CANDIDATES = 500  # that are ranked again by the stored vectors
Floats = NDArray[np.float32]


class Mixture:
    """Draws rows of made-up singers out of the embeddings of real crops."""

    def __init__(self, output: str, n_singers: int, flatten: float) -> None:
        table = pq.read_table(output, columns=["track_id", "path", "status", "embedding"])
        table = table.filter(pa_equal(table, "ok"))
        column = table["embedding"].combine_chunks()
        embedding = np.asarray(column.flatten(), np.float32).reshape(-1, column.type.list_size)
        if flatten != 1.0:
            embedding = flattened(embedding, flatten)
        names = [f"{a}\0{b}" for a, b in zip(table["track_id"].to_pylist(), table["path"].to_pylist(), strict=True)]
        track = np.unique(names, return_inverse=True)[1]
        self.mean = embedding.mean(axis=0)
        means = np.zeros((track.max() + 1, embedding.shape[1]), np.float32)
        np.add.at(means, track, embedding)
        means /= np.bincount(track)[:, np.newaxis]
        self.residual = embedding - means[track]
        rng = np.random.default_rng(0)
        some = rng.integers(len(means), size=(n_singers, 3))
        share = rng.dirichlet(np.ones(3), n_singers).astype(np.float32)
        self.centre = np.einsum("sk,skd->sd", share, means[some]) - self.mean
        self.dim = embedding.shape[1]

    def rows(self, n: int, seed: int, singer: NDArray[np.int64] | None = None) -> Floats:
        """Return `n` rows of length 1, float32 [n, dim]; `singer`: whose each is, [n] (None: drawn)."""
        rng = np.random.default_rng(seed)
        rows = self.centre[rng.integers(len(self.centre), size=n) if singer is None else singer]
        for _ in range(2):
            gain = rng.standard_normal((n, 1)).astype(np.float32) / np.sqrt(2, dtype=np.float32)
            rows = rows + gain * self.residual[rng.integers(len(self.residual), size=n)]
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def flattened(embedding: Floats, power: float) -> Floats:
    """Return embeddings whose singular values about the mean are raised to `power`, as of an engine of more rank."""
    centred = embedding - embedding.mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    return np.asarray((left * (values[0] * (values / values[0]) ** power)) @ right, np.float32)


def pa_equal(table: Any, status: str) -> Any:
    import pyarrow.compute as pc

    return pc.equal(table["status"], status)


def make_rows(mixture: Mixture, path: Path, n: int) -> NDArray[np.float16]:
    """Write `n` rows of the mixture to `path`, once, and return them memory-mapped, float16 [n, dim]."""
    if not path.exists() or path.stat().st_size != n * mixture.dim * 2:
        with path.open("wb") as file:
            for first in range(0, n, BLOCK):
                file.write(mixture.rows(min(BLOCK, n - first), seed=1 + first).astype(np.float16).tobytes())
    return np.memmap(path, np.float16, "r", shape=(n, mixture.dim))


class Nearest:
    """The rows nearest to each query among blocks of scores, which come one after another."""

    def __init__(self, n_queries: int, k: int) -> None:
        self._k, self._n = k, 0
        self.rows, self._scores = np.zeros((n_queries, 0), np.int64), np.zeros((n_queries, 0), np.float32)

    def add(self, scores: Floats) -> None:
        """Take the scores of the next rows, [queries, n]; `rows` holds the best of all, the best first."""
        k = min(self._k, scores.shape[1])
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        rows = np.hstack([self.rows, top + self._n])
        found = np.hstack([self._scores, np.take_along_axis(scores, top, axis=1)])
        order = np.argsort(-found, axis=1, kind="stable")[:, : self._k]
        self.rows, self._scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(found, order, axis=1)
        self._n += scores.shape[1]


def exact(rows: NDArray[np.float16], queries: Floats, k: int = K) -> NDArray[np.int64]:
    """Return the rows nearest to each query, [queries, k]."""
    nearest = Nearest(len(queries), k)
    for first in range(0, len(rows), BLOCK):
        nearest.add(queries @ rows[first : first + BLOCK].astype(np.float32).T)
    return nearest.rows


def ranked_again(rows: NDArray[np.float16], query: Floats, candidates: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return the `k` best of `candidates` by the stored vectors."""
    candidates = np.sort(candidates[candidates >= 0])
    score = rows[candidates].astype(np.float32) @ query
    return candidates[np.argsort(-score, kind="stable")[:k]]


# --- methods: each builds, and returns a function from one query to candidates, and the bytes on disk ---------------

Search = Callable[[Floats, int], NDArray[np.int64]]  # query [dim], how hard to look
Built = tuple[Search, list[int], int]  # the function, settings of how hard, bytes on disk


def _faiss(factory: str) -> Callable[[NDArray[np.float16], Path], Built]:
    def build(rows: NDArray[np.float16], folder: Path) -> Built:
        import faiss

        n_lists = int(2 ** np.round(np.log2(4 * np.sqrt(len(rows)))))
        # Rows have length 1, so distances give the order of inner products; the PCA subtracts a mean, which keeps
        # distances and not inner products.
        index = faiss.index_factory(rows.shape[1], factory.format(lists=n_lists), faiss.METRIC_L2)
        some = np.sort(np.random.default_rng(0).choice(len(rows), min(len(rows), 40 * n_lists, 100_000), replace=False))
        index.train(rows[some].astype(np.float32))
        for first in range(0, len(rows), BLOCK):
            index.add(rows[first : first + BLOCK].astype(np.float32))
        path = folder / "faiss.index"
        faiss.write_index(index, str(path))
        is_ivf = "IVF" in factory
        last = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
        inner: Any = faiss.extract_index_ivf(index) if is_ivf else last

        def search(query: Floats, effort: int) -> NDArray[np.int64]:
            if is_ivf:
                inner.nprobe = effort
            else:
                inner.hnsw.efSearch = effort
            return np.asarray(index.search(query[np.newaxis], CANDIDATES)[1][0])

        return search, [4, 8, 16, 32, 64, 128] if is_ivf else [500, 1000], path.stat().st_size

    return build


def _usearch(dtype: str) -> Callable[[NDArray[np.float16], Path], Built]:
    def build(rows: NDArray[np.float16], folder: Path) -> Built:
        from usearch.index import Index

        index = Index(ndim=rows.shape[1], metric="ip", dtype=dtype)
        for first in range(0, len(rows), BLOCK):
            block = np.asarray(rows[first : first + BLOCK])
            index.add(np.arange(first, first + len(block)), block, threads=2)
        path = folder / "usearch.index"
        index.save(str(path))

        def search(query: Floats, effort: int) -> NDArray[np.int64]:
            index.expansion_search = effort
            return np.asarray(index.search(query, CANDIDATES).keys).astype(np.int64)

        return search, [500, 1000], path.stat().st_size

    return build


def _hnswlib(rows: NDArray[np.float16], folder: Path) -> Built:
    import hnswlib

    index = hnswlib.Index("ip", rows.shape[1])
    index.init_index(len(rows), ef_construction=200, M=16, random_seed=0)
    for first in range(0, len(rows), BLOCK):
        index.add_items(rows[first : first + BLOCK].astype(np.float32), num_threads=2)
    path = folder / "hnswlib.index"
    index.save_index(str(path))

    def search(query: Floats, effort: int) -> NDArray[np.int64]:
        index.set_ef(effort)
        return np.asarray(index.knn_query(query, CANDIDATES, num_threads=1)[0][0]).astype(np.int64)

    return search, [500, 1000], path.stat().st_size


def _voyager(rows: NDArray[np.float16], folder: Path) -> Built:
    from voyager import Index, Space, StorageDataType

    index = Index(Space.InnerProduct, rows.shape[1], M=16, ef_construction=200, storage_data_type=StorageDataType.E4M3)
    for first in range(0, len(rows), BLOCK):
        index.add_items(rows[first : first + BLOCK].astype(np.float32), num_threads=2)
    path = folder / "voyager.index"
    index.save(str(path))

    def search(query: Floats, effort: int) -> NDArray[np.int64]:
        return np.asarray(index.query(query, CANDIDATES, query_ef=effort)[0]).astype(np.int64)

    return search, [500, 1000], path.stat().st_size


def _lancedb(rows: NDArray[np.float16], folder: Path) -> Built:
    import lancedb
    import pyarrow as pa

    def batches() -> Any:
        for first in range(0, len(rows), BLOCK):
            block = np.asarray(rows[first : first + BLOCK])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), rows.shape[1])
            ids = pa.array(np.arange(first, first + len(block)))
            yield pa.record_batch([ids, vectors], names=["id", "vector"])

    kind = pa.list_(pa.float16(), rows.shape[1])
    database = lancedb.connect(folder / "lance")
    table = database.create_table("rows", batches(), schema=pa.schema([("id", pa.int64()), ("vector", kind)]))
    n_lists = int(2 ** np.round(np.log2(np.sqrt(len(rows)))))
    table.create_index(metric="dot", index_type="IVF_PQ", num_partitions=n_lists, num_sub_vectors=rows.shape[1] // 8)
    size = sum(path.stat().st_size for path in (folder / "lance").rglob("*") if path.is_file())

    def search(query: Floats, effort: int) -> NDArray[np.int64]:
        found = table.search(query).distance_type("dot").nprobes(effort).limit(CANDIDATES).select(["id"]).to_arrow()
        return np.asarray(found["id"].to_numpy())

    return search, [8, 32, 128], size


METHODS: dict[str, Callable[[NDArray[np.float16], Path], Built]] = {
    "faiss IVF SQ8 of 64 principal components": _faiss("PCA64,IVF{lists},SQ8"),
    "faiss IVF SQ8 of 128 principal components": _faiss("PCA128,IVF{lists},SQ8"),
    "faiss IVF float16 of 64 principal components": _faiss("PCA64,IVF{lists},SQfp16"),
    "faiss IVF float16 of 128 principal components": _faiss("PCA128,IVF{lists},SQfp16"),
    "faiss IVF PQ of 125 bytes": _faiss("IVF{lists},PQ125"),
    "faiss IVF OPQ and PQ of 64 bytes": _faiss("OPQ64_256,IVF{lists},PQ64"),
    "faiss HNSW SQ8 of 128 principal components": _faiss("PCA128,HNSW32_SQ8"),
    "usearch HNSW float16": _usearch("f16"),
    "usearch HNSW int8": _usearch("i8"),
    "hnswlib float32": _hnswlib,
    "voyager 8-bit floats": _voyager,
    "lancedb IVF_PQ": _lancedb,
}


def measure(name: str, rows: NDArray[np.float16], queries: Floats, truth: NDArray[np.int64], folder: Path) -> Any:
    """Build `name` on `rows`, and look up the queries one by one at each effort."""
    place = folder / "built"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    before, started = _resident(), time.monotonic()
    search, efforts, size = METHODS[name](rows, place)
    built = time.monotonic() - started
    result: dict[str, Any] = {"method": name, "rows": len(rows), "build_seconds": round(built, 1)}
    result |= {"disk_mb": round(size / 1e6), "resident_mb": round(_resident() - before), "settings": []}
    for effort in efforts:
        search(queries[0], effort)
        right, times = 0, []
        for query, wanted in zip(queries, truth, strict=True):
            started = time.perf_counter()
            found = ranked_again(rows, query, search(query, effort), K)
            times.append(time.perf_counter() - started)
            right += len(set(found.tolist()) & set(wanted.tolist()))
        milliseconds = np.quantile(times, [0.5, 0.95]) * 1000
        recall = right / truth.size
        result["settings"].append(
            {"effort": effort, "recall": recall, "ms": [round(float(ms), 2) for ms in milliseconds]}
        )
    shutil.rmtree(place)
    return result


def _resident() -> float:
    """Anonymous memory of this process in MB: mapped files are not counted."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def methods_named(parts: str) -> list[str]:
    """Return the methods whose name holds one of `parts`, separated by commas. Raises UsageError for one in none."""
    wanted = [part.strip() for part in parts.split(",")]
    for part in wanted:
        if not any(part in name for name in METHODS):
            raise UsageError(f"no method is named like {part!r}; there are: {', '.join(METHODS)}")
    return [name for name in METHODS if any(part in name for part in wanted)]


@errors_on_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--methods", default="", help="parts of names, separated by commas; default all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--flatten", type=float, default=1.0, help="power of the singular values: below 1, more rank")
    arguments = parser.parse_args()
    names = methods_named(arguments.methods)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    mixture = Mixture(arguments.output, max(2, arguments.rows // CROPS_A_SINGER), arguments.flatten)
    rows = make_rows(mixture, arguments.folder / f"{arguments.rows}-{arguments.flatten:g}.f16", arguments.rows)
    queries = mixture.rows(QUERIES, seed=0)
    started = time.monotonic()
    truth = exact(rows, queries)
    print(f"exact: {1000 * (time.monotonic() - started) / len(queries):.1f} ms a query, {QUERIES} together")
    spectrum = np.linalg.svd(rows[:: max(1, len(rows) // 5000)].astype(np.float32), compute_uv=False) ** 2
    held = np.cumsum(spectrum) / spectrum.sum()
    print(
        "variance in 8, 16, 32, 64, 128, 256 components:",
        [round(float(held[n - 1]), 5) for n in (8, 16, 32, 64, 128, 256)],
    )
    results = []
    for name in names:
        try:
            results.append(measure(name, rows, queries, truth, arguments.folder))
        except ImportError as exc:
            print(f"{name}: left out, as {exc.name or exc} is not installed", flush=True)
            continue
        print(json.dumps(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
