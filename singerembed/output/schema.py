"""The schema of an output, its rows as Arrow tables, and the writer of part files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from singerembed.catalog.read import Track
from singerembed.errors import TrackError
from singerembed.storage import Facts, portable, printable

METADATA_KEY = b"singerembed"
COUNTS_KEY = b"singerembed.counts"
UNITS_KEY = b"singerembed.units"
# Some 16 MB of embeddings: large enough to read fast, small enough to hold while a row group fills.
ROW_GROUP_ROWS = 4096

OK, SILENT, NO_VOICE, ERROR = "ok", "silent", "no_voice", "error"

_LEADING = [
    pa.field("track_id", pa.string(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("crop", pa.int32()),
    pa.field("start", pa.float64()),
    pa.field("end", pa.float64()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_code", pa.string()),
    pa.field("error", pa.string()),
    pa.field("audio_note", pa.string()),
    pa.field("peak_dbfs", pa.float32()),
    pa.field("rms_dbfs", pa.float32()),
]
# What a recording was when it was read, by which an update knows it again. The start and end are the catalogue's.
IDENTITY = [
    pa.field("track_start", pa.float64()),
    pa.field("track_end", pa.float64()),
    pa.field("file_size", pa.int64()),
    pa.field("file_mtime", pa.timestamp("us", "UTC")),
]
PACKET_HASH = pa.field("packet_hash", pa.string())
_AUDIO_HASH = pa.field("audio_hash", pa.string())
_VOCAL_RATIO = pa.field("vocal_ratio", pa.float32())  # dB
_VOICE_FROM = pa.field("voice_from", pa.string())  # "stem", "separator", or "recording" as it is
_OPTIONAL = [_AUDIO_HASH, PACKET_HASH, _VOCAL_RATIO, _VOICE_FROM]
RESERVED_COLUMNS = [field.name for field in (*_LEADING, *IDENTITY, *_OPTIONAL)] + ["embedding"]


@dataclass(frozen=True)
class TrackRows:
    """The rows of one track: one a crop, and one more, at the end, for what went wrong with it."""

    crop: NDArray[np.int32]  # [n]
    start: NDArray[np.float64]  # [n], seconds from the beginning of the recording
    end: NDArray[np.float64]  # [n]
    status: list[str]  # [n] of OK, SILENT, NO_VOICE, ERROR; an ERROR here is a crop with NaN or infinity in it
    peak: NDArray[np.float32]  # [n], full scale is 1; NaN where status is ERROR
    rms: NDArray[np.float32]  # [n]
    embedding: NDArray[np.float32]  # [crops that are OK, dim]
    error: TrackError | None = None
    note: str = ""  # what a person should know of the recording, although it was decoded; empty: nothing
    seconds: float = 0.0  # spent on decoding and embedding it
    audio_hash: str = ""  # of the samples of its crops; empty: not wanted
    packet_hash: str = ""  # of the file's encoded audio; empty: not wanted, or it cannot be read
    facts: Facts = field(default_factory=Facts)  # of the file, before it was opened
    # [n], energy of the separated voice over the mixture's in dB, NaN where unknown; None: not separated
    vocal_ratio: NDArray[np.float32] | None = None
    seems_mixed: bool | None = None  # its first crop seems to hold accompaniment; None: nobody looked

    @property
    def n_rows(self) -> int:
        return len(self.crop) + (self.error is not None)

    @classmethod
    def of_error(cls, error: TrackError, embedding_dim: int, seconds: float) -> TrackRows:
        """The one row of a track of which nothing was embedded."""
        none = np.empty(0, np.float32)
        times = np.empty(0, np.float64)
        embedding = np.empty((0, embedding_dim), np.float32)
        return cls(np.empty(0, np.int32), times, times, [], none, none, embedding, error, seconds=seconds)


@dataclass
class Counts:
    """Totals over a set of rows."""

    tracks: int = 0
    crops: int = 0
    silent: int = 0
    error_tracks: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # rows, by error_code
    audio_seconds: float = 0.0  # of the crops
    no_voice: int = 0

    def add(self, rows: TrackRows) -> None:
        """Count one track."""
        bad_crops = rows.status.count(ERROR)
        self.tracks += 1
        self.crops += len(rows.crop)
        self.silent += rows.status.count(SILENT)
        self.no_voice += rows.status.count(NO_VOICE)
        self.error_tracks += rows.error is not None or bad_crops > 0
        self.audio_seconds += float((rows.end - rows.start).sum())
        if rows.error is not None:
            self.errors[rows.error.code] += 1
        if bad_crops:
            self.errors[INVALID_SAMPLES] += bad_crops

    def add_kept(self, rows: pa.Table) -> None:
        """Count one track by the rows that an earlier run wrote for it."""
        status = rows["status"].to_numpy()
        errors = [code for code in rows["error_code"].to_pylist() if code is not None]
        self.tracks += 1
        self.crops += rows.num_rows - rows["crop"].null_count
        self.silent += int((status == SILENT).sum())
        self.no_voice += int((status == NO_VOICE).sum())
        self.error_tracks += bool(errors)
        self.errors.update(errors)
        self.audio_seconds += float(np.nansum(rows["end"].to_numpy() - rows["start"].to_numpy()))

    def merge(self, other: Counts) -> None:
        """Add the counts of other rows."""
        self.tracks += other.tracks
        self.crops += other.crops
        self.silent += other.silent
        self.no_voice += other.no_voice
        self.error_tracks += other.error_tracks
        self.errors.update(other.errors)
        self.audio_seconds += other.audio_seconds

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON types."""
        return {**self.__dict__, "errors": dict(self.errors)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Counts:
        """Rebuild counts from `to_dict`."""
        return cls(**{**fields, "errors": Counter(fields["errors"])})


INVALID_SAMPLES = "invalid_samples"
_INVALID_MESSAGE = "NaN or infinity in the samples"


def output_schema(
    extra: pa.Schema,
    embedding_dim: int,
    embedding_dtype: str,
    *,
    audio_hash: bool = False,
    packet_hash: bool = False,
    separated: bool = False,
    stems: bool = False,
) -> pa.Schema:
    """Columns of the output; `extra` are the catalogue's. `embedding_dtype` is float32 or float16."""
    wanted = zip(_OPTIONAL, (audio_hash, packet_hash, separated, stems), strict=True)
    leading = [*_LEADING, *IDENTITY, *(field for field, is_wanted in wanted if is_wanted)]
    value = pa.float16() if embedding_dtype == "float16" else pa.float32()
    return pa.schema([*leading, *extra, pa.field("embedding", pa.list_(pa.field("element", value), embedding_dim))])


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """How columns are stored: embeddings as they are (they do not compress), the rest dictionary-coded and zstd."""
    others = [name for name in schema.names if name != "embedding"]
    return {
        "compression": {**dict.fromkeys(others, "zstd"), "embedding.list.element": "none"},
        "use_dictionary": others,
        "write_statistics": others,
    }


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema`: null where it lacks one, or has one that cannot be converted."""
    if table.schema.names == schema.names:
        with suppress(pa.ArrowException):
            return table.cast(schema)
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        column = pa.nulls(table.num_rows, kind)
        if name in table.column_names:
            with suppress(pa.ArrowException):
                column = table[name].cast(kind)
        columns.append(column)
    return pa.table(columns, schema=schema)


class PartWriter:
    """Writes tracks in order to one Parquet file, a row group at a time."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, **writer_options(schema))
        self._tracks: list[tuple[Track, TrackRows]] = []
        self._extra: list[pa.Table] = []
        self._tables: list[pa.Table] = []  # of the tracks before those
        self._rows = 0
        self.counts = Counts()

    def add(self, track: Track, rows: TrackRows, extra: pa.Table) -> None:
        """Append one track; `extra` is the one row of its other columns."""
        self.counts.add(rows)
        self._tracks.append((track, rows))
        self._extra.append(extra)
        self._added(rows.n_rows)

    def keep(self, rows: pa.Table) -> None:
        """Append the rows that an earlier run wrote for one track."""
        self.counts.add_kept(rows)
        self._gather()
        self._tables.append(rows)
        self._added(rows.num_rows)

    def close(self) -> None:
        """Finish the file; the counts go into its metadata."""
        self._flush()
        self._writer.add_key_value_metadata({COUNTS_KEY: json.dumps(self.counts.to_dict())})
        self._writer.close()

    def abort(self) -> None:
        """Close the file without finishing it."""
        self._writer.close()

    def _added(self, rows: int) -> None:
        self._rows += rows
        if self._rows >= ROW_GROUP_ROWS:
            self._flush()

    def _gather(self) -> None:
        if self._tracks:
            self._tables.append(rows_table(self._tracks, pa.concat_tables(self._extra), self._schema))
        self._tracks, self._extra = [], []

    def _flush(self) -> None:
        self._gather()
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=ROW_GROUP_ROWS)
        self._tables, self._rows = [], 0


def rows_table(tracks: list[tuple[Track, TrackRows]], extra: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows of `tracks` as a table of `schema`; `extra` has a row a track."""
    repeats = [rows.n_rows for _, rows in tracks]
    of_track = np.repeat(np.arange(len(tracks)), repeats)
    columns: dict[str, Any] = {
        "track_id": pa.array([portable(track.track_id) for track, _ in tracks], pa.string()).take(of_track),
        "path": pa.array([portable(track.path) for track, _ in tracks], pa.string()).take(of_track),
        "crop": _with_error_rows(tracks, "crop", pa.int32()),
        "start": _with_error_rows(tracks, "start", pa.float64()),
        "end": _with_error_rows(tracks, "end", pa.float64()),
        "status": pa.array(_flat([*rows.status, ERROR][: rows.n_rows] for _, rows in tracks), pa.string()),
        "error_code": pa.array(_flat(_error_cells(rows, code=True) for _, rows in tracks), pa.string()),
        "error": pa.array(_flat(_error_cells(rows, code=False) for _, rows in tracks), pa.string()),
        "audio_note": pa.array([printable(rows.note) or None for _, rows in tracks], pa.string()).take(of_track),
        "audio_hash": pa.array([rows.audio_hash or None for _, rows in tracks], pa.string()).take(of_track),
        "packet_hash": pa.array([rows.packet_hash or None for _, rows in tracks], pa.string()).take(of_track),
        **{
            name: column.take(of_track)
            for name, column in identity_columns([(track, rows.facts) for track, rows in tracks]).items()
        },
        "peak_dbfs": _dbfs(tracks, "peak"),
        "rms_dbfs": _dbfs(tracks, "rms"),
        "embedding": _embedding_column([rows for _, rows in tracks], schema.field("embedding").type),
    }
    if _VOCAL_RATIO.name in schema.names:
        columns[_VOCAL_RATIO.name] = _vocal_ratio(tracks)
    if _VOICE_FROM.name in schema.names:
        other = "separator" if _VOCAL_RATIO.name in schema.names else "recording"
        columns[_VOICE_FROM.name] = pa.array(["stem" if t.vocals else other for t, _ in tracks]).take(of_track)
    repeated = extra.take(pa.array(of_track))
    columns.update({name: repeated.column(name) for name in extra.column_names})
    return pa.table([columns[name] for name in schema.names], schema=schema)


def identity_columns(tracks: Sequence[tuple[Track, Facts]]) -> dict[str, pa.Array]:
    """The columns IDENTITY, a value a track."""
    values: list[list[Any]] = [
        [track.start or None for track, _ in tracks],
        [track.end for track, _ in tracks],
        [facts.size for _, facts in tracks],
        [None if facts.mtime_ns is None else facts.mtime_ns // 1000 for _, facts in tracks],
    ]
    return {field.name: pa.array(column, field.type) for field, column in zip(IDENTITY, values, strict=True)}


def _flat(lists: Iterable[list[Any]]) -> list[Any]:
    return [cell for cells in lists for cell in cells]


def _error_cells(rows: TrackRows, *, code: bool) -> list[str | None]:
    of_crop = INVALID_SAMPLES if code else _INVALID_MESSAGE
    cells: list[str | None] = [of_crop if status == ERROR else None for status in rows.status]
    if rows.error is not None:
        cells.append(rows.error.code if code else printable(str(rows.error)))
    return cells


def _with_error_rows(tracks: list[tuple[Track, TrackRows]], name: str, kind: pa.DataType) -> pa.Array:
    """Column `name` of all tracks; null in the row that holds a track's error."""
    values, valid = [], []
    for _, rows in tracks:
        column = getattr(rows, name)
        values.append(column if rows.error is None else np.append(column, column.dtype.type(0)))
        valid.append(np.arange(rows.n_rows) < len(column))
    return pa.array(np.concatenate(values), kind, mask=~np.concatenate(valid))


def _dbfs(tracks: list[tuple[Track, TrackRows]], name: str) -> pa.Array:
    levels = [
        getattr(rows, name) if rows.error is None else np.append(getattr(rows, name), np.float32(np.nan))
        for _, rows in tracks
    ]
    level = np.concatenate(levels)
    with np.errstate(divide="ignore"):  # digital silence is -inf dBFS
        dbfs = (20 * np.log10(level)).astype(np.float32)
    return pa.array(dbfs, pa.float32(), mask=np.isnan(level))


def _vocal_ratio(tracks: list[tuple[Track, TrackRows]]) -> pa.Array:
    """Column of the ratios; null where there is none: in a crop that was not separated, and in a row of an error."""
    ratio = np.full(sum(rows.n_rows for _, rows in tracks), np.nan, np.float32)
    at = 0
    for _, rows in tracks:
        if rows.vocal_ratio is not None:
            ratio[at : at + len(rows.crop)] = rows.vocal_ratio
        at += rows.n_rows
    return pa.array(ratio, pa.float32(), mask=np.isnan(ratio))


def _embedding_column(rows: list[TrackRows], kind: pa.FixedSizeListType) -> pa.Array:
    present = np.concatenate([np.asarray([*(s == OK for s in r.status), False][: r.n_rows], bool) for r in rows])
    values = np.zeros((len(present), kind.list_size), kind.value_type.to_pandas_dtype())
    values[present] = np.concatenate([r.embedding for r in rows])
    return pa.FixedSizeListArray.from_arrays(
        pa.array(values.ravel(), kind.value_type), type=kind, mask=pa.array(~present)
    )
