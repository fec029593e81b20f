"""Read the formats of a catalogue, CSV, TSV, JSON Lines and Parquet, in batches of rows."""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.catalog.layout import UTF8, Layout, TextOptions, find_layout
from singerembed.errors import CatalogError, MissingDependencyError
from singerembed.storage import printable

BATCH_ROWS = 1024
_SCAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the content of a catalogue file."""

    sha256: str
    rows: int  # exact for JSON Lines and Parquet; CSV and TSV count line ends outside quotes, so blank lines too
    state: tuple[int | str, ...] = ()  # of the file when it was hashed, see storage.state_of
    is_utf8: bool = True  # as far as it is text that is taken for UTF-8
    has_quotes: bool = False


class Rows(Protocol):
    """Reads one format: the names of its columns, and its rows in batches."""

    layout: Layout

    @property
    def names(self) -> Sequence[str]: ...

    def values(self) -> Iterator[RawRow]:
        """The rows, without the work of making tables."""
        ...

    def pairs(self, one: str, other: str) -> Iterator[tuple[Any, Any]]:
        """The values of two columns in each row; None where a row lacks one. Faster than `values`."""
        ...

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]: ...


@dataclass(frozen=True)
class RawRow:
    values: dict[str, Any]
    problem: str = ""


def open_rows(path: str, used: Sequence[str], options: TextOptions) -> Rows:
    """Open the catalogue `path` by the format that its name says. Raises CatalogError.

    `used`: the columns that are more than passed through, first that of the paths.
    """
    with _naming(path):
        layout = find_layout(path, used[0], options)
        if layout.kind in {"csv", "tsv"}:
            return DelimitedRows(path, layout)
        if layout.kind == "jsonl":
            return _JsonRows(path, layout)
        if layout.kind == "parquet":
            return _ParquetRows(path, layout, used)
    raise CatalogError(
        f"{path}: the catalogue must end in .csv, .tsv, .jsonl or .parquet; the text formats may end in .gz or .zst too"
    )


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Raise CatalogError, with the file's name, for what goes wrong while it is read in this block."""
    try:
        yield
    except MissingDependencyError:
        raise
    except (OSError, EOFError, UnicodeError, pa.ArrowException) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        hint = ". Name its encoding with --encoding" if isinstance(exc, UnicodeError) else ""
        raise CatalogError(f"cannot read the catalogue {storage.redacted(path)}: {reason}{hint}") from exc


def _string_table(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in names]
    arrays = [pa.array([None if v is None else printable(v) for v in column], pa.string()) for column in columns]
    return pa.table(arrays, schema=pa.schema([(name, pa.string()) for name in names]))


class DelimitedRows:
    """CSV as RFC 4180 has it, and other delimited text; every value is text."""

    def __init__(self, path: str, layout: Layout) -> None:
        self._path, self.layout = path, layout
        with layout.open_text(path) as file:
            header = next(layout.reader(file), None)
        if not header:
            raise CatalogError(f"{path} is empty: the first line must name the columns")
        self.names = header

    def values(self) -> Iterator[RawRow]:
        """See `Rows.values`. A row with a quote out of place has a problem; a quote left open raises CatalogError."""
        for fields in self._fields():
            yield RawRow({}, fields) if isinstance(fields, str) else self._row(fields)

    def pairs(self, one: str, other: str) -> Iterator[tuple[str | None, str | None]]:
        """See `Rows.pairs`."""
        first, second = self.names.index(one), self.names.index(other)
        longer = max(first, second)
        for fields in self._fields():
            complete = len(fields) > longer and not isinstance(fields, str)
            yield (fields[first], fields[second]) if complete else (None, None)

    def _fields(self) -> Iterator[list[str] | str]:
        """The fields of each row that is not blank, or what is wrong with it."""
        with _naming(self._path), self.layout.open_text(self._path) as file:
            reader = self.layout.reader(file)
            next(reader)
            while True:
                line = reader.line_num
                try:
                    for fields in reader:
                        line = reader.line_num
                        if fields:
                            yield fields
                    return
                except csv.Error as exc:
                    if reader.line_num > line + 1:
                        raise CatalogError(
                            f"{self._path} line {line + 1}: {exc}. Is a quote left open there? If quotes are part of "
                            "the text, say --quoting none"
                        ) from exc
                    yield f"{exc}; if quotes are part of the text, say --quoting none"

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]:
        for raw in _in_batches(self.values()):
            yield raw, _string_table(self.names, [[row.values.get(name) for name in self.names] for row in raw])

    def _row(self, fields: list[str]) -> RawRow:
        expected = len(self.names)
        problem = "" if len(fields) == expected else f"{len(fields)} fields, but the header names {expected}"
        return RawRow(dict(zip(self.names, fields, strict=False)), problem)


def _in_batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


