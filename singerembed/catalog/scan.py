"""Make a catalogue of folders, playlists and cue sheets, with the tags of the files."""

from __future__ import annotations

import csv
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.catalog.cue_sheet import CueFile, CueSheet, audio_name, read_cue_sheet
from singerembed.catalog.layout import has_catalog_name
from singerembed.catalog.playlist import PLAYLIST_SUFFIXES, read_playlist
from singerembed.catalog.tags import TagReader, Tags
from singerembed.catalog.walk import UNREADABLE, Found, Walk
from singerembed.errors import CatalogError, UsageError

SCAN_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("track_id", pa.string()),  # of a track that a cue sheet cuts out; null: the path names it
        ("start", pa.float64()),  # seconds
        ("end", pa.float64()),
        ("size", pa.int64()),  # bytes, of the file
        ("mtime", pa.timestamp("us", "UTC")),
        ("duration", pa.float64()),  # seconds, by the header
        ("artist", pa.string()),
        ("album_artist", pa.string()),
        ("title", pa.string()),
        ("album", pa.string()),
        ("track", pa.int32()),
        ("year", pa.int32()),
        ("genre", pa.string()),
        ("musicbrainz_trackid", pa.string()),
        ("musicbrainz_artistid", pa.string()),
    ]
)
# In the metadata of a catalogue in Parquet.
UNREADABLE_KEY = b"singerembed.unreadable_folders"
SOURCES_KEY = b"singerembed.sources"  # JSON, absolute paths
DEFAULT_WORKERS = 8
_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FILES_A_TASK = 32
_TASKS_A_WORKER = 4
_ROW_GROUP_ROWS = 16_384

Row = dict[str, Any]


