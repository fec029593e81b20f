"""How long an index looks for copies among many tracks made of real embeddings, and whether it finds those made.

python -m benchmarks.search_copies OUT.parquet --tracks 1000000 --crops 5 --folder /scratch

Crops are the rows of benchmarks/vector_index.py, all tracks equally long, which is the most work; OUT.parquet is what
they are made of. A track's level is drawn with a standard deviation of 4 dB, its crops' about it with --level-db. One
track in a hundred is a copy of one before it: noise in its vectors (cosine 0.99), a gain and 0.03 dB of noise in its
levels.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from benchmarks.vector_index import CROPS_A_SINGER, Floats, Mixture
from singerembed.evaluation.pairs import unit_rows
from singerembed.search.copies import TracksAndCrops, find_copies
from singerembed.search.store import StoredVectors

BLOCK = 4000  # tracks that are made at a time
COPIES = 100  # one track in as many is a copy
MORE = 10_000  # tracks at most that a grown index has more


def _made(mixture: Mixture, n_crops: int, first: int, n: int, level_db: float) -> tuple[Floats, Floats]:
    """Return the vectors of tracks `first` to `first + n`, [n, crops, dim], and their levels, [n, crops]."""
    rng = np.random.default_rng(first)
    singer = np.repeat(np.arange(first, first + n) * n_crops // CROPS_A_SINGER % len(mixture.centre), n_crops)
    vectors = mixture.rows(n * n_crops, 1 + first, singer).reshape(n, n_crops, mixture.dim)
    level = rng.normal(-18, 4, (n, 1)) + rng.normal(0, level_db, (n, n_crops))
    copy = np.arange(COPIES - 1, n, COPIES)
    noise = rng.standard_normal((len(copy), n_crops, mixture.dim)) * 0.14 / np.sqrt(mixture.dim)
    vectors[copy] = unit_rows((vectors[copy - 1] + noise).reshape(-1, mixture.dim)).reshape(noise.shape)
    level[copy] = level[copy - 1] + rng.normal(0, 1, (len(copy), 1)) + rng.normal(0, 0.03, (len(copy), n_crops))
    return vectors, level.astype(np.float32)


def write_library(mixture: Mixture, folder: Path, n_tracks: int, n_crops: int, level_db: float) -> TracksAndCrops:
    """Write the vectors of made tracks into `folder`, float16."""
    paths = [folder / f"copies.{kind}.f16" for kind in ("tracks", "crops")]
    levels, coherence = list[Floats](), list[Floats]()
    with paths[0].open("wb") as of_tracks, paths[1].open("wb") as of_crops:
        for first in range(0, n_tracks, BLOCK):
            vectors, level = _made(mixture, n_crops, first, min(BLOCK, n_tracks - first), level_db)
            mean = vectors.mean(axis=1)
            of_tracks.write(unit_rows(mean).astype(np.float16).tobytes())
            of_crops.write(vectors.astype(np.float16).tobytes())
            levels.append(level.ravel())
            coherence.append(np.linalg.norm(mean, axis=1).astype(np.float32))
    crop = np.tile(np.arange(n_crops, dtype=np.int32), n_tracks)
    return TracksAndCrops(
        np.full(n_tracks, n_crops),
        np.concatenate(coherence),
        crop,
        4.0 * crop,
        4.0 * crop + 4,
        np.concatenate(levels),
        *(StoredVectors([path], mixture.dim) for path in paths),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--tracks", type=int, default=100_000)
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--level-db", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    n = arguments.tracks
    mixture = Mixture(arguments.output, max(2, n * arguments.crops // CROPS_A_SINGER), 1.0)
    started = time.process_time()
    library = write_library(mixture, arguments.folder, n, arguments.crops, arguments.level_db)
    print(f"made {n:,} tracks of {arguments.crops} crops in {time.process_time() - started:.0f} s", flush=True)
    number = np.arange(n)
    made = {i: i - 1 for i in number[number % BLOCK % COPIES == COPIES - 1].tolist()}
    more = min(MORE, n // 2)
    for what, first in (("new", 0), (f"grown by {more:,}", n - more)):
        started, busy = time.monotonic(), time.process_time()
        found = find_copies(library, np.ones(n, bool), first)
        seconds, cpu = time.monotonic() - started, time.process_time() - busy
        wanted = {track: copy for track, copy in made.items() if track >= first}
        wrong = sum(1 for track in found if track not in wanted)
        print(
            f"{what}: {seconds:.1f} s ({cpu:.1f} s of processor time), {len(wanted.items() & found.items()):,} of "
            f"{len(wanted):,} copies found, {wrong:,} others taken for copies",
            flush=True,
        )
    print(f"peak memory, mapped files included: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
