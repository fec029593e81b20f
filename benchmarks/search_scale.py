"""`singerembed index` and `search` on an output of many rows made of real embeddings: times, memory, disk, recall.

python -m benchmarks.search_scale OUT.parquet --rows 1000000 --more 10000 --folder /scratch

Rows are those of benchmarks/vector_index.py, as tracks of ten crops whose levels deviate by 2 dB; OUT.parquet is what
they are made of. The index is left as FOLDER/made.index, and the output it grew by as FOLDER/more.parquet, for
benchmarks/search_times.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.vector_index import CROPS_A_SINGER, Mixture
from singerembed.output.finished import UnitIndex
from singerembed.output.schema import (
    COUNTS_KEY,
    METADATA_KEY,
    ROW_GROUP_ROWS,
    UNITS_KEY,
    Counts,
    output_schema,
    writer_options,
)
from singerembed.search.build import build_index
from singerembed.search.copies import find_copies
from singerembed.search.nearest import nearest
from singerembed.search.query import open_index

CROPS_A_TRACK = 10
TRACKS_A_SINGER = CROPS_A_SINGER // CROPS_A_TRACK
QUERIES = 300
_UNIT_ROWS = 20_000


def write_output(mixture: Mixture, source: str, path: Path, n: int, first: int) -> None:
    """Write `n` rows as a finished output; the first is number `first` of all."""
    schema = output_schema(pa.schema([("singer", pa.string())]), mixture.dim, "float16")
    units, total = UnitIndex(), Counts()
    with pq.ParquetWriter(path, schema, **writer_options(schema)) as writer:
        for start in range(first, first + n, _UNIT_ROWS):
            size = min(_UNIT_ROWS, first + n - start)
            track = np.arange(start, start + size) // CROPS_A_TRACK
            singer = track // TRACKS_A_SINGER % len(mixture.centre)
            rows = mixture.rows(size, 1 + start, singer).astype(np.float16)
            crop = np.arange(start, start + size) % CROPS_A_TRACK
            flat = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), type=schema.field("embedding").type)
            counts = Counts(tracks=size // CROPS_A_TRACK, crops=size)
            columns = {
                "track_id": pa.array([f"t{number}" for number in track]), "crop": pa.array(crop, pa.int32()),
                "path": pa.array([f"t{number}.flac" for number in track]), "start": pa.array(4.0 * crop),
                "end": pa.array(4.0 * crop + 4), "status": pa.array(["ok"] * size),
                "rms_dbfs": pa.array(np.random.default_rng(start).normal(-18, 2, size), pa.float32()),
                "singer": pa.array([f"s{number}" for number in singer]), "embedding": flat,
            }  # fmt: skip
            filled = [columns.get(field.name, pa.nulls(size, field.type)) for field in schema]
            table = pa.table(filled, schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            units.add(size, counts)
            total.tracks, total.crops = total.tracks + counts.tracks, total.crops + counts.crops
        metadata = pq.read_schema(source).metadata[METADATA_KEY]
        writer.add_key_value_metadata(
            {METADATA_KEY: metadata, COUNTS_KEY: json.dumps(total.to_dict()), UNITS_KEY: units.encode()}
        )


def looked_for_copies(*arguments: Any) -> dict[int, int]:
    """Do what `find_copies` does, and print how long it took."""
    started = time.process_time()
    found = find_copies(*arguments)
    print(f"copies: looked for in {time.process_time() - started:.1f} s of processor time, {len(found):,} found")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--more", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    mixture = Mixture(arguments.output, max(2, arguments.rows // CROPS_A_SINGER), 1.0)
    path = arguments.folder / "made.index"
    shutil.rmtree(path, ignore_errors=True)
    for name, n, first in (("made", arguments.rows, 0), ("more", arguments.more, arguments.rows)):
        output = arguments.folder / f"{name}.parquet"
        write_output(mixture, arguments.output, output, n, first)
        started, busy = time.monotonic(), time.process_time()
        with mock.patch("singerembed.search.segment.find_copies", looked_for_copies):
            done = build_index([str(output)], str(path))
        seconds, cpu = time.monotonic() - started, time.process_time() - busy
        print(f"{name}: {done.added_crops:,} crops in {seconds:.1f} s ({cpu:.1f} s of processor time)", flush=True)
        if name == "made":
            output.unlink()
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"disk {size / 1e9:.2f} GB, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    index = open_index(str(path))
    vectors, quantised = index.stored.vectors["crops"], index.quantised("crops")
    queries, allowed = mixture.rows(QUERIES, seed=0), np.ones(len(vectors), bool)
    truth = nearest(vectors, queries, 10, allowed)[0]
    right, times = 0, []
    for query, wanted in zip(queries, truth, strict=True):
        started = time.perf_counter()
        found = nearest(vectors, query[np.newaxis], 10, allowed, quantised)[0][0]
        times.append(time.perf_counter() - started)
        right += len(set(found.tolist()) & set(wanted.tolist()))
    median, high = np.quantile(times, [0.5, 0.95]) * 1000
    print(f"crops: recall@10 {right / (10 * QUERIES):.4f}, {median:.1f} ms a query (95 %: {high:.1f} ms)")


if __name__ == "__main__":
    main()
