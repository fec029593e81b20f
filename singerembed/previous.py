"""A finished output as a later run sees it: whose it is, what it comes to, and its rows, unit by unit."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import dataset, storage
from singerembed.errors import OutputError, UsageError
from singerembed.index import UnitIndex
from singerembed.parquet import COUNTS_KEY, ERROR, METADATA_KEY, UNITS_KEY, Counts


def counts_of(metadata: Any) -> Counts:
    """The counts that a part file or an output carries in its metadata."""
    return Counts.from_dict(json.loads(metadata.metadata[COUNTS_KEY]))


class PreviousOutput:
    """A finished output, read unit by unit. `exists` says whether there is one."""

    def __init__(self, output: str, *, partitioned: bool = False) -> None:
        """Raises OutputError for a file that singerembed has not written, UsageError for one of the other form."""
        self._output, self._partitioned = output, partitioned
        self.exists = dataset.is_partitioned(output) if partitioned else storage.exists(output)
        self.metadata: dict[str, Any] = {}
        self.counts = Counts()
        self._files = ExitStack()
        _check_form(output, partitioned=partitioned)
        if not self.exists:
            return
        try:
            if partitioned:
                found = dataset.read_schema(output).metadata or {}
            else:
                self._parquet = pq.ParquetFile(self._files.enter_context(storage.open_input(output)))
                found = self._parquet.metadata.metadata or {}
        except (pa.ArrowException, OSError) as exc:
            raise OutputError(
                f"{output} exists and is not a Parquet file ({exc}). Give another name, or remove it"
            ) from exc
        if METADATA_KEY not in found:
            self._files.close()
            raise OutputError(f"{output} exists and was not written by singerembed. Give another name, or remove it")
        self.metadata = json.loads(found[METADATA_KEY])
        self.counts = Counts.from_dict(json.loads(found[COUNTS_KEY]))
        self._index = dataset.read_index(output) if partitioned else UnitIndex.decode(found[UNITS_KEY])
        self._unit_ends = list(accumulate(self._index.table["rows"].to_pylist()))
        groups = range(0 if partitioned else self._parquet.num_row_groups)
        self._group_ends = list(accumulate(self._parquet.metadata.row_group(i).num_rows for i in groups))

    @property
    def n_units(self) -> int:
        return len(self._unit_ends)

    def unit_counts(self, unit: int) -> Counts:
        """What unit `unit` comes to."""
        return self._index.counts(unit)

    def rows(self, unit: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of unit `unit`; other row groups than its own are not read."""
        if self._partitioned:
            with storage.open_input(dataset.part_path(self._output, unit)) as file:
                return pq.ParquetFile(file).read(columns=columns)
        start, end = self._unit_ends[unit - 1] if unit else 0, self._unit_ends[unit]
        first, last = bisect_right(self._group_ends, start), bisect_left(self._group_ends, end)
        if start == end:
            return self._parquet.schema_arrow.empty_table()
        table = self._parquet.read_row_groups(list(range(first, last + 1)), columns=columns)
        return table.slice(start - (self._group_ends[first - 1] if first else 0), end - start)

    def tracks_with_errors(self, unit: int, n_tracks: int) -> list[int]:
        """Which of the unit's `n_tracks` tracks have a row whose status is error."""
        if not self.unit_counts(unit).errors:
            return []
        rows = self.rows(unit, ["track_id", "path", "crop", "status"])
        bounds = _track_bounds(rows)
        if len(bounds) - 1 != n_tracks:
            return list(range(n_tracks))
        failed = rows["status"].to_numpy() == ERROR
        return [i for i in range(n_tracks) if failed[bounds[i] : bounds[i + 1]].any()]

    def rows_by_track(self, unit: int, n_tracks: int) -> list[pa.Table]:
        """The unit's rows, a table a track; empty where `tracks_with_errors` names them all."""
        rows = self.rows(unit)
        bounds = _track_bounds(rows)
        if len(bounds) - 1 != n_tracks:
            return []
        return [rows.slice(a, b - a) for a, b in pairwise(bounds)]

    def close(self) -> None:
        """Close the file."""
        self._files.close()


def _check_form(output: str, *, partitioned: bool) -> None:
    """Raise unless `output` is, or may become, what it is wanted to be: a folder or a file."""
    if partitioned and not storage.is_remote(output) and Path(output).is_file():
        raise UsageError(f"{output} is a file, and --partitioned writes a folder. Give another name, or leave that out")
    if not partitioned and dataset.is_partitioned(output):
        raise UsageError(f"{output} is a partitioned output: say --partitioned too, or give another name")


def _track_bounds(rows: pa.Table) -> list[int]:
    """Where one track's rows end and the next one's begin.

    Crops of a track count upwards, and a row without a crop ends it. Where a catalogue names the same recording
    twice in a row, and only the second failed, the two look like one: then there are fewer bounds than tracks.
    """
    names = list(zip(rows["track_id"].to_pylist(), rows["path"].to_pylist(), strict=True))
    crops = rows["crop"].to_pylist()
    bounds = [0]
    for i in range(1, len(names)):
        ended = crops[i - 1] is None or (crops[i] is not None and crops[i] <= crops[i - 1])
        if ended or names[i] != names[i - 1]:
            bounds.append(i)
    return [*bounds, len(names)]
