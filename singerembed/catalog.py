"""Streams a catalogue of recordings as tracks, and cuts it into work units.

CSV, TSV, JSON Lines and Parquet. Nothing here holds the catalogue: a reader's memory is one batch of rows.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.errors import CatalogError, MissingDependencyError, TrackError

DEFAULT_UNIT_MINUTES = 240.0
ASSUMED_TRACK_MINUTES = 4.0  # of a row that does not say where it ends: a song
BATCH_ROWS = 1024
_SCAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Track:
    """One row of the catalogue."""

    row: int  # 1 is the first row after the header
    track_id: str
    path: str  # as the catalogue writes it
    location: str  # where it is: a local path or a URI
    start: float = 0.0  # seconds from the beginning of the recording
    end: float | None = None  # seconds; None: the recording's end
    problem: TrackError | None = None  # what is wrong with the row itself

    @property
    def minutes(self) -> float:
        """How much audio this track is taken for when the catalogue is cut into units."""
        return ASSUMED_TRACK_MINUTES if self.end is None else max(0.0, self.end - self.start) / 60


@dataclass(frozen=True)
class Unit:
    """Consecutive tracks that are embedded and published together."""

    index: int
    tracks: list[Track]
    extra: pa.Table  # the catalogue's other columns, a row a track


@dataclass(frozen=True)
class Columns:
    """Which columns of the catalogue mean what."""

    path: str = "path"
    track_id: str = "track_id"
    rename: dict[str, str] = field(default_factory=dict)  # other columns: name in the catalogue -> name in the output


@dataclass(frozen=True)
class Fingerprint:
    """What tells one catalogue from another."""

    sha256: str
    rows: int  # exact for JSON Lines and Parquet; CSV and TSV count line ends outside quotes, so blank lines too


class _Rows(Protocol):
    """One format: the names of its columns, and its rows in batches."""

    @property
    def names(self) -> Sequence[str]: ...

    def batches(self) -> Iterator[tuple[list[_RawRow], pa.Table]]: ...


@dataclass(frozen=True)
class _RawRow:
    values: dict[str, Any]
    problem: str = ""


class Catalog:
    """A catalogue file, local or remote, read from front to back as often as needed."""

    def __init__(self, path: str, columns: Columns | None = None, reserved: Iterable[str] = ()) -> None:
        """Open `path` and check its columns.

        `reserved`: column names of the output that the catalogue's other columns may not take. Raises CatalogError.
        """
        self.path = path
        self._columns = columns or Columns()
        self._rows = _open_rows(path)
        names = list(self._rows.names)
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise CatalogError(f"{path} has the column {doubled[0]!r} more than once; rename one of them in the file")
        if self._columns.path not in names:
            raise CatalogError(
                f'{path} has no column "{self._columns.path}"; it has: {", ".join(names)}. Name it with --path-column'
            )
        if self._columns.track_id != Columns.track_id and self._columns.track_id not in names:
            raise CatalogError(
                f'{path} has no column "{self._columns.track_id}" (--id-column); it has: {", ".join(names)}'
            )
        used = {self._columns.path, self._columns.track_id, "start", "end"}
        self._extra = {name: self._columns.rename.get(name, name) for name in names if name not in used}
        unknown = self._columns.rename.keys() - self._extra.keys()
        if unknown:
            raise CatalogError(f"{path}: --rename names {sorted(unknown)[0]!r}, which is not one of its other columns")
        self._check_taken(set(reserved))

    def _check_taken(self, reserved: set[str]) -> None:
        outputs = list(self._extra.values())
        for name, output in self._extra.items():
            if output in reserved or outputs.count(output) > 1:
                raise CatalogError(
                    f'{self.path}: the output already has a column "{output}". Rename the catalogue\'s: '
                    f"--rename {name}=catalog_{name}"
                )

    def fingerprint(self) -> Fingerprint:
        """Hash the file and count its rows in one pass."""
        return _fingerprint(self.path)

    def units(self, minutes: float = DEFAULT_UNIT_MINUTES) -> Iterator[Unit]:
        """Cut the catalogue into units of about `minutes` of audio; the same catalogue always gives the same units.

        Raises CatalogError where the file cannot be read on.
        """
        index, tracks, extras, gathered = 0, list[Track](), list[pa.Table](), 0.0
        for batch, extra in self._batches():
            first = 0
            for i, track in enumerate(batch):
                tracks.append(track)
                gathered += track.minutes
                if gathered >= minutes or len(tracks) >= BATCH_ROWS:
                    yield Unit(index, tracks, pa.concat_tables([*extras, extra.slice(first, i + 1 - first)]))
                    index, tracks, extras, gathered, first = index + 1, [], [], 0.0, i + 1
            if first < len(batch):
                extras.append(extra.slice(first))
        if tracks:
            yield Unit(index, tracks, pa.concat_tables(extras))

    def extra_schema(self) -> pa.Schema:
        """Names and types of the columns that are passed through."""
        for _, extra in self._batches():
            return extra.schema
        return pa.schema([(name, pa.string()) for name in self._extra.values()])

    def _batches(self) -> Iterator[tuple[list[Track], pa.Table]]:
        row = 0
        for raw_rows, table in self._rows.batches():
            tracks = [self._track(row + i, raw) for i, raw in enumerate(raw_rows, start=1)]
            row += len(raw_rows)
            yield tracks, table.select(list(self._extra)).rename_columns(list(self._extra.values()))

    def _track(self, row: int, raw: _RawRow) -> Track:
        path = _text(raw.values.get(self._columns.path))
        track_id = _text(raw.values.get(self._columns.track_id)) or path or f"row {row}"
        location = storage.resolve(self.path, path)
        try:
            if raw.problem:
                raise ValueError(raw.problem)
            if not path:
                raise ValueError(f'the column "{self._columns.path}" is empty')
            start = _seconds(raw.values, "start") or 0.0
            end = _seconds(raw.values, "end")
            if end is not None and end <= start:
                raise ValueError(f"end {end:g} s is not after start {start:g} s")
        except ValueError as exc:
            return Track(
                row, track_id, path, location, problem=TrackError("bad_row", f"row {row} of the catalogue: {exc}")
            )
        return Track(row, track_id, path, location, start, end)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _seconds(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} {value!r} is not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{name} {value!r} is not a number of seconds from 0 on")
    return seconds


# --- formats --------------------------------------------------------------------------------------------------------


def _open_rows(path: str) -> _Rows:
    suffix = PurePosixPath(path).suffix.lower()
    try:
        if suffix in {".csv", ".tsv", ".tab"}:
            return _DelimitedRows(path, "," if suffix == ".csv" else "\t")
        if suffix in {".jsonl", ".ndjson"}:
            return _JsonRows(path)
        if suffix in {".parquet", ".pq"}:
            return _ParquetRows(path)
    except (OSError, pa.ArrowException) as exc:
        if isinstance(exc, MissingDependencyError):
            raise
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise CatalogError(f"cannot read the catalogue {storage.redacted(path)}: {reason}") from exc
    raise CatalogError(f"{path}: the catalogue must end in .csv, .tsv, .jsonl or .parquet")


def _open_text(path: str) -> io.TextIOWrapper:
    # A name that is not UTF-8 still names its file (surrogateescape is what Python uses for paths).
    return io.TextIOWrapper(storage.open_input(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def printable(text: str) -> str:
    """`text` with bytes that are not UTF-8 written as escapes, fit for Parquet and terminals."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _string_table(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in names]
    arrays = [pa.array([None if v is None else printable(v) for v in column], pa.string()) for column in columns]
    return pa.table(arrays, schema=pa.schema([(name, pa.string()) for name in names]))


