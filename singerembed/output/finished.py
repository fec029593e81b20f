"""A finished output as a reader sees it: one Parquet file, or a folder of part files with an index beside them.

A partitioned output is a folder that readers take for one table. `out/unit-000123.parquet` are its rows.
`out/_common_metadata` is a Parquet file without rows that marks the output as finished: it has the schema, the run's
identity and the total counts. `out/_index` is a Parquet file with a row for each part. Their names have no suffix and
begin with an underscore, so that `out/*.parquet` and readers of folders skip them. A single file carries the same three
things in its own metadata.
"""

from __future__ import annotations

import base64
import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.errors import OutputError, UsageError
from singerembed.output.schema import COUNTS_KEY, METADATA_KEY, UNITS_KEY, Counts

_UNIT_NAME = re.compile(r"unit-(\d{6,})\.parquet")
_METADATA, _INDEX = "_common_metadata", "_index"
_INDEX_BATCH = 8192
_NO_VOICE = "no_voice"
_INDEX_SCHEMA = pa.schema(
    [
        ("rows", pa.int64()),
        ("tracks", pa.int64()),
        ("crops", pa.int64()),
        ("silent", pa.int64()),
        ("error_tracks", pa.int64()),
        ("errors", pa.string()),  # JSON, error rows by code; null: none
        ("audio_seconds", pa.float64()),
        (_NO_VOICE, pa.int64()),
    ]
)


