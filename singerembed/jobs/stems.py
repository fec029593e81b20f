"""Write the separated voice of every recording of a catalogue as a FLAC file, and a catalogue that names them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

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
from singerembed.model.mel import as_float

CATALOG_NAME = "catalog.csv"
VOCALS, ERROR = "vocals", "separate_error"  # columns of the new catalogue
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


class _Stopped(Exception):
    """A signal asked to stop."""


def separate_catalog(
    catalog: str,
    folder: str,
    separator: str,
    *,
    columns: Columns | None = None,
    workers: int | None = None,
    separated: Callable[[Track, TrackError | None], None] = lambda _track, _error: None,
    stop: Callable[[], int] = lambda: 0,
) -> StemCounts:
    """Separate every recording of `catalog` and write its voice to `folder`; go on where an earlier call ended.

    The new catalogue in `folder` has the old one's columns, absolute paths, and two columns more: where the stem is,
    and what went wrong. A stem is as long as its recording, so that start and end stay right; a recording that several
    rows name has one. `separated` is called for each track, in order.
    Raises CatalogError, EngineError, OutputError, and InterruptedRun after a stop.
    """
    rows = Catalog(catalog, columns, [VOCALS, ERROR])
    file = read_separator_file(separator)
    source, counts = Separator(file), StemCounts()
    try:
        _claim(folder, file)
        threads = workers or available_cores()
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            temporary = stack.enter_context(storage.publishing(f"{folder}/{CATALOG_NAME}"))
            out = stack.enter_context(Path(temporary).open("w", encoding="utf-8", errors="surrogateescape", newline=""))
            writer = csv.writer(out, lineterminator="\n")
            extra_names = rows.extra_schema().names
            writer.writerow(["track_id", "path", "start", "end", VOCALS, ERROR, *extra_names])

            def separate(item: tuple[Unit, int]) -> tuple[str, TrackError | None, bool]:
                return _stem_of(item[0].tracks[item[1]], folder, source, stop)

            units = ((unit, i) for unit in rows.units() for i in range(len(unit.tracks)))
            results = ordered_map(
                lambda item: pool.submit(separate, item),
                units,
                max_running=_TASKS_A_WORKER * threads,
                weight=lambda _result: 1,
                max_waiting=1 << 16,
            )
            for (unit, i), (name, error, is_new) in results:
                track = unit.tracks[i]
                counts.tracks += 1
                counts.errors += error is not None
                counts.written += is_new
                counts.kept += error is None and not is_new
                separated(track, error)
                writer.writerow([*_cells(track, name, error), *_extra_cells(unit.extra, i)])
    except _Stopped as exc:
        number = stop()
        raise InterruptedRun(
            f"stopped; {counts.tracks:,} are done. The same command goes on from here", number
        ) from exc
    except OSError as exc:
        raise OutputError(f"cannot write to {folder}: {exc.strerror or exc}. Mend that and run it again") from exc
    return counts


def _claim(folder: str, file: SeparatorFile) -> None:
    """Make `folder` that of this separator's stems. Raises OutputError if it is another's, or holds other files."""
    identity = {"separator": file.spec.name, "sha256": file.sha256}
    if storage.exists(f"{folder}/{_IDENTITY}"):
        if json.loads(storage.read(f"{folder}/{_IDENTITY}")) != identity:
            raise OutputError(f"{folder} holds the stems of another separator. Give another folder")
        return
    if storage.names_in(folder):
        raise OutputError(f"{folder} holds files of others. Give the name of a new folder, or of an empty one")
    storage.make_folder(folder)
    storage.write(f"{folder}/{_IDENTITY}", json.dumps(identity).encode())


def _stem_of(
    track: Track, folder: str, separator: Separator, stop: Callable[[], int]
) -> tuple[str, TrackError | None, bool]:
    """Return the name of the track's stem, what went wrong, and whether the stem was written just now."""
    name = stem_name(track.location)
    if track.problem:
        return "", track.problem, False
    if storage.exists(f"{folder}/{name}"):
        return name, None, False
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
                for block in chain([first], blocks):
                    if stop():
                        raise _Stopped
                    out.write(np.clip(block, -1, 1))
    except TrackError as exc:
        return "", exc, False
    except soundfile.LibsndfileError as exc:
        raise OutputError(f"cannot write {folder}/{name}: {exc.error_string}") from exc
    return name, None, True


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


def _cells(track: Track, name: str, error: TrackError | None) -> list[object]:
    start, end = track.start or "", "" if track.end is None else track.end
    path = "" if track.problem else storage.absolute(track.location)  # a row that is wrong stays one
    return [track.track_id, path, start, end, name, f"{error.code}: {error}" if error else ""]


def _extra_cells(extra: pa.Table, row: int) -> list[object]:
    return ["" if value is None else value for value in extra.slice(row, 1).to_pylist()[0].values()]