class _DelimitedRows:
    """CSV as RFC 4180 has it, and TSV by the same rules; every value is text."""

    def __init__(self, path: str, delimiter: str) -> None:
        self._path, self._delimiter = path, delimiter
        with _open_text(path) as file:
            header = next(self._reader(file), None)
        if not header:
            raise CatalogError(f"{path} is empty: the first line must name the columns")
        self.names = header

    def _reader(self, file: io.TextIOWrapper) -> Any:
        return csv.reader(file, delimiter=self._delimiter, strict=True)

    def batches(self) -> Iterator[tuple[list[_RawRow], pa.Table]]:
        with _open_text(self._path) as file:
            reader = self._reader(file)
            next(reader)
            raw: list[_RawRow] = []
            values: list[list[str | None]] = []
            while True:
                try:
                    fields = next(reader, None)
                except csv.Error as exc:
                    raise CatalogError(
                        f"{self._path} line {reader.line_num}: {exc}. Is a quote left open there?"
                    ) from exc
                if fields is not None and not fields:
                    continue  # a blank line
                if fields is not None:
                    raw_row, padded = self._row(fields)
                    raw.append(raw_row)
                    values.append(padded)
                if raw and (fields is None or len(raw) == BATCH_ROWS):
                    yield raw, _string_table(self.names, values)
                    raw, values = [], []
                if fields is None:
                    return

    def _row(self, fields: list[str]) -> tuple[_RawRow, list[str | None]]:
        expected = len(self.names)
        problem = "" if len(fields) == expected else f"{len(fields)} fields, but the header names {expected}"
        padded: list[str | None] = [*fields[:expected], *[None] * (expected - len(fields))]
        return _RawRow(dict(zip(self.names, padded, strict=True)), problem), padded


