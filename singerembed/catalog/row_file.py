"""Rows of Arrow tables in a temporary file, so that a catalogue of any length is looked up in little memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_BATCH_ROWS = 16_384  # in the file: a batch is the least that is taken from at a time
_LARGE_FILES = "/var/tmp"


class RowFile:
    """Batches of rows, written once and then taken by number. Must be closed.

    The file has no name, so that nothing is left of it whatever happens. It lies in TMPDIR or, unless that is set, in
    /var/tmp: many systems keep /tmp in memory.
    """

    def __init__(self, schema: pa.Schema) -> None:
        """Begin to write rows of `schema`."""
        self.schema = schema
        folder = None if "TMPDIR" in os.environ or not os.access(_LARGE_FILES, os.W_OK) else _LARGE_FILES
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (see close)
        self._writer = pa.ipc.new_file(self._file, schema)
        self._waiting: list[pa.Table] = []
        self._batches: list[pa.RecordBatch] = []
        self._ends = np.empty(0, np.int64)

    def write(self, rows: pa.Table) -> None:
        """Append `rows`."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting = []

    def finish(self) -> None:
        """End the writing; rows may be taken from now on."""
        self._flush()
        self._writer.close()
        self._file.flush()
        reader = pa.ipc.open_file(pa.py_buffer(mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = np.array(list(accumulate(batch.num_rows for batch in self._batches)), np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column."""
        return pa.chunked_array([batch.column(name) for batch in self._batches], self.schema.field(name).type)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> pa.Table:
        """The rows of these numbers, in this order, in memory of their own."""
        wanted = np.asarray(rows, np.int64)
        of_batch = np.searchsorted(self._ends, wanted, side="right")
        pieces, order = [], []
        for i in np.unique(of_batch):
            here = np.flatnonzero(of_batch == i)
            first = self._ends[i] - self._batches[i].num_rows
            pieces.append(self._batches[i].take(pa.array(wanted[here] - first)))
            order.append(here)
        if not pieces:
            return self.schema.empty_table()
        table = pa.Table.from_batches(pieces, self.schema).combine_chunks()
        return table.take(pa.array(np.argsort(np.concatenate(order)))) if len(pieces) > 1 else table

    def close(self) -> None:
        """Remove the file."""
        self._batches = []
        self._file.close()
