"""Write a segment of an index: the files of the tracks that one call of `build_index` adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from singerembed.search.copies import TracksAndCrops, find_copies
from singerembed.search.store import (
    KINDS,
    StoredIndex,
    StoredVectors,
    Vectors,
    joined_tables,
    text_column,
    track_vector,
    write_mapped_table,
)

_FLUSH_TRACKS = 4096
_CROPS = pa.schema(
    [
        ("track", pa.int64()),
        ("crop", pa.int32()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("rms_dbfs", pa.float32()),
    ]
)
CROP_COLUMNS = _CROPS.names[1:]
_NAMED = 5  # copies that a summary names


class TrackRow(NamedTuple):
    """A track as an index holds it."""

    columns: dict[str, Any]  # track_id, path, and the catalogue's other columns
    fingerprint: str
    crops: dict[str, NDArray[Any]]  # CROP_COLUMNS, [n] each
    vectors: Vectors  # [n, dim], of the crops


class Segment:
    """Writes tracks behind those that an index has, and finds those that are copies of others."""

    def __init__(self, folder: Path, name: str, dim: int, before: StoredIndex | None, gone: set[int]) -> None:
        """`before`: the index without this segment; None: there is none. `gone`: numbers of tracks that are replaced,
        to which more may be added while this one is written.
        """
        self.name = name
        self._folder, self._before, self._gone, self._dim = folder, before, gone, dim
        self.offset = before.tracks.num_rows if before else 0
        self._first = dict[str, int]()  # track whose crops are stored, by fingerprint
        if before:
            counts = before.tracks["n_crops"].to_numpy() > 0
            counts[list(gone)] = False
            stored = np.flatnonzero(counts)
            prints = before.tracks["fingerprint"].take(pa.array(stored)).to_pylist()
            self._first = dict(zip(prints, stored.tolist(), strict=True))
        self._rows, self._vectors = list[dict[str, Any]](), list[Vectors]()
        self._tables, self._crops = list[pa.Table](), list[pa.Table]()
        self.n_tracks = 0
        self.tracks = pa.table({"path": pa.array([], pa.string()), "same_as": pa.array([], pa.int64())})
        self.crops = _CROPS.empty_table()

    def write(self, rows: Iterable[TrackRow]) -> None:
        """Write the files of the segment; where there are no `rows`, what is left is empty."""
        with ExitStack() as stack:
            paths = {kind: self._folder / f"{self.name}.{kind}.f16" for kind in KINDS}
            files = {kind: stack.enter_context(path.open("wb")) for kind, path in paths.items()}
            for row in rows:
                self._add(row, files)
        self._flush()
        if not self.n_tracks:
            return
        self.crops = pa.concat_tables([self.crops, *self._crops])
        write_mapped_table(self._folder / f"{self.name}.crops.arrow", self.crops)
        tracks = joined_tables(self._tables)
        self._tables = []
        same_as = self._resolved(tracks)
        column = pa.array(same_as, pa.int64(), mask=same_as < 0)
        tracks = tracks.set_column(tracks.schema.get_field_index("same_as"), "same_as", column)
        pq.write_table(tracks, self._folder / f"{self.name}.tracks.parquet", compression="zstd")
        self.tracks = tracks.drop_columns(["vector"])
        write_mapped_table(self._folder / f"{self.name}.tracks.arrow", self.tracks)

    def _add(self, row: TrackRow, files: Mapping[str, BinaryIO]) -> None:
        number = self.offset + self.n_tracks
        first = self._first.get(row.fingerprint, number)
        if first == number or first in self._gone:
            first = self._first[row.fingerprint] = number
        n = len(row.vectors) if first == number else 0
        same_as = None if first == number else first
        coherence = float(np.linalg.norm(row.vectors.mean(axis=0)))
        own = {"n_crops": n, "same_as": same_as, "fingerprint": row.fingerprint, "coherence": coherence}
        self._rows.append({**row.columns, **own})
        whole = track_vector(row.vectors)
        self._vectors.append(whole)
        files["tracks"].write(whole.astype(np.float16).tobytes())
        if n:
            files["crops"].write(row.vectors.astype(np.float16).tobytes())
            self._crops.append(pa.table({"track": np.full(n, number), **row.crops}, _CROPS))
        self.n_tracks += 1
        if len(self._rows) >= _FLUSH_TRACKS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            names = dict.fromkeys(name for row in self._rows for name in row)  # outputs may have different ones
            table = pa.table({name: _column([row.get(name) for row in self._rows]) for name in names})
            same_as = table["same_as"].cast(pa.int64())
            table = table.set_column(table.schema.get_field_index("same_as"), "same_as", same_as)
            flat = pa.array(np.stack(self._vectors).astype(np.float16).ravel())
            vector = pa.FixedSizeListArray.from_arrays(flat, self._dim)
            self._tables.append(table.append_column("vector", vector))
            self._rows, self._vectors = [], []
            self._crops = [pa.concat_tables(self._crops).combine_chunks()] if self._crops else []

    def _resolved(self, tracks: pa.Table) -> NDArray[np.int64]:
        """Return the track that each of `tracks` is a copy of, -1 for none: one that is no copy itself."""
        before = self._before
        segments = [*(before.manifest["segments"] if before else []), self.name]
        tables = [*([before.tracks] if before else []), tracks]
        crops = pa.concat_tables([*([before.crops] if before else []), self.crops])
        known = np.concatenate([table["same_as"].fill_null(-1).to_numpy() for table in tables])
        counts = known < 0
        counts[list(self._gone)] = False
        vectors = {
            kind: StoredVectors([self._folder / f"{name}.{kind}.f16" for name in segments], self._dim) for kind in KINDS
        }
        library = TracksAndCrops(
            n_crops=np.concatenate([table["n_crops"].to_numpy() for table in tables]),
            coherence=np.concatenate([table["coherence"].to_numpy() for table in tables]).astype(np.float32),
            **{name: crops[name].to_numpy() for name in CROP_COLUMNS},
            track_vectors=vectors["tracks"],
            crop_vectors=vectors["crops"],
        )
        for number, first in find_copies(library, counts, self.offset).items():
            known[number] = first
        new = known[self.offset :]
        # A track with the same embeddings as one that is a copy is a copy of the same one.
        of_copy = (new >= 0) & (known[np.maximum(new, 0)] >= 0)
        new[of_copy] = known[new[of_copy]]
        return np.asarray(new)

    @property
    def n_doubled(self) -> int:
        """How many of its tracks are copies."""
        return int(self.tracks.num_rows - self.tracks["same_as"].null_count)

    @property
    def doubled(self) -> list[tuple[str, str]]:
        """Paths of the first few tracks that are copies, and of what they are copies of."""
        same_as = self.tracks["same_as"]
        found = np.flatnonzero(same_as.is_valid().to_numpy())[:_NAMED].tolist()
        return [(self.tracks["path"][row].as_py(), self._path(same_as[row].as_py())) for row in found]

    def _path(self, number: int) -> str:
        if self._before and number < self.offset:
            return str(self._before.tracks["path"][number].as_py())
        return str(self.tracks["path"][number - self.offset].as_py())


def _column(values: list[Any]) -> pa.Array:
    """Return `values` as a column: as text where they are not of one type."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return text_column(values)