@dataclass
class ScanCounts:
    """What a scan has found so far."""

    recordings: int = 0
    seconds: float = 0.0  # of those whose header says how long they are
    left_out: Counter[str] = field(default_factory=Counter)  # by the reason
    _artists: set[int] = field(default_factory=set)  # hashes

    @property
    def artists(self) -> int:
        return len(self._artists)

    @property
    def unreadable_folders(self) -> int:
        return self.left_out[UNREADABLE]

    @property
    def left_out_text(self) -> str:
        """What was left out, for people: the most frequent reason first."""
        ordered = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count:,} {reason}" for reason, count in ordered)

    def add(self, row: Row) -> None:
        """Count one recording."""
        self.recordings += 1
        self.seconds += row["duration"] or 0.0
        if row["artist"]:
            self._artists.add(hash(row["artist"]))

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON types."""
        found = {"recordings": self.recordings, "artists": self.artists, "seconds": round(self.seconds, 3)}
        return {**found, "left_out": dict(sorted(self.left_out.items()))}

    def __str__(self) -> str:
        left = f" (left out: {self.left_out_text})" if self.left_out else ""
        return f"{self.recordings:,} recordings, {self.artists:,} artists, {self.seconds / 3600:,.1f} h{left}"


def is_source(path: str) -> bool:
    """Say whether `path` is a folder, a playlist or a cue sheet, which `scan` takes, rather than a catalogue."""
    if _is_list(path) or path.endswith("/"):
        return True
    # An object's name tells: to ask a web server would fetch all of it.
    return not (storage.is_remote(path) and has_catalog_name(path)) and storage.is_folder(path)


def scan(
    sources: Iterable[str],
    catalog: str,
    *,
    workers: int = DEFAULT_WORKERS,
    say: Callable[[str], None] = lambda _text: None,
    found: Callable[[ScanCounts], None] = lambda _counts: None,
) -> ScanCounts:
    """Write the recordings in `sources`, folders, playlists and cue sheets, to the catalogue `catalog`.

    The catalogue appears whole or not at all, and the same sources give the same file. `workers`: files that are read
    at a time. `say` is called with one line for each folder that cannot be read, `found` now and then with the counts.
    Raises UsageError for a name of another format, and CatalogError where a source is missing or has no recordings.
    """
    kind = _FORMATS.get(PurePosixPath(catalog).suffix.lower())
    if kind is None:
        raise UsageError(f"{catalog}: the catalogue must end in .csv, .jsonl or .parquet")
    sources = [storage.local_path(source) for source in sources]
    _check_apart(sources)
    counts = ScanCounts()
    folder = None if storage.is_remote(catalog) else Path(catalog).absolute().parent
    try:
        with storage.publishing(catalog) as temporary, closing(_WRITERS[kind](temporary)) as writer:
            for source in sources:
                before = counts.recordings
                walk = Walk(say, counts.left_out, PurePosixPath(temporary).name)
                for rows in _rows(_recordings(source, walk), workers):
                    for row in rows:
                        row["path"] = _written(row["path"], folder)
                        if row["track_id"] is not None:
                            row["track_id"] = row["path"] + row["track_id"]
                        counts.add(row)
                    writer.write(rows)
                    found(counts)
                if counts.recordings == before:
                    left = counts.left_out_text
                    raise CatalogError(
                        f"{storage.redacted(source)} has no recordings{f' (left out: {left})' if left else ''}. "
                        "Is its disk mounted?"
                    )
            writer.finish(counts, sources)
    except OSError as exc:
        raise CatalogError(f"cannot write the catalogue {storage.redacted(catalog)}: {exc.strerror or exc}") from exc
    return counts


def _check_apart(sources: list[str]) -> None:
    """Raise UsageError where one source lies within another: its recordings would be listed twice."""
    places = [source.rstrip("/") if storage.is_remote(source) else str(Path(source).resolve()) for source in sources]
    for i, place in enumerate(places):
        for j, other in enumerate(places):
            if i != j and (place == other or place.startswith(f"{other}/")):
                raise UsageError(
                    f"{sources[i]} is listed twice: it is, or lies in, {sources[j]}. Leave one of them out"
                )


def _is_list(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in {*PLAYLIST_SUFFIXES, ".cue"}


def _recordings(source: str, walk: Walk) -> Iterator[Found]:
    """The recordings of one source. Raises CatalogError."""
    try:
        if not _is_list(source):
            yield from walk.recordings(source)
        elif source.lower().endswith(".cue"):
            yield from _of_cue_sheet(source)
        else:
            for path in read_playlist(source):
                if path.startswith(("http://", "https://")):  # a radio station, which never ends
                    walk.left_out["web addresses"] += 1
                else:
                    yield Found(path)
    except OSError as exc:
        raise CatalogError(f"cannot read {storage.redacted(source)}: {exc.strerror or exc}") from exc


def _of_cue_sheet(path: str) -> Iterator[Found]:
    sheet = read_cue_sheet(path)
    parent = path.rpartition("/")[0] if "/" in path else "."
    names = sorted(
        entry.name for entry in storage.entries(parent) if entry.is_file and entry.name != path.rpartition("/")[2]
    )
    for cut in sheet.files:
        name = audio_name(cut.name, names) or cut.name
        yield Found(storage.resolve(path, name), None, sheet, cut if len(cut.tracks) > 1 else None)


def _rows(recordings: Iterator[Found], workers: int) -> Iterator[list[Row]]:
    """The rows of `recordings`, in order; `workers` files are read at a time."""
    waiting: deque[Future[list[Row]]] = deque()
    with closing(TagReader()) as reader, ThreadPoolExecutor(workers) as pool:

        def read(some: list[Found]) -> list[Row]:
            return [row for one in some for row in _rows_of(one, reader)]

        try:
            while some := list(islice(recordings, _FILES_A_TASK)):
                waiting.append(pool.submit(read, some))
                if len(waiting) > workers * _TASKS_A_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _rows_of(found: Found, reader: TagReader) -> list[Row]:
    """The rows of one recording: one, or one a track of its cue sheet."""
    facts = found.facts
    if facts is None:
        try:
            facts = storage.facts_of(found.path)
        except (OSError, ValueError):  # it has gone, or there is a NUL in its name; the run says so
            facts = storage.Facts()
    tags = reader.read(found.path) if facts.size else Tags()
    row: Row = {
        "path": found.path,
        "track_id": None,
        "start": None,
        "end": None,
        "size": facts.size,
        "mtime": _time(facts.mtime_ns),
        **tags._asdict(),
    }
    if found.cut is None or found.sheet is None:
        return [row]
    return _cut(row, found.sheet, found.cut)


def _cut(row: Row, sheet: CueSheet, cut: CueFile) -> list[Row]:
    """`row` once for each track of its cue sheet; what the sheet leaves open is taken from the file's tags.

    The track's id is to be appended to the path.
    """
    year = int(sheet.date[:4]) if sheet.date and sheet.date[:4].isdecimal() else row["year"]
    rows = []
    for track in cut.tracks:
        end = row["duration"] if track.end is None else track.end
        duration = None if end is None or track.start is None else round(end - track.start, 3)
        rows.append(
            {
                **row,
                "track_id": f"#{track.number:02d}",
                "start": round(track.start or 0.0, 6),
                "end": None if track.end is None else round(track.end, 6),
                "duration": duration if duration is not None and duration > 0 else None,
                "artist": track.performer or sheet.performer or row["artist"],
                "album_artist": sheet.performer or row["album_artist"],
                "title": track.title,
                "album": sheet.title or row["album"],
                "track": track.number or None,
                "year": year,
                "genre": sheet.genre or row["genre"],
                "musicbrainz_trackid": None,  # that of the file is no track's
            }
        )
    return rows


def _time(mtime_ns: int | None) -> datetime | None:
    try:
        return None if mtime_ns is None else _EPOCH + timedelta(microseconds=mtime_ns // 1000)
    except OverflowError:
        return None


def _written(path: str, folder: Path | None) -> str:
    """`path` as the catalogue in `folder` has it: relative to the folder where it lies in it, else from the root."""
    if storage.is_remote(path):
        return path
    place = Path(path).absolute()
    inside = folder is not None and place.is_relative_to(folder)
    return storage.portable(str(place.relative_to(folder)) if inside and folder else str(place))


# --- formats --------------------------------------------------------------------------------------------------------


class _Writer(Protocol):
    def write(self, rows: list[Row]) -> None: ...

    def finish(self, counts: ScanCounts, sources: list[str]) -> None: ...

    def close(self) -> None: ...


def sources_text(sources: list[str]) -> str:
    """What the metadata of a catalogue say of its sources."""
    return json.dumps([storage.redacted(storage.absolute(source)) for source in sources])


def _as_text(row: Row) -> Row:
    """`row` with its time as ISO 8601 has it."""
    when = row["mtime"]
    return {**row, "mtime": when and when.isoformat(timespec="microseconds").replace("+00:00", "Z")}


class _TextWriter:
    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w", encoding="utf-8", newline="")  # noqa: SIM115  (see close)

    def finish(self, _counts: ScanCounts, _sources: list[str]) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class _CsvWriter(_TextWriter):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._writer = csv.DictWriter(self._file, SCAN_SCHEMA.names, lineterminator="\n")
        self._writer.writeheader()

    def write(self, rows: list[Row]) -> None:
        self._writer.writerows(map(_as_text, rows))


class _JsonWriter(_TextWriter):
    def write(self, rows: list[Row]) -> None:
        for row in map(_as_text, rows):
            known = {name: row[name] for name in SCAN_SCHEMA.names if row[name] is not None}
            self._file.write(json.dumps(known, ensure_ascii=False) + "\n")


class _ParquetWriter:
    def __init__(self, path: str) -> None:
        self._writer = pq.ParquetWriter(path, SCAN_SCHEMA, compression="zstd")
        self._rows: list[Row] = []

    def write(self, rows: list[Row]) -> None:
        self._rows += rows
        if len(self._rows) >= _ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, SCAN_SCHEMA))
        self._rows = []

    def finish(self, counts: ScanCounts, sources: list[str]) -> None:
        self._flush()
        facts = {UNREADABLE_KEY: str(counts.unreadable_folders), SOURCES_KEY: sources_text(sources)}
        self._writer.add_key_value_metadata(facts)

    def close(self) -> None:
        self._writer.close()


_WRITERS: dict[str, Callable[[str], _Writer]] = {"csv": _CsvWriter, "jsonl": _JsonWriter, "parquet": _ParquetWriter}