class _JsonRows:
    """JSON Lines: an object a line. Values that are not text are passed through as their JSON text."""

    def __init__(self, path: str) -> None:
        self._path = path
        names: dict[str, None] = {}
        for row in self._parse():
            names.update(dict.fromkeys(row.values))
        self.names = list(names)

    def _parse(self) -> Iterator[_RawRow]:
        with _open_text(self._path) as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as exc:
                    yield _RawRow({}, f"not JSON: {exc}")
                    continue
                yield _RawRow(values) if isinstance(values, dict) else _RawRow({}, "not a JSON object")

    def batches(self) -> Iterator[tuple[list[_RawRow], pa.Table]]:
        raw: list[_RawRow] = []
        for row in self._parse():
            raw.append(row)
            if len(raw) == BATCH_ROWS:
                yield raw, self._table(raw)
                raw = []
        if raw:
            yield raw, self._table(raw)

    def _table(self, raw: list[_RawRow]) -> pa.Table:
        def as_text(value: Any) -> str | None:
            return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)

        return _string_table(self.names, [[as_text(row.values.get(name)) for name in self.names] for row in raw])


# What the used columns (path, track_id, start, end) may hold; others need not become Python objects.
_SIMPLE_KINDS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_dictionary,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
)


class _ParquetRows:
    """Parquet: other columns are passed through with their types."""

    def __init__(self, path: str) -> None:
        self._path = path
        with storage.open_input(path) as file:
            self.names = pq.ParquetFile(file).schema_arrow.names

    def batches(self) -> Iterator[tuple[list[_RawRow], pa.Table]]:
        with storage.open_input(self._path) as file:
            parquet = pq.ParquetFile(file)
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                table = pa.Table.from_batches([batch.replace_schema_metadata(None)])
                yield [_RawRow(values) for values in self._used(table).to_pylist()], table

    @staticmethod
    def _used(table: pa.Table) -> pa.Table:
        simple = [field.name for field in table.schema if any(is_kind(field.type) for is_kind in _SIMPLE_KINDS)]
        return table.select(simple)


# --- fingerprint ----------------------------------------------------------------------------------------------------


def _fingerprint(path: str) -> Fingerprint:
    digest = hashlib.sha256()
    suffix = PurePosixPath(path).suffix.lower()
    quote_open = False
    lines, last = 0, b"\n"
    try:
        with storage.open_input(path) as file:
            while block := file.read(_SCAN_BYTES):
                digest.update(block)
                last = block[-1:]
                if suffix in {".jsonl", ".ndjson"} or (not quote_open and b'"' not in block):
                    lines += block.count(b"\n")
                    continue
                for i, part in enumerate(block.split(b'"')):
                    quote_open ^= i > 0
                    lines += 0 if quote_open else part.count(b"\n")
        lines += last != b"\n"
        if suffix in {".parquet", ".pq"}:
            with storage.open_input(path) as file:
                return Fingerprint(digest.hexdigest(), pq.ParquetFile(file).metadata.num_rows)
    except (OSError, pa.ArrowException) as exc:
        raise CatalogError(f"cannot read the catalogue {storage.redacted(path)}: {exc}") from exc
    return Fingerprint(digest.hexdigest(), lines if suffix in {".jsonl", ".ndjson"} else max(0, lines - 1))
