"""Stream a catalogue of recordings as tracks, and cut it into work units.

Nothing here holds the whole catalogue: a reader's memory is one batch of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from singerembed import storage
from singerembed.catalog.formats import BATCH_ROWS, Fingerprint, RawRow, fingerprint, open_rows
from singerembed.errors import CatalogError, TrackError

DEFAULT_UNIT_MINUTES = 240.0
ASSUMED_TRACK_MINUTES = 4.0  # of a row that does not say where it ends: a song


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


class Catalog:
    """A catalogue file, local or remote, read from front to back as often as needed."""

    def __init__(self, path: str, columns: Columns | None = None, reserved: Iterable[str] = ()) -> None:
        """Open `path` and check its columns.

        `reserved`: column names of the output that the catalogue's other columns may not take. Raises CatalogError.
        """
        self.path = path
        self._columns = columns or Columns()
        self._rows = open_rows(path)
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
        return fingerprint(self.path)

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

    def _track(self, row: int, raw: RawRow) -> Track:
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