class UnitIndex:
    """The units of one output, in order."""

    def __init__(self, table: pa.Table | None = None) -> None:
        table = _INDEX_SCHEMA.empty_table() if table is None else table
        if _NO_VOICE not in table.column_names:  # written before there was separation
            table = table.append_column(_NO_VOICE, pa.array([0] * len(table), pa.int64()))
        self._table = table.select(_INDEX_SCHEMA.names)
        self._new: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, rows: int, counts: Counts) -> None:
        """Append one unit."""
        errors = json.dumps(counts.errors) if counts.errors else None
        self._new.append({"rows": rows, **counts.to_dict(), "errors": errors})
        if len(self._new) >= _INDEX_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._new:
            self._batches.append(pa.RecordBatch.from_pylist(self._new, _INDEX_SCHEMA))
            self._new = []

    @property
    def table(self) -> pa.Table:
        """All units, a row each."""
        self._flush()
        if self._batches:
            self._table = pa.concat_tables([self._table, pa.Table.from_batches(self._batches)]).combine_chunks()
            self._batches = []
        return self._table

    def counts(self, unit: int) -> Counts:
        """Counts of one unit."""
        return _counts(self.table.slice(unit, 1).to_pylist()[0])

    def encode(self) -> bytes:
        """The index as text, for a file's metadata."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, _INDEX_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(self.table)
        return base64.b64encode(sink.getvalue())

    @classmethod
    def decode(cls, encoded: bytes) -> UnitIndex:
        """Rebuild an index from `encode`."""
        return cls(pa.ipc.open_stream(base64.b64decode(encoded)).read_all())


def _counts(row: dict[str, Any]) -> Counts:
    del row["rows"]
    return Counts(**{**row, "errors": Counter(json.loads(row["errors"] or "{}"))})


# --- partitioned outputs -------------------------------------------------------------------------------------------


def part_path(folder: str, unit: int) -> str:
    """Path of the part file of unit `unit`."""
    return f"{folder}/unit-{unit:06d}.parquet"


def units_in(folder: str) -> set[int]:
    """Numbers of the units that have a part file in `folder`."""
    matches = map(_UNIT_NAME.fullmatch, storage.names_in(folder))
    return {int(match[1]) for match in matches if match}


def is_partitioned(output: str) -> bool:
    """Say whether `output` is the folder of a finished partitioned output."""
    return storage.exists(f"{output}/{_METADATA}")


def write_index(output: str, schema: pa.Schema, metadata: dict[str, Any], index: UnitIndex, total: Counts) -> None:
    """Write the index and the common metadata that mark the part files in `output` as finished."""
    names = pa.array([part_path("", unit)[1:] for unit in range(len(index.table))], pa.string())
    with storage.publishing(f"{output}/{_INDEX}") as temporary:
        pq.write_table(index.table.add_column(0, "file", names), temporary, compression="zstd")
    facts = {METADATA_KEY: json.dumps(metadata), COUNTS_KEY: json.dumps(total.to_dict())}
    with storage.publishing(f"{output}/{_METADATA}") as temporary:
        pq.write_metadata(schema.with_metadata(facts), temporary)


def read_schema(output: str) -> pa.Schema:
    """Read the schema of a finished partitioned output; its metadata holds the run. Raises OSError, ArrowException."""
    with storage.open_input(f"{output}/{_METADATA}") as file:
        return pq.read_schema(file)


def read_index(output: str) -> UnitIndex:
    """Read the index of a finished partitioned output."""
    with storage.open_parquet(f"{output}/{_INDEX}") as file:
        return UnitIndex(pq.read_table(file))


def remove(output: str) -> None:
    """Remove a partitioned output, finished or not; other files in its folder stay."""
    storage.remove(f"{output}/{_METADATA}")
    for name in storage.names_in(output):
        if name == _INDEX or _UNIT_NAME.fullmatch(name):
            storage.remove(f"{output}/{name}")
    remove_temporaries(output)


def remove_temporaries(folder: str) -> None:
    """Remove the temporary files of processes that were killed."""
    for name in storage.names_in(folder):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove(f"{folder}/{name}")


# --- finished outputs ----------------------------------------------------------------------------------------------


def counts_of(metadata: Any) -> Counts:
    """Counts in the metadata of a part file or an output."""
    return Counts.from_dict(json.loads(metadata.metadata[COUNTS_KEY]))


class FinishedOutput:
    """A finished output, read unit by unit. `exists` says whether there is one."""

    def __init__(self, output: str, *, partitioned: bool = False) -> None:
        """Raises OutputError for a file that singerembed has not written, UsageError for one of the other form."""
        self._output, self._partitioned = output, partitioned
        self.exists = is_partitioned(output) if partitioned else storage.exists(output)
        self.metadata: dict[str, Any] = {}
        self.counts = Counts()
        self._files = ExitStack()
        self._last: tuple[int, list[str] | None, pa.Table] | None = None
        _check_form(output, partitioned=partitioned)
        if not self.exists:
            return
        try:
            if partitioned:
                found = read_schema(output).metadata or {}
            else:
                self._parquet = pq.ParquetFile(self._files.enter_context(storage.open_parquet(output)))
                found = self._parquet.metadata.metadata or {}
        except (pa.ArrowException, OSError) as exc:
            raise OutputError(
                f"{output} exists and is not a Parquet file ({exc}). Give another name, or remove it"
            ) from exc
        wanted = [METADATA_KEY, COUNTS_KEY] + ([] if partitioned else [UNITS_KEY])
        if any(key not in found for key in wanted):
            self._files.close()
            raise OutputError(
                f"{output} exists and is not as singerembed run has written it. Give another name, or remove it"
            )
        self.metadata = json.loads(found[METADATA_KEY])
        self.counts = Counts.from_dict(json.loads(found[COUNTS_KEY]))
        self._index = read_index(output) if partitioned else UnitIndex.decode(found[UNITS_KEY])
        self._unit_ends = list(accumulate(self._index.table["rows"].to_pylist()))
        groups = range(0 if partitioned else self._parquet.num_row_groups)
        self._group_ends = list(accumulate(self._parquet.metadata.row_group(i).num_rows for i in groups))
        if not partitioned and [0, *self._group_ends][-1] != [0, *self._unit_ends][-1]:
            self._files.close()
            raise OutputError(
                f"{output} has other rows than singerembed run has written. Give another name, or remove it"
            )

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return read_schema(self._output) if self._partitioned else self._parquet.schema_arrow

    @property
    def n_units(self) -> int:
        return len(self._unit_ends)

    def unit_counts(self, unit: int) -> Counts:
        """Counts of unit `unit`."""
        return self._index.counts(unit)

    def rows(self, unit: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of unit `unit`; other row groups than its own are not read."""
        if self._partitioned:
            with storage.open_parquet(part_path(self._output, unit)) as file:
                return pq.ParquetFile(file).read(columns=columns)
        start, end = self._unit_ends[unit - 1] if unit else 0, self._unit_ends[unit]
        first, last = bisect_right(self._group_ends, start), bisect_left(self._group_ends, end)
        if start == end:
            return self._parquet.schema_arrow.empty_table()
        table = pa.concat_tables([self._row_group(group, columns) for group in range(first, last + 1)])
        return table.slice(start - (self._group_ends[first - 1] if first else 0), end - start)

    def _row_group(self, group: int, columns: list[str] | None) -> pa.Table:
        """A row group; the last one is kept, because the next unit often begins in it."""
        if self._last is None or self._last[:2] != (group, columns):
            self._last = (group, columns, self._parquet.read_row_group(group, columns=columns))
        return self._last[2]

    def kept_rows(
        self, unit: int, bounds: Sequence[tuple[int, int]], columns: pa.Table | None, schema: pa.Schema
    ) -> list[pa.Table]:
        """Rows `bounds`, a pair a track, of unit `unit`: a table of `schema` a track.

        `columns`, where given, has a row a track, whose values take the place of those that were stored.
        """
        rows = self.rows(unit)
        if columns is None:
            return [rows.slice(start, stop - start) for start, stop in bounds]
        lengths = np.array([stop - start for start, stop in bounds], np.int64)
        wanted = np.concatenate([np.empty(0, np.int64), *(np.arange(start, stop) for start, stop in bounds)])
        new = columns.take(pa.array(np.repeat(np.arange(len(bounds)), lengths)))
        old = rows.take(pa.array(wanted))
        table = pa.table([(new if name in new.column_names else old)[name] for name in schema.names], schema=schema)
        ends = np.cumsum(lengths)
        return [table.slice(end - length, length) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]

    def close(self) -> None:
        """Close the file."""
        self._files.close()


