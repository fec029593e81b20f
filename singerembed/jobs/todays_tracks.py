"""The tracks of today's catalogue, with what the file system says of their files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from singerembed.audio.limits import TimeLimit
from singerembed.audio.process import packet_hash
from singerembed.audio.recording import local_recording
from singerembed.catalog.read import Catalog, Track
from singerembed.catalog.row_file import RowFile
from singerembed.engine.machine import available_cores
from singerembed.errors import TrackError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.ordered_map import ordered_map
from singerembed.jobs.threads import WorkerThreads
from singerembed.jobs.track import Stopped, facts_of
from singerembed.output.schema import IDENTITY, identity_columns
from singerembed.storage import Facts, portable, printable, redacted, resolve

Result = TypeVar("Result")

# No column of a catalogue is called so.
_ROW, _VOCALS, PROBLEM = "\0row", "\0vocals", "\0problem"
_OWN = pa.schema(
    [
        (_ROW, pa.int64()),
        ("track_id", pa.string()),
        ("path", pa.string()),
        (_VOCALS, pa.string()),
        (PROBLEM, pa.string()),
        *((field.name, field.type) for field in IDENTITY),
    ]
)
_ASKED_AT_A_TIME = 8  # of a file system: a file server answers many at once
_FILES_A_CALL = 128
_CALLS_A_THREAD, _RESULTS_A_THREAD = 4, 64
_HASHES = "packet_hashes.jsonl"  # in the parts folder, so that a run that was stopped need not read the files again


class _Files(NamedTuple):
    """Files that one call looks at."""

    locations: Sequence[str]

    def __str__(self) -> str:
        return f"{len(self.locations):,} files from {printable(redacted(self.locations[0]))} on,"


class TodaysTracks:
    """All tracks of a catalogue, on the disk. Must be closed."""

    def __init__(
        self,
        catalog: Catalog,
        folder: str | None,
        options: RunOptions,
        stop: Callable[[], int],
        *,
        with_facts: bool = True,
    ) -> None:
        """Read the catalogue, and with `with_facts` ask for each file's size and time. Raises CatalogError and Stopped.

        `folder`: for hashes that are kept.
        """
        self._catalog, self._folder, self._options, self._stop = catalog, folder, options, stop
        self._extra = catalog.extra_schema()
        self.rows = RowFile(pa.schema([*_OWN, *self._extra]))
        without = ((tracks, extra, [Facts()] * len(tracks)) for tracks, extra in catalog.tracks())
        for tracks, extra, facts in self._with_facts() if with_facts else without:
            identity = identity_columns(list(zip(tracks, facts, strict=True)))
            columns = [
                [track.row for track in tracks],
                [portable(track.track_id) for track in tracks],
                [portable(track.path) for track in tracks],
                [portable(track.vocals) for track in tracks],
                [track.problem and str(track.problem) for track in tracks],
                *identity.values(),
                *extra.cast(self._extra).columns,
            ]
            self.rows.write(pa.table(columns, schema=self.rows.schema))
        self.rows.finish()

    def __len__(self) -> int:
        return len(self.rows)

    def tracks(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Track]:
        """The tracks of these rows, counted from 0."""
        return [
            Track(
                one[_ROW],
                one["track_id"],
                one["path"],
                resolve(self._catalog.path, one["path"]),
                one["track_start"] or 0.0,
                one["track_end"],
                one[PROBLEM] and TrackError("bad_row", one[PROBLEM]),
                one[_VOCALS],
            )
            for one in self.rows.take(rows).select(_OWN.names).to_pylist()
        ]

    def extra(self, rows: NDArray[np.int64]) -> pa.Table:
        """The catalogue's other columns in these rows."""
        return self.rows.take(rows).select(self._extra.names)

    def packet_hashes(self, rows: NDArray[np.int64]) -> list[str | None]:
        """The hash of the packets of each row's file; None where it cannot be read. Raises Stopped."""
        facts = self.rows.take(rows).select(["file_size", "file_mtime"]).to_pylist()
        locations = [track.source for track in self.tracks(rows)]
        keys = [f"{place} {one['file_size']} {one['file_mtime']}" for place, one in zip(locations, facts, strict=True)]
        kept = Path(self._folder, _HASHES) if self._folder else None
        known: dict[str, str | None] = {}
        if kept and kept.exists():
            for line in kept.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the process was killed while it wrote the line
                    key, found = json.loads(line)
                    known[key] = found
        todo = [i for i, key in enumerate(keys) if key not in known]
        calls = (_Files([locations[i]]) for i in todo)
        with open(kept or os.devnull, "a", encoding="utf-8") as file:  # noqa: PTH123
            for i, (_, found) in zip(todo, self._called(calls, _packet_hash, available_cores()), strict=True):
                known[keys[i]] = found
                if found is not None:  # what cannot be read now may be readable later
                    file.write(json.dumps([keys[i], found]) + "\n")
        return [known[key] for key in keys]

    def close(self) -> None:
        """Remove the temporary file."""
        self.rows.close()

    def _with_facts(self) -> Iterator[tuple[list[Track], pa.Table, list[Facts]]]:
        pending: list[tuple[list[Track], pa.Table]] = []

        def calls() -> Iterator[_Files]:
            for batch, extra in self._catalog.tracks():
                for first in range(0, len(batch), _FILES_A_CALL):
                    tracks = batch[first : first + _FILES_A_CALL]
                    pending.append((tracks, extra.slice(first, len(tracks))))
                    yield _Files([track.source for track in tracks])

        for _, facts in self._called(calls(), _facts, _ASKED_AT_A_TIME):
            tracks, extra = pending.pop(0)
            yield tracks, extra, facts or [Facts()] * len(tracks)

    def _called(
        self, calls: Iterator[_Files], function: Callable[[_Files, TimeLimit], Result], threads: int
    ) -> Iterator[tuple[_Files, Result | None]]:
        """Call `function` of each of `calls` on threads; its result is None where the storage does not answer."""
        limit = partial(TimeLimit, self._options.track_timeout_seconds)
        pool = WorkerThreads(threads, limit, lambda _files: None, self._stop, Stopped)
        with closing(pool):
            running, waiting = _CALLS_A_THREAD * threads, _RESULTS_A_THREAD * threads
            submit = partial(pool.submit, function)
            for done in ordered_map(submit, calls, max_running=running, weight=lambda _: 1, max_waiting=waiting):
                if self._stop():
                    raise Stopped
                yield done


def _facts(files: _Files, limit: TimeLimit) -> list[Facts]:
    with limit.counting():
        return [facts_of(location) for location in files.locations]


def _packet_hash(files: _Files, limit: TimeLimit) -> str | None:
    try:
        with limit.counting(), local_recording(files.locations[0]) as path:
            return packet_hash(path, limit)
    except TrackError:
        return None
