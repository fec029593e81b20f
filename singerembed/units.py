"""Embeds units: their tracks on threads of one process, their rows in order, their parts published."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol

from singerembed.catalog import Catalog, Track, Unit
from singerembed.embedding import Stopped, embed_track
from singerembed.engine.file import read_engine_file
from singerembed.engine.load import open_engine
from singerembed.errors import InterruptedRun
from singerembed.options import RunOptions
from singerembed.ordered import ordered_map
from singerembed.parquet import RESERVED_COLUMNS, Counts, PartWriter, TrackRows, output_schema
from singerembed.parts import PartStore
from singerembed.previous import PreviousOutput
from singerembed.spec import ModelSpec

# Rows that are embedded but wait for an earlier track, because the output keeps the catalogue's order: 80 MB.
_MAX_WAITING_ROWS = 20_000
_TASKS_A_WORKER = 4
_CALLERS_A_CORE = 2  # where callers wait for a device, others decode meanwhile


@dataclass(frozen=True)
class Job:
    """What one process has to embed, as plain data that can be sent to another one."""

    catalog: str
    output: str
    engine: str
    options: RunOptions
    device: int = 0  # CUDA device, where the engine is for one
    shard: int = 0  # of the units: those whose index is this, modulo `shards`
    shards: int = 1


class Listener(Protocol):
    """Is told what a run does, from one thread."""

    def started(self, spec: ModelSpec, description: str, total_tracks: int) -> None:
        """The engine is loaded; `description` says what runs where. There are about `total_tracks` tracks to come."""

    def resumed(self, units: int) -> None:
        """An earlier run had finished `units` units."""

    def skipped(self, counts: Counts) -> None:
        """A unit was finished before."""

    def embedded(self, track: Track, rows: TrackRows) -> None:
        """A track is embedded, and its rows wait for their unit's other tracks."""

    def published(self, unit: int, counts: Counts) -> None:
        """A unit's part is on the disk."""


def available_cores() -> int:
    """Cores this process may use, by its affinity and its control group's limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit
        return cores


class _Task(NamedTuple):
    unit: Unit
    position: int  # of the track in its unit

    @property
    def track(self) -> Track:
        return self.unit.tracks[self.position]


class UnitRunner:
    """Embeds the units of one run, or one shard of them, in this process."""

    def __init__(self, job: Job, parts: PartStore, listeners: Sequence[Listener], stop: Callable[[], int]) -> None:
        self._job, self._parts, self._listeners, self._stop = job, parts, listeners, stop
        self._catalog = Catalog(job.catalog, job.options.columns, RESERVED_COLUMNS)
        self._engine_file = read_engine_file(job.engine)
        self._embedded = Counts()
        spec = self._engine_file.spec
        self.schema = output_schema(self._catalog.extra_schema(), spec.embedding_dim, job.options.embedding_dtype)

    def embed_all(self, total_tracks: int) -> Counts:
        """Embed and publish the units that are not done yet. Returns what was embedded."""
        tasks = (_Task(unit, i) for unit in self._open_units() for i in range(len(unit.tracks)))
        with closing(self._results(tasks, total_tracks)) as results:
            for index, of_unit in groupby(results, key=lambda result: result[0].unit.index):
                with self._publishing(index) as part:
                    for task, rows in of_unit:
                        part.add(task.track, rows, task.unit.extra.slice(task.position, 1))
        return self._embedded

    def retry_errors(self, previous: PreviousOutput) -> Counts:
        """Embed the tracks that have error rows in `previous`, and publish the units that hold them."""
        tasks = (
            _Task(unit, i)
            for unit in self._open_units()
            for i in previous.tracks_with_errors(unit.index, len(unit.tracks))
        )
        with closing(self._results(tasks, previous.counts.error_tracks)) as results:
            for _, of_unit in groupby(results, key=lambda result: result[0].unit.index):
                unit, again = None, {}
                for task, rows in of_unit:
                    unit, again[task.position] = task.unit, rows
                assert unit is not None
                kept = previous.rows_by_track(unit.index, len(unit.tracks))
                with self._publishing(unit.index) as part:
                    for i, track in enumerate(unit.tracks):
                        if i in again:
                            part.add(track, again[i], unit.extra.slice(i, 1))
                        else:
                            part.keep(kept[i])
        return self._embedded

    def _results(self, tasks: Iterable[_Task], total_tracks: int) -> Generator[tuple[_Task, TrackRows], None, None]:
        """Embed `tasks` on the workers and yield their rows in order."""
        options = self._job.options
        with ExitStack() as stack:
            opened = open_engine(self._engine_file, options.silence_dbfs, self._job.device)
            engine = stack.enter_context(closing(opened))
            share = max(1, available_cores() // self._job.shards)
            workers = options.workers or share * (_CALLERS_A_CORE if engine.waits else 1)
            journal = stack.enter_context(closing(self._parts.journal(workers, self._job.shard)))
            for listener in self._listeners:
                listener.started(engine.spec, f"{engine.description}, {workers} workers", total_tracks)

            def embed(task: _Task) -> TrackRows:
                row = task.track.row
                with journal.decoding(row):
                    isolated = row in journal.suspects
                    return embed_track(task.track, engine, options, isolated=isolated, stop=self._stop)

            pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="embed"))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            results = ordered_map(
                pool,
                embed,
                tasks,
                max_running=_TASKS_A_WORKER * workers,
                weight=lambda rows: rows.n_rows,
                max_waiting=_MAX_WAITING_ROWS,
            )
            try:
                for task, rows in results:
                    self._embedded.add(rows)
                    for listener in self._listeners:
                        listener.embedded(task.track, rows)
                    yield task, rows
            except Stopped as exc:
                done = f"{len(self._parts.done):,} units are done"
                raise InterruptedRun(f"stopped; {done}. The same command goes on from here", self._stop()) from exc

    @contextmanager
    def _publishing(self, unit: int) -> Iterator[PartWriter]:
        with self._parts.writing(unit, self.schema) as part:
            yield part
        for listener in self._listeners:
            listener.published(unit, part.counts)

    def _open_units(self) -> Iterator[Unit]:
        for unit in self._catalog.units(self._job.options.unit_minutes):
            if self._stop():
                raise Stopped
            if unit.index % self._job.shards != self._job.shard:
                continue
            if unit.index not in self._parts.done:
                yield unit
                continue
            for listener in self._listeners:
                listener.skipped(self._parts.counts(unit.index))
