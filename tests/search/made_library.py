"""Outputs of `run` with made-up singers, written without any audio."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from singerembed.engine.file import read_engine_file
from singerembed.engine.load import bundled_engine_path
from singerembed.output.finished import UnitIndex
from singerembed.output.schema import COUNTS_KEY, METADATA_KEY, UNITS_KEY, Counts, output_schema

DIM = 1000


@dataclass(frozen=True)
class MadeTrack:
    """A track with its crops: an embedding each, or None for a silent one."""

    track_id: str
    singer: str | None
    crops: Sequence[NDArray[np.float32] | None]
    year: int = 2000
    rms_dbfs: Sequence[float] = ()  # of its crops; further ones have -20


def made_tracks(
    n_singers: int, tracks_each: int, crops_each: int, *, spread: float = 0.6, seed: int = 0, first: int = 0
) -> list[MadeTrack]:
    """Tracks of made-up singers; crops lie around their track, tracks around their singer, all far from the origin."""
    rng, levels = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    offset = 5 * rng.standard_normal(DIM)
    tracks = []
    for singer in range(n_singers):
        centre = rng.standard_normal(DIM)
        for number in range(tracks_each):
            of_track = centre + spread * rng.standard_normal(DIM)
            crops = [
                (offset + of_track + spread * rng.standard_normal(DIM)).astype(np.float32) for _ in range(crops_each)
            ]
            rms = levels.normal(-20, 3, crops_each).tolist()
            tracks.append(MadeTrack(f"s{singer}-{first + number}", f"singer {singer}", crops, 1980 + number, rms))
    return tracks


def write_output(
    path: Path,
    tracks: Sequence[MadeTrack],
    *,
    engine: dict[str, Any] | None = None,
    separator: dict[str, Any] | None = None,
) -> str:
    """Write `tracks` as a finished output of the bundled engine, or of `engine`; one unit. Return the path."""
    file = read_engine_file(bundled_engine_path())
    identity = engine or {"name": file.spec.name, "sha256": file.sha256}
    schema = output_schema(pa.schema([("singer", pa.string()), ("year", pa.int64())]), DIM, "float32")
    rows, counts = list[dict[str, Any]](), Counts()
    for track in tracks:
        counts.tracks += 1
        levels = chain(track.rms_dbfs, repeat(-20.0))
        for crop, (embedding, rms) in enumerate(zip(track.crops, levels, strict=False)):
            counts.crops += 1
            counts.silent += embedding is None
            rows.append(
                {
                    "track_id": track.track_id, "path": f"{track.track_id}.wav", "crop": crop, "start": 4.0 * crop,
                    "end": 4.0 * crop + 4, "status": "silent" if embedding is None else "ok", "singer": track.singer,
                    "year": track.year, "rms_dbfs": rms, "embedding": embedding,
                }
            )  # fmt: skip
    units = UnitIndex()
    units.add(len(rows), counts)
    metadata = {
        METADATA_KEY: json.dumps(
            {"engine": identity, "separator": separator, "spec": file.spec.to_dict(), "options": {}}
        ),
        COUNTS_KEY: json.dumps(counts.to_dict()),
        UNITS_KEY: units.encode(),
    }
    table = pa.Table.from_pylist(rows, schema).replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return str(path)
