"""The formats of a catalogue: CSV, TSV, JSON Lines and Parquet, read in batches of rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.errors import CatalogError, MissingDependencyError
from singerembed.storage import printable

BATCH_ROWS = 1024
_SCAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the content of a catalogue file."""

    sha256: str
    rows: int  # exact for JSON Lines and Parquet; CSV and TSV count line ends outside quotes, so blank lines too


class Rows(Protocol):
    """Reads one format: the names of its columns, and its rows in batches."""

    @property
    def names(self) -> Sequence[str]: ...

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]: ...


@dataclass(frozen=True)
class RawRow:
    values: dict[str, Any]
    problem: str = ""


def open_rows(path: str) -> Rows:
    suffix = PurePosixPath(path).suffix.lower()
    try:
        if suffix in {".csv", ".tsv", ".tab"}:
            return DelimitedRows(path, "," if suffix == ".csv" else "\t")
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


def _string_table(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in names]
    arrays = [pa.array([None if v is None else printable(v) for v in column], pa.string()) for column in columns]
    return pa.table(arrays, schema=pa.schema([(name, pa.string()) for name in names]))


class DelimitedRows:
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

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]:
        with _open_text(self._path) as file:
            reader = self._reader(file)
            next(reader)
            raw: list[RawRow] = []
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

    def _row(self, fields: list[str]) -> tuple[RawRow, list[str | None]]:
        expected = len(self.names)
        problem = "" if len(fields) == expected else f"{len(fields)} fields, but the header names {expected}"
        padded: list[str | None] = [*fields[:expected], *[None] * (expected - len(fields))]
        return RawRow(dict(zip(self.names, padded, strict=True)), problem), padded


class _JsonRows:
    """JSON Lines: an object a line. Values that are not text are passed through as their JSON text."""

    def __init__(self, path: str) -> None:
        self._path = path
        names: dict[str, None] = {}
        for row in self._parse():
            names.update(dict.fromkeys(row.values))
        self.names = list(names)

    def _parse(self) -> Iterator[RawRow]:
        with _open_text(self._path) as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as exc:
                    yield RawRow({}, f"not JSON: {exc}")
                    continue
                yield RawRow(values) if isinstance(values, dict) else RawRow({}, "not a JSON object")

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]:
        raw: list[RawRow] = []
        for row in self._parse():
            raw.append(row)
            if len(raw) == BATCH_ROWS:
                yield raw, self._table(raw)
                raw = []
        if raw:
            yield raw, self._table(raw)

    def _table(self, raw: list[RawRow]) -> pa.Table:
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

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]:
        with storage.open_input(self._path) as file:
            parquet = pq.ParquetFile(file)
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                table = pa.Table.from_batches([batch.replace_schema_metadata(None)])
                yield [RawRow(values) for values in self._used(table).to_pylist()], table

    @staticmethod
    def _used(table: pa.Table) -> pa.Table:
        simple = [field.name for field in table.schema if any(is_kind(field.type) for is_kind in _SIMPLE_KINDS)]
        return table.select(simple)


# --- fingerprint ----------------------------------------------------------------------------------------------------


def fingerprint(path: str) -> Fingerprint:
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
