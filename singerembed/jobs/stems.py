"""Write the separated voice of every recording of a catalogue as a FLAC file, and a catalogue that names them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import soundfile
from numpy.typing import NDArray

from singerembed import storage
from singerembed.audio.limits import DEFAULT_TRACK_TIMEOUT_SECONDS, TimeLimit
from singerembed.audio.padding import PaddedReader
from singerembed.audio.recording import open_recording
from singerembed.catalog.read import Catalog, Columns, Track, Unit
from singerembed.engine.file import SeparatorFile, read_separator_file
from singerembed.engine.machine import available_cores
from singerembed.engine.separator import Separator
from singerembed.errors import InterruptedRun, OutputError, TrackError
from singerembed.jobs.ordered_map import ordered_map
from singerembed.jobs.track import Stopped
from singerembed.model.mel import as_float
from singerembed.output.finished import remove_temporaries
from singerembed.output.lock import LOCK_NAME, take_lock

CATALOG_NAME = "catalog.csv"
VOCALS, ERROR = "vocals", "separate_error"  # columns of the new catalogue
_RESERVED = ("track_id", "path", "start", "end", VOCALS, ERROR)
_IDENTITY = "separator.json"
_TASKS_A_WORKER = 4
_NAME_CHARACTERS = 60


@dataclass
class StemCounts:
    """What was done."""

    tracks: int = 0
    written: int = 0
    kept: int = 0  # that an earlier call had written, or that an earlier row names too
    errors: int = 0


class _Stem(NamedTuple):
    """What became of a track's voice."""

    name: str = ""  # of its file; empty: there is none
    error: TrackError | None = None
    written_for: int | None = None  # the catalogue's row for which it was written just now; None: it was there


def separate_catalog(
    catalog: str,
    folder: str,
    separator: str,
    *,
    columns: Columns | None = None,
    workers: int | None = None,
    separated: Callable[[Track, TrackError | None], None] = lambda _track, _error: None,
    say: Callable[[str, str], None] = lambda _what, _text: None,
    stop: Callable[[], int] = lambda: 0,
) -> StemCounts:
    """Separate every recording of `catalog` and write its voice to `folder`; go on where an earlier call ended.

    The new catalogue in `folder` has the old one's columns, absolute paths, and two columns more: where the stem is,
    and what went wrong. A stem is as long as its recording, so that start and end stay right; a recording that several
    rows name has one. A stem whose recording has another size or time by now is written anew. `separated` is called for
    each track, in order, `say` with what a person should know of the catalogue: a subject and a text.
    Raises CatalogError, EngineError, OutputError, and InterruptedRun after a stop.
    """
    rows = Catalog(catalog, columns, _RESERVED)
    for text in rows.remarks + rows.check(rows.fingerprint()).notes:
        say("catalog", f"{catalog}: {text}")
    file = read_separator_file(separator)
    source, counts = Separator(file), StemCounts()
    try:
        with ExitStack() as stack:
            stack.callback(source.close)
            stack.enter_context(_claimed(folder, file))
            threads = workers or available_cores()
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            temporary = stack.enter_context(storage.publishing(f"{folder}/{CATALOG_NAME}"))
            out = stack.enter_context(Path(temporary).open("w", encoding="utf-8", errors="surrogateescape", newline=""))
            writer = csv.writer(out, lineterminator="\n")
            extra_names = rows.extra_schema().names
            writer.writerow([*_RESERVED, *extra_names])
            running: dict[str, Future[_Stem]] = {}  # by the recording, which several rows may name

            def separate(item: tuple[Unit, int]) -> Future[_Stem]:
                track = item[0].tracks[item[1]]
                if (same := running.get(track.location)) is not None and not track.problem:
                    return same
                future = pool.submit(_stem_of, track, folder, source, stop)
                if not track.problem:
                    running[track.location] = future
                    future.add_done_callback(lambda _done: running.pop(track.location, None))
                return future

            units = ((unit, i) for unit in rows.units() for i in range(len(unit.tracks)))
            results = ordered_map(
                separate,
                units,
                max_running=_TASKS_A_WORKER * threads,
                weight=lambda _result: 1,
                max_waiting=1 << 16,
            )
            for (unit, i), stem in results:
                track = unit.tracks[i]
                is_new = stem.written_for == track.row
                counts.tracks += 1
                counts.errors += stem.error is not None
                counts.written += is_new
                counts.kept += stem.error is None and not is_new
                separated(track, stem.error)
                writer.writerow([*_cells(track, stem), *_extra_cells(unit.extra, i)])
    except Stopped as exc:
        number = stop()
        raise InterruptedRun(
            f"stopped; {counts.tracks:,} are done. The same command goes on from here", number
        ) from exc
    except OSError as exc:
        raise OutputError(f"cannot write to {folder}: {exc.strerror or exc}. Mend that and run it again") from exc
    return counts