def check_result_path(path: str, *suffixes: str) -> None:
    """Raise UsageError unless a result may be written to `path`.

    That is if it ends in one of `suffixes`, and nothing is there but a regular file that `run` has not written.
    """
    if suffixes and not path.endswith(suffixes):
        raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if storage.is_remote(path) or not Path(path).exists():
        return
    if not Path(path).is_file():
        raise UsageError(f"{path} is not a regular file. Give another name")
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return
    if METADATA_KEY in metadata:
        raise UsageError(f"{path} is an output of run, and would be replaced. Give another name, or remove it first")


def _check_form(output: str, *, partitioned: bool) -> None:
    """Raise UsageError where a file is wanted and `output` is a partitioned folder, or the other way round."""
    if partitioned and not storage.is_remote(output) and Path(output).is_file():
        raise UsageError(f"{output} is a file, and --partitioned writes a folder. Give another name, or leave that out")
    if not partitioned and is_partitioned(output):
        raise UsageError(f"{output} is a partitioned output: say --partitioned too, or give another name")


def track_bounds(rows: pa.Table) -> list[int]:
    """Offsets of the first row of each track, and the number of rows.

    Crops of a track count upwards, and a row without a crop ends it. Where a catalogue names the same part of a
    recording twice in a row, and only the second failed, the two look like one.
    """
    if not rows.num_rows:
        return [0]
    crop = pc.fill_null(rows["crop"], -1).to_numpy()
    begins = (crop[:-1] == -1) | ((crop[1:] != -1) & (crop[1:] <= crop[:-1]))
    for name in ("track_id", "path", "track_start", "track_end"):
        if name not in rows.column_names:
            continue  # an earlier version wrote it
        column = rows[name].combine_chunks()
        if pa.types.is_floating(column.type):
            column = pc.fill_null(column, -1.0)
        begins |= pc.not_equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False)
    return [0, *(np.flatnonzero(begins) + 1).tolist(), rows.num_rows]
