"""What each unit of an output comes to, as columns: some 60 bytes a unit."""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

import pyarrow as pa

from singerembed.parquet import Counts

_BATCH = 8192
SCHEMA = pa.schema(
    [
        ("rows", pa.int64()),
        ("tracks", pa.int64()),
        ("crops", pa.int64()),
        ("silent", pa.int64()),
        ("error_tracks", pa.int64()),
        ("errors", pa.string()),  # JSON, error rows by code; null: none
        ("audio_seconds", pa.float64()),
    ]
)


class UnitIndex:
    """The units of one output, in order."""

    def __init__(self, table: pa.Table | None = None) -> None:
        self._table = SCHEMA.empty_table() if table is None else table.select(SCHEMA.names)
        self._new: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, rows: int, counts: Counts) -> None:
        """Append one unit."""
        errors = json.dumps(counts.errors) if counts.errors else None
        self._new.append({"rows": rows, **counts.to_dict(), "errors": errors})
        if len(self._new) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._new:
            self._batches.append(pa.RecordBatch.from_pylist(self._new, SCHEMA))
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
        """What one unit comes to."""
        return _counts(self.table.slice(unit, 1).to_pylist()[0])

    def encode(self) -> bytes:
        """The index as text, for a file's metadata."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(self.table)
        return base64.b64encode(sink.getvalue())

    @classmethod
    def decode(cls, encoded: bytes) -> UnitIndex:
        """Rebuild an index from `encode`."""
        return cls(pa.ipc.open_stream(base64.b64decode(encoded)).read_all())


def _counts(row: dict[str, Any]) -> Counts:
    del row["rows"]
    return Counts(**{**row, "errors": Counter(json.loads(row["errors"] or "{}"))})