class _JsonRows:
    """JSON Lines: an object a line. Values that are not text are passed through as their JSON text."""

    def __init__(self, path: str, layout: Layout) -> None:
        self._path, self.layout = path, layout
        names: dict[str, None] = {}
        for row in self.values():
            names.update(dict.fromkeys(row.values))
        self.names = list(names)

    def values(self) -> Iterator[RawRow]:
        """See `Rows.values`."""
        with _naming(self._path), self.layout.open_text(self._path) as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as exc:
                    yield RawRow({}, f"not JSON: {exc}")
                    continue
                if not isinstance(values, dict):
                    yield RawRow({}, "not a JSON object")
                    continue
                yield RawRow({printable(name): value for name, value in values.items()})

    def pairs(self, one: str, other: str) -> Iterator[tuple[Any, Any]]:
        """See `Rows.pairs`."""
        return ((row.values.get(one), row.values.get(other)) for row in self.values())

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]:
        for raw in _in_batches(self.values()):
            yield raw, self._table(raw)

    def _table(self, raw: list[RawRow]) -> pa.Table:
        def as_text(value: Any) -> str | None:
            return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)

        return _string_table(self.names, [[as_text(row.values.get(name)) for name in self.names] for row in raw])


# What the columns that are used (path, track_id, start, end) may be.
_SIMPLE_KINDS = (
    pa.types.is_null,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,  # as Impala, and Spark by an option, write text
    pa.types.is_large_binary,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
)


class _ParquetRows:
    """Parquet: other columns are passed through with their types."""

    def __init__(self, path: str, layout: Layout, used: Sequence[str]) -> None:
        self._path, self.layout = path, layout
        with storage.open_input(path) as file:
            schema = pq.ParquetFile(file).schema_arrow
        self.names = schema.names
        self._used = [name for name in used if schema.get_field_index(name) >= 0]
        for name in self._used:
            kind = _plain_type(schema.field(name).type)
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not any(is_kind(kind) for is_kind in _SIMPLE_KINDS):
                raise CatalogError(f'{path}: the column "{name}" holds {kind}; it must hold text or numbers')

    def values(self) -> Iterator[RawRow]:
        """See `Rows.values`."""
        for raw, _ in self.batches():
            yield from raw

    def pairs(self, one: str, other: str) -> Iterator[tuple[Any, Any]]:
        """See `Rows.pairs`."""
        with _naming(self._path), storage.open_parquet(self._path) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=[one, other]):
                yield from zip(*(_python_values(batch[name]) for name in (one, other)), strict=True)

    def batches(self) -> Iterator[tuple[list[RawRow], pa.Table]]:
        with _naming(self._path), storage.open_parquet(self._path) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
                table = _plain(pa.Table.from_batches([batch.replace_schema_metadata(None)]))
                columns = [_python_values(table[name]) for name in self._used]
                rows = zip(*columns, strict=True)
                yield [RawRow(dict(zip(self._used, row, strict=True))) for row in rows], table


def _python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of `column`; bytes become text, as in names of files."""
    return [os.fsdecode(value) if isinstance(value, bytes) else value for value in column.to_pylist()]


def _plain(table: pa.Table) -> pa.Table:
    """`table` with string views, which few readers and not all of Arrow's own functions know, as strings."""
    schema = pa.schema([field.with_type(_plain_type(field.type)) for field in table.schema])
    return table if schema.equals(table.schema) else table.cast(schema)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """`kind` without views, in lists, structures and maps too."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    if kind in plain:
        return plain[kind]
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), kind.item_field.with_type(_plain_type(kind.item_type)))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_plain_type(kind.value_type)))
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _plain_type(kind.value_type), kind.ordered)
    return kind


# --- fingerprint ----------------------------------------------------------------------------------------------------


def fingerprint(path: str, layout: Layout) -> Fingerprint:
    """Hash the file `path` and count its rows. Raises CatalogError."""
    with _naming(path):
        state = storage.state_of(path)
        lines = _TextScan(layout.quoted and layout.kind != "jsonl")
        is_plain = not layout.compression and layout.encoding.startswith(UTF8)
        digest = hashlib.sha256()
        with storage.open_input(path) as file:
            while block := file.read(_SCAN_BYTES):
                digest.update(block)
                if is_plain:
                    lines.add(block)
        if layout.kind == "parquet":
            with storage.open_input(path) as file:
                return Fingerprint(digest.hexdigest(), int(pq.ParquetFile(file).metadata.num_rows), state)
        if not is_plain:
            with layout.open_text(path) as text:
                while characters := text.read(_SCAN_BYTES):
                    lines.add(characters.encode(errors="surrogateescape"))
    rows = max(0, lines.total - (layout.kind != "jsonl"))
    return Fingerprint(digest.hexdigest(), rows, state, lines.is_utf8, lines.has_quotes)


class _TextScan:
    """Counts line ends outside quotes, and a last line without one; finds quotes and bytes that are not UTF-8."""

    def __init__(self, quoted: bool) -> None:
        self._quoted = quoted
        self._quote_open = False
        self._lines, self._last = 0, b"\n"
        self._decoder = codecs.getincrementaldecoder(UTF8)()
        self.is_utf8 = True
        self.has_quotes = False

    def add(self, block: bytes) -> None:
        self._last = block[-1:]
        self.has_quotes = self.has_quotes or b'"' in block
        if self.is_utf8:
            try:
                self._decoder.decode(block)
            except UnicodeDecodeError:
                self.is_utf8 = False
        if not self._quoted or (not self._quote_open and b'"' not in block):
            self._lines += block.count(b"\n")
            return
        for i, part in enumerate(block.split(b'"')):
            self._quote_open ^= i > 0
            self._lines += 0 if self._quote_open else part.count(b"\n")

    @property
    def total(self) -> int:
        return self._lines + (self._last != b"\n")