@contextmanager
def _claimed(folder: str, file: SeparatorFile) -> Iterator[None]:
    """Hold `folder` as that of this separator's stems, locked, without what killed processes left half written.

    Raises OutputError if it is another's, holds other files, or another process writes to it; and OSError.
    """
    identity = {"separator": file.spec.name, "sha256": file.sha256}
    is_new = not storage.is_folder(folder)
    names = storage.names_in(folder)
    if _IDENTITY in names:
        _check_identity(folder, identity)
    elif any(name != LOCK_NAME and not name.startswith(f".{_IDENTITY}.") for name in names):
        raise OutputError(f"{folder} holds files of others. Give the name of a new folder, or of an empty one")
    storage.make_folder(folder)
    try:
        give_back = take_lock(folder, folder)
        try:
            remove_temporaries(folder)
            if _IDENTITY not in names:
                with storage.publishing(f"{folder}/{_IDENTITY}") as temporary:
                    Path(temporary).write_text(json.dumps(identity), encoding="utf-8")
            yield
        finally:
            storage.remove(f"{folder}/{LOCK_NAME}")  # while it is held, so that nobody takes it in between
            give_back()
    finally:
        if is_new:
            storage.remove_empty_folder(folder)


def _check_identity(folder: str, identity: dict[str, str]) -> None:
    """Raise OutputError unless `folder` holds the stems of the separator `identity`."""
    with storage.open_input(f"{folder}/{_IDENTITY}") as file:
        content = file.read()
    try:
        found = json.loads(content)
    except ValueError as exc:
        raise OutputError(
            f"{folder}/{_IDENTITY}, which says whose stems these are, is damaged ({exc}). Give another folder, or "
            "remove this one to separate everything again"
        ) from exc
    if found != identity:
        raise OutputError(f"{folder} holds the stems of another separator. Give another folder")


def _stem_of(track: Track, folder: str, separator: Separator, stop: Callable[[], int]) -> _Stem:
    """Separate the track's recording, unless its stem is there. Raises Stopped and OutputError."""
    name = stem_name(track.location)
    if track.problem:
        return _Stem(error=track.problem)
    state = _state_of(track.location)
    written_from = _written_from(f"{folder}/{name}")
    # A recording that cannot be asked for its state, as on a disk that is not mounted, keeps its stem.
    if written_from and state in {written_from, ""}:
        return _Stem(name)
    try:
        limit = TimeLimit(DEFAULT_TRACK_TIMEOUT_SECONDS)
        blocks = separated_blocks(track.location, separator, limit)
        with limit.counting():
            first = next(blocks, None)
        if first is None:
            raise TrackError("no_audio", "the recording has no samples")
        with storage.publishing(f"{folder}/{name}") as temporary:
            rate, channels = separator.spec.sample_rate, separator.spec.channels
            with soundfile.SoundFile(temporary, "w", rate, channels, "PCM_16", format="FLAC") as out:
                out.comment = state or "of unknown state"
                for block in chain([first], blocks):
                    if stop():
                        raise Stopped
                    out.write(np.clip(block, -1, 1))
    except TrackError as exc:
        return _Stem(error=exc)
    except soundfile.LibsndfileError as exc:
        raise OutputError(f"cannot write {folder}/{name}: {exc.error_string}") from exc
    return _Stem(name, written_for=track.row)


def _state_of(location: str) -> str:
    """Size and time of a recording, which its stem's comment tells; empty if its file system does not say."""
    try:
        facts = storage.facts_of(location)
    except Exception:  # each file system of fsspec has exceptions of its own; what is wrong is found by decoding it
        return ""
    return f"of {facts.size} bytes, {facts.mtime_ns} ns"


def _written_from(stem: str) -> str:
    """The state that the recording had when its voice was written to the FLAC file `stem`; empty if there is none."""
    if not storage.exists(stem):
        return ""
    try:
        with storage.open_input(stem) as file, soundfile.SoundFile(file) as found:
            return str(found.comment)
    except soundfile.LibsndfileError:
        return ""


def separated_blocks(location: str, separator: Separator, limit: TimeLimit) -> Iterator[NDArray[np.float32]]:
    """Yield the voice of a whole recording, float32 [n, channels], a segment at a time. Raises TrackError."""
    spec = separator.spec
    window, context = spec.stem_segment_samples, spec.context_samples
    wanted = window - 2 * context
    with open_recording(location, spec.sample_rate, limit, channels=spec.channels) as recording:
        reader = PaddedReader(recording, context)
        with limit.counting():
            held = reader.read(window)
        while (n := min(wanted, len(held) - 2 * context)) > 0:
            segment = np.zeros((window, spec.channels), np.float32)
            segment[: len(held)] = np.nan_to_num(as_float(held), posinf=0, neginf=0).reshape(-1, spec.channels)
            yield separator.vocals(segment)[context : context + n]
            if len(held) < window:
                break
            with limit.counting():
                held = np.concatenate([held[wanted:], reader.read(wanted)])
        with limit.counting():
            recording.check_complete()


def stem_name(location: str) -> str:
    """The file name of a recording's stem: its own name, where that is fit, and a hash of the whole path."""
    name = re.sub(r"[^\w .,()-]", "_", PurePosixPath(storage.redacted(location)).stem)[:_NAME_CHARACTERS].strip(" .")
    digest = hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{name or 'stem'}-{digest}.flac"


def _cells(track: Track, stem: _Stem) -> list[object]:
    start, end = track.start or "", "" if track.end is None else track.end
    path = "" if track.problem else storage.absolute(track.location)  # a row that is wrong stays one
    return [track.track_id, path, start, end, stem.name, f"{stem.error.code}: {stem.error}" if stem.error else ""]


def _extra_cells(extra: pa.Table, row: int) -> list[object]:
    return ["" if value is None else value for value in extra.slice(row, 1).to_pylist()[0].values()]
