"""An index on disk: a folder whose `index.json` names the files that count.

`index.json` is written last and by rename, so an index is whole or not there, and one that grows stays as it was until
then. A segment is what one call of `singerembed index` added: NUMBER.tracks.arrow (a row a track: the catalogue's
columns), NUMBER.crops.arrow (a row a crop), and their vectors as raw float16, row after row, in NUMBER.tracks.f16 and
NUMBER.crops.f16. All four are memory-mapped. Tracks and crops are numbered through all segments. NUMBER.tracks.parquet,
with the vectors as a column, is for other programs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from singerembed import storage
from singerembed.errors import InputError, OutputError
from singerembed.evaluation.pairs import unit_rows
from singerembed.evaluation.scoring import Scoring

MANIFEST, SCORING = "index.json", "scoring.npz"
FORMAT_VERSION = 3
MIN_LENGTH = 1e-6  # of a sum of vectors; what is shorter points nowhere
KINDS = ("tracks", "crops")
# Of tracks, which are not the catalogue's; the vector is in the Parquet files alone.
INDEX_COLUMNS = ("n_crops", "same_as", "fingerprint", "coherence", "vector")
Vectors = NDArray[np.float32]


def singer_name(value: Any) -> str:
    """The name of a singer in a column of any type; empty if there is none."""
    return "" if value is None else str(value)


def track_vector(crops: Vectors) -> Vectors:
    """Return the vector of a track, [dim]: the mean of its crops' vectors [n, dim], scaled to length 1."""
    return np.asarray(unit_rows(crops.mean(axis=0, keepdims=True))[0])


class StoredVectors:
    """The vectors of all segments, float16 on disk, read as float32."""

    def __init__(self, paths: list[Path], dim: int) -> None:
        self.maps = [np.memmap(path, np.float16, "r").reshape(-1, dim) for path in paths if path.stat().st_size]
        self.ends = np.cumsum([len(each) for each in self.maps], dtype=np.int64)
        self.dim = dim

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def take(self, rows: NDArray[np.int64]) -> Vectors:
        """Return the vectors of `rows` [n], float32 [n, dim]."""
        found = np.empty((len(rows), self.dim), np.float32)
        of_map = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(of_map):
            mask = of_map == number
            found[mask] = self.maps[number][rows[mask] - (self.ends[number - 1] if number else 0)]
        return found


@dataclass(frozen=True)
class Profiles:
    """The singers of an index, each as the sum of its tracks' vectors."""

    names: list[str]
    n_tracks: NDArray[np.int64]  # [singers]
    total: Vectors  # [singers, dim], memory-mapped
    length: Vectors  # [singers], of `total`

    def scores(self, vectors: Vectors) -> Vectors:
        """Return the scores of vectors [n, dim] of length 1 against each singer, float32 [n, singers]."""
        found = vectors @ self.total.T
        found /= np.maximum(self.length, MIN_LENGTH)
        return np.asarray(found)


