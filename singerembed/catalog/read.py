"""Stream a catalogue of recordings as tracks, and cut it into work units.

Nothing here holds the whole catalogue: a reader's memory is one batch of rows.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from singerembed import storage
from singerembed.catalog.formats import BATCH_ROWS, Fingerprint, RawRow, fingerprint, open_rows
from singerembed.catalog.layout import TextOptions
from singerembed.errors import CatalogError, TrackError
from singerembed.storage import portable, printable

_log = logging.getLogger(__name__)

DEFAULT_UNIT_MINUTES = 240.0
# Of the files in a folder that are taken for recordings.
AUDIO_SUFFIXES = {
    ".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".m4a", ".aac", ".aif", ".aiff", ".aifc", ".w64", ".caf", ".wma",
    ".wv", ".ape", ".tta", ".mka", ".mp2", ".mpc", ".dsf", ".dff", ".au", ".spx",
}  # fmt: skip
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
    vocals: str = ""  # where its voice alone is recorded; empty: it is not known to be

    @property
    def source(self) -> str:
        """What is decoded: the voice alone, where it is known to be recorded, else the recording."""
        return self.vocals or self.location

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
    """How to read a catalogue: which columns mean what, and how its text is written."""

    path: str = "path"
    track_id: str = "track_id"
    rename: dict[str, str] = field(default_factory=dict)  # other columns: name in the catalogue -> name in the output
    text: TextOptions = field(default_factory=TextOptions)  # of the formats that are text
    vocals: str | None = None  # the column of the paths of stems, which is passed through too


_FINISHED_ARE_SAFE = (
    "Finished units are safe: put the file back as it was and run the same command again, or give another output"
)
_NAME_THE_ENCODING = "Name the encoding of the file, as in --encoding cp1252"
# What pandas, R, Spark and databases write for a number that is not there.
_MISSING_NUMBERS = {"", "nan", "null", "none", "na", "n/a", "<na>", "nil", "\\n"}
# Between tries to read a catalogue on storage that fails: a minute in all, as a file server takes to start again.
_PAUSES_SECONDS = (1, 2, 4, 8, 15, 15, 15)
_MAX_IDS = 50_000_000  # that are compared: 400 MB


@dataclass(frozen=True)
class CatalogCheck:
    """What a whole catalogue was found to hold."""

    odd_paths: int  # paths that are not UTF-8
    doubled_ids: str  # names two rows of different recordings with one track id; empty: there are none

    @property
    def notes(self) -> list[str]:
        """The same for people."""
        odd = f"{self.odd_paths:,} paths are not UTF-8; their bytes are taken as they are"
        return ([odd] if self.odd_paths else []) + ([self.doubled_ids] if self.doubled_ids else [])


def _doubled_ids(pairs: Callable[[], Iterator[tuple[Any, Any]]]) -> str:
    """Name two rows of `pairs`, a track id and a path each, that have one id and two paths; empty if there are none.

    By 64-bit hashes of the ids' text, sorted: 8 bytes a row; of equal hashes the ids are compared.
    """
    hashes = array("q")
    hashes.extend(hash(text) for text in (_id(track_id) for track_id, _ in islice(pairs(), _MAX_IDS)) if text)
    ids = np.frombuffer(hashes, np.int64)
    ids.sort()
    doubled = set(ids[1:][ids[1:] == ids[:-1]].tolist())
    first: dict[str, tuple[int, Any]] = {}
    for row, (track_id, path) in enumerate(pairs() if doubled else (), start=1):
        text = _id(track_id)
        if text and hash(text) in doubled:
            before = first.setdefault(text, (row, path))
            if before[1] != path:
                return f"rows {before[0]:,} and {row:,} are different recordings with one track id, {track_id!r}"
    return ""


def _may_pass(exc: BaseException) -> bool:
    """Say whether an error of the storage that may pass by itself is the cause of `exc`."""
    cause = exc.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return storage.may_pass(cause)
    return cause is not None and _may_pass(cause)


class Catalog:
    """A catalogue file, local or remote, read from front to back as often as needed."""

    def __init__(self, path: str, columns: Columns | None = None, reserved: Iterable[str] = ()) -> None:
        """Open `path` and check its columns.

        `reserved`: column names of the output that the catalogue's other columns may not take. Raises CatalogError.
        """
        self.path = path
        self._columns = columns or Columns()
        used = [self._columns.path, self._columns.track_id, "start", "end"]
        stems = [] if self._columns.vocals is None else [self._columns.vocals]
        self._rows = open_rows(path, used + stems, self._columns.text)
        names = list(self._rows.names)
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise CatalogError(f"{path} has the column {doubled[0]!r} more than once; rename one of them in the file")
        if not names:
            raise CatalogError(f"{path} is empty: it names no columns")
        if not all(map(storage.is_utf8, names)):
            raise CatalogError(
                f"{path}: the names of its columns are not UTF-8 ({printable(', '.join(names))}). {_NAME_THE_ENCODING}"
            )
        if self._columns.path not in names:
            raise CatalogError(
                f'{path} has no column "{self._columns.path}"; it has: {", ".join(names)}. Name it with --path-column'
            )
        if stems and stems[0] not in names:
            raise CatalogError(f'{path} has no column "{stems[0]}" (--vocals-column); it has: {", ".join(names)}')
        if self._columns.track_id != Columns.track_id and self._columns.track_id not in names:
            raise CatalogError(
                f'{path} has no column "{self._columns.track_id}" (--id-column); it has: {", ".join(names)}'
            )
        self._extra = {name: self._columns.rename.get(name, name) for name in names if name not in used}
        unknown = self._columns.rename.keys() - self._extra.keys()
        if unknown:
            raise CatalogError(f"{path}: --rename names {sorted(unknown)[0]!r}, which is not one of its other columns")
        self._check_taken(set(reserved))

    def _check_taken(self, reserved: set[str]) -> None:
        """Raise CatalogError where two columns of the output would have names that differ in case at most.

        DuckDB and Spark cannot tell such columns apart.
        """
        taken = {name.lower(): name for name in reserved}
        for name, output in self._extra.items():
            other = taken.setdefault(output.lower(), output)
            if output in reserved or other is not output:
                apart = "" if output == other else f', and "{output}" differs in case only'
                raise CatalogError(
                    f'{self.path}: the output already has a column "{other}"{apart}. Rename the catalogue\'s: '
                    f"--rename {name}=catalog_{name}"
                )

    def fingerprint(self) -> Fingerprint:
        """Hash the file and count its rows."""
        return fingerprint(self.path, self._rows.layout)

    @property
    def remarks(self) -> list[str]:
        """How the file is written, where its name does not say so."""
        return self._rows.layout.remarks

    def check(self, fingerprint: Fingerprint) -> CatalogCheck:
        """Read the whole catalogue once before it is used; `fingerprint` says what can be left out.

        Raises CatalogError where a quote is left open, or where text other than a path is not in the encoding.
        """
        path, track_id = self._columns.path, self._columns.track_id
        odd_paths = 0 if fingerprint.is_utf8 else self._count_odd_paths()
        if track_id in self._rows.names:
            return CatalogCheck(odd_paths, _doubled_ids(lambda: self._rows.pairs(track_id, path)))
        if fingerprint.has_quotes:
            for _ in self._rows.values():  # raises where a quote is left open
                pass
        return CatalogCheck(odd_paths, "")

    def _count_odd_paths(self) -> int:
        count = 0
        for row, raw in enumerate(self._rows.values(), start=1):
            for name, value in raw.values.items():
                if not isinstance(value, str) or storage.is_utf8(value):
                    continue
                if name not in {self._columns.path, self._columns.track_id, self._columns.vocals}:
                    raise CatalogError(
                        f'{self.path} row {row:,}: "{name}" is not UTF-8 ({printable(value)}). {_NAME_THE_ENCODING}'
                    )
                count += name == self._columns.path
        return count

    def _check_unchanged(self, expected: Fingerprint) -> Fingerprint:
        """Return `expected`, brought up to date, if the file still is what it was; raise CatalogError if not."""
        try:
            if storage.state_of(self.path) == expected.state:
                return expected
            now = self.fingerprint()
        except (OSError, CatalogError) as exc:
            raise CatalogError(f"{self.path} cannot be read any more ({exc}). {_FINISHED_ARE_SAFE}") from exc
        if now.sha256 != expected.sha256:
            raise CatalogError(
                f"{self.path} was changed during the run: it had {expected.rows:,} rows, and has {now.rows:,}. "
                f"{_FINISHED_ARE_SAFE}"
            )
        return now

    def units(
        self, minutes: float = DEFAULT_UNIT_MINUTES, unchanged_since: Fingerprint | None = None
    ) -> Iterator[Unit]:
        """Cut the catalogue into units of about `minutes` of audio; the same catalogue always gives the same units.

        `unchanged_since`: before a unit is returned, and at the end, the file must still have this fingerprint. Where
        the storage fails, it is waited for and the file read again. Raises CatalogError if the file was changed, and
        where it cannot be read on.
        """
        expected, done = unchanged_since, 0
        for pause in (*_PAUSES_SECONDS, None):
            try:
                for unit in islice(cut_units(self.tracks(), minutes), done, None):
                    expected = expected and self._check_unchanged(expected)
                    yield unit
                    done += 1
                if expected:
                    self._check_unchanged(expected)
                return
            except CatalogError as exc:
                if pause is None or not _may_pass(exc):
                    raise
                _log.warning("%s. Waiting for it, for %g s", exc, pause)
                time.sleep(pause)

    def extra_schema(self) -> pa.Schema:
        """Names and types of the columns that are passed through."""
        for _, extra in self.tracks():
            return extra.schema
        return pa.schema([(name, pa.string()) for name in self._extra.values()])

    def tracks(self) -> Iterator[tuple[list[Track], pa.Table]]:
        """Yield the tracks in batches, with the catalogue's other columns, a row a track. Raises CatalogError."""
        row = 0
        for raw_rows, table in self._rows.batches():
            tracks = [self._track(row + i, raw) for i, raw in enumerate(raw_rows, start=1)]
            row += len(raw_rows)
            yield tracks, table.select(list(self._extra)).rename_columns(list(self._extra.values()))

    def _track(self, row: int, raw: RawRow) -> Track:
        names = self._columns.path, self._columns.track_id, self._columns.vocals
        path, track_id, stem = ("" if name is None else _text(raw.values.get(name)) for name in names)
        try:
            if raw.problem:
                raise ValueError(raw.problem)
            for name, text in zip(names, (path, track_id, stem), strict=True):
                if not storage.is_bytes_or_text(text):
                    raise ValueError(f'"{name}" holds half a character: {printable(text)}')
                if name is not None and isinstance(raw.values.get(name), list | dict):
                    raise ValueError(f'"{name}" is neither text nor a number: {text}')
            if not path:
                raise ValueError(f'the column "{self._columns.path}" is empty')
            start = _seconds(raw.values, "start") or 0.0
            end = _seconds(raw.values, "end")
            if end is not None and end <= start:
                raise ValueError(f"end {end:g} s is not after start {start:g} s")
        except ValueError as exc:
            path, track_id = portable(path), portable(track_id)
            location = storage.resolve(self.path, path)
            problem = TrackError("bad_row", f"row {row} of the catalogue: {exc}")
            return Track(row, track_id or path or f"row {row}", path, location, problem=problem)
        location = storage.resolve(self.path, path)
        vocals = stem and storage.resolve(self.path, stem)
        return Track(row, track_id or path, path, location, start, end, vocals=vocals)


def cut_units(batches: Iterable[tuple[list[Track], pa.Table]], minutes: float, first_index: int = 0) -> Iterator[Unit]:
    """Cut tracks, in batches as `Catalog.tracks` yields them, into units of about `minutes` of audio."""
    index, tracks, extras, gathered = first_index, list[Track](), list[pa.Table](), 0.0
    for batch, extra in batches:
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


def _text(value: Any) -> str:
    """`value` as text; empty where it is missing, as NaN is in pandas."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def _id(value: Any) -> str:
    """`value` as the text of an id; empty where it is missing, or makes its row a bad one."""
    return "" if isinstance(value, list | dict) else _text(value)


def _seconds(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None or _text(value).strip().lower() in _MISSING_NUMBERS:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} {value!r} is not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{name} {value!r} is not a number of seconds from 0 on")
    return seconds