class StoredIndex:
    """An index as it is on disk, opened for reading."""

    def __init__(self, path: str) -> None:
        """Raises InputError if `path` is no index, OutputError if it is damaged or of another version."""
        self.folder = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise InputError(f"{path} is not an index. Make one with: singerembed index OUT.parquet {path}") from exc
        except (OSError, ValueError) as exc:
            raise OutputError(f"cannot read the index {path}: {exc}") from exc
        if self.manifest.get("format") != FORMAT_VERSION:
            raise OutputError(
                f"{path}: index format {self.manifest.get('format')}, but this singerembed reads {FORMAT_VERSION}. "
                "Make the index again"
            )
        try:
            self._open()
        except (OSError, EOFError, KeyError, ValueError, BadZipFile, pa.ArrowException) as exc:
            raise OutputError(f"the index {path} is damaged ({exc}). Make it again") from exc

    def _open(self) -> None:
        names = self.manifest["segments"]
        with np.load(self.folder / self.manifest["scoring"]) as arrays:
            projection = arrays.get("projection")
            self.scoring = Scoring(str(arrays["kind"]), arrays["mean"], projection)
        dim = self.scoring.dim
        self.vectors = {kind: StoredVectors([self.folder / f"{n}.{kind}.f16" for n in names], dim) for kind in KINDS}
        self.tracks, self.crops = (
            joined_tables([_mapped_table(self.folder / f"{name}.{kind}.arrow") for name in names]) for kind in KINDS
        )
        if len(self.vectors["tracks"]) != self.tracks.num_rows or len(self.vectors["crops"]) != self.crops.num_rows:
            raise ValueError("its tables and vectors are not of one length")

    @property
    def engine(self) -> dict[str, Any]:
        """Name and hash of the engine that made the embeddings."""
        return dict(self.manifest["engine"])

    @property
    def separator(self) -> dict[str, Any] | None:
        """Name, hash and `min_vocals_db` of the separator that the voices came out of; None where none did."""
        separator = self.manifest["separator"]
        return None if separator is None else dict(separator)

    @property
    def singer_column(self) -> str | None:
        """The column of singers, if there is one."""
        column = self.manifest["singer_column"]
        return None if column is None else str(column)

    @cached_property
    def active(self) -> NDArray[np.bool_]:
        """Whether a track counts, [tracks]: not a copy of another, and not replaced by a later one."""
        active = ~self.tracks["same_as"].is_valid().to_numpy()
        active[self.manifest["replaced"]] = False
        return np.asarray(active, bool)

    @cached_property
    def track_of_crop(self) -> NDArray[np.int64]:
        """Number of each crop's track, [crops]."""
        return np.asarray(self.crops["track"].to_numpy(), np.int64)

    @cached_property
    def first_crop(self) -> NDArray[np.int64]:
        """Number of each track's first crop, and the number of crops at the end, [tracks + 1]."""
        counts = self.tracks["n_crops"].to_numpy()
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def singers(self) -> list[str]:
        """The singer of each track; empty where there is none or no column of them."""
        if self.singer_column is None:
            return [""] * self.tracks.num_rows
        return [singer_name(name) for name in self.tracks[self.singer_column].to_pylist()]

    def singer(self, track: int) -> str:
        """The singer of one track; empty if there is none."""
        return singer_name(self.tracks[self.singer_column][track].as_py()) if self.singer_column is not None else ""

    @cached_property
    def profiles(self) -> Profiles:
        """The singers, in the order of their names."""
        total = np.load(self.folder / f"{self.manifest['singers']}.npy", mmap_mode="r")
        with np.load(self.folder / f"{self.manifest['singers']}.npz") as arrays:
            return Profiles(arrays["names"].tolist(), arrays["n_tracks"], total, arrays["length"])

    def crops_of(self, track: int) -> slice:
        """Numbers of the crops of a track."""
        return slice(int(self.first_crop[track]), int(self.first_crop[track + 1]))


def _mapped_table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def joined_tables(tables: list[pa.Table]) -> pa.Table:
    """Join tables of any columns; one whose types cannot be told as one type, as numbers and text, becomes text."""
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        schemas = [pa.schema([table.schema.field(name)]) for table in tables if name in table.column_names]
        try:
            pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            tables = [_with_text(table, name) if name in table.column_names else table for table in tables]
    return pa.concat_tables(tables, promote_options="permissive")


def _with_text(table: pa.Table, name: str) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, text_column(table[name].to_pylist()))


def text_column(values: list[Any]) -> pa.Array:
    """Return `values` as text; None stays."""
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def write_mapped_table(path: Path, table: pa.Table) -> None:
    """Write `table` as an Arrow file without compression, which is opened in no time whatever its size."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def publish_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `index.json`: from now on the index is what `manifest` says."""
    with storage.publishing(str(folder / MANIFEST)) as temporary:
        Path(temporary).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
