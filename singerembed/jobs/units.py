"""Embed work units on the threads of one process, and publish their part files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import NamedTuple

import pyarrow as pa

from singerembed.audio.limits import TimeLimit
from singerembed.catalog.formats import Fingerprint
from singerembed.catalog.read import Catalog, Track, Unit
from singerembed.engine.file import EngineFile, SeparatorFile, read_engine_file, read_separator_file
from singerembed.engine.load import open_engine
from singerembed.engine.machine import available_cores
from singerembed.engine.separation import open_separation
from singerembed.jobs.crash_journal import CrashJournal
from singerembed.jobs.options import RunOptions
from singerembed.jobs.ordered_map import ordered_map
from singerembed.jobs.threads import MAX_ABANDONED, WorkerThreads
from singerembed.jobs.todays_tracks import TodaysTracks
from singerembed.jobs.track import Patience, Stopped, embed_track, overdue_rows
from singerembed.model.crop_classifier import CropClassifier
from singerembed.model.mixture import MixtureDetector
from singerembed.model.spec import ModelSpec
from singerembed.output.finished import FinishedOutput
from singerembed.output.parts import PartStore
from singerembed.output.schema import RESERVED_COLUMNS, Counts, TrackRows, output_schema
from singerembed.storage import printable, redacted

# Rows that are embedded but wait for an earlier track, because the output keeps the catalogue's order: 80 MB.
_MAX_WAITING_ROWS = 20_000
_TASKS_A_WORKER = 4
# Recordings that are looked at for accompaniment: the first ones and a share, which costs below a hundredth of a run.
_ALL_OF_THE_FIRST, _ONE_IN = 64, 16
_CALLERS_A_CORE = 2  # where callers wait for a device, others decode meanwhile


@dataclass(frozen=True)
class Job:
    """The work of one process, as plain data that can be sent to another one."""

    catalog: str
    output: str
    engine: str
    options: RunOptions
    partitioned: bool = False  # see PartStore
    device: int = 0  # CUDA device, where the engine is for one
    shard: int = 0  # of the units: those whose index is this, modulo `shards`
    shards: int = 1
    unchanged_since: Fingerprint | None = None  # of the catalogue, which must stay what it was


class Listener:
    """Receives the events of a run, from one thread; each method does nothing unless a subclass has its own."""

    def started(self, spec: ModelSpec, description: str, total_tracks: int) -> None:
        """The engine is loaded; `description` names back end, device and threads. About `total_tracks` follow."""

    def resumed(self, units: int) -> None:
        """An earlier run had finished `units` units."""

    def skipped(self, tracks: int) -> None:
        """A unit of `tracks` tracks was finished before."""

    def embedded(self, track: Track, rows: TrackRows) -> None:
        """A track is embedded; its rows wait for the other tracks of their unit."""

    def all_embedded(self) -> None:
        """No track follows, and the output, a new one, is not finished; in one process the last unit is not either."""

    def published(self, unit: int, counts: Counts) -> None:
        """The part file of a unit is on the disk."""


@dataclass(frozen=True)
class RevisedUnit(Unit):
    """A unit of a finished output that is written again."""

    bounds: Sequence[tuple[int, int]] = ()  # of each track: its rows there; it keeps them unless it is embedded
    columns: pa.Table | None = None  # a row a track: what takes the place of stored values; None: nothing


Work = Iterator[tuple[Unit, Sequence[int]]]  # units, and which of their tracks to embed


class Task(NamedTuple):
    """One track to embed, and the unit it belongs to."""

    unit: Unit
    position: int  # of the track in its unit

    @property
    def track(self) -> Track:
        return self.unit.tracks[self.position]

    def __str__(self) -> str:
        return f"row {self.track.row:,}, {printable(redacted(self.track.path))},"


def _is_looked_at(track: Track) -> bool:
    return not track.vocals and (track.row <= _ALL_OF_THE_FIRST or track.row % _ONE_IN == 0)


class EngineThreads:
    """One engine, and the threads that decode for it. Must be closed."""

    def __init__(
        self,
        engine_file: EngineFile,
        options: RunOptions,
        journal: Callable[[int], CrashJournal],
        stop: Callable[[], int],
        *,
        device: int,
        cores: int,
        separator_file: SeparatorFile | None = None,
    ) -> None:
        """Start the engine, and `cores` threads unless the options say how many. Raises EngineError."""
        self._options, self._stop = options, stop
        self._patience = Patience()
        with ExitStack() as stack:
            opened = open_engine(engine_file, options.silence_dbfs, device)
            self._engine = stack.enter_context(closing(opened))
            self._separation = (
                open_separation(separator_file, opened.spec, options.min_vocals_db, options.silence_dbfs, device)
                if separator_file
                else None
            )
            if self._separation:
                stack.callback(self._separation.close)
            looks = separator_file is None and CropClassifier.fits(opened.spec)
            self._mixtures = MixtureDetector(opened.spec) if looks else None
            self._threads = options.workers or cores * (_CALLERS_A_CORE if opened.waits else 1)
            # A thread that is left behind keeps its slot in the journal.
            self._journal = stack.enter_context(closing(journal(self._threads + MAX_ABANDONED)))
            self._pool = stack.enter_context(
                closing(
                    WorkerThreads(
                        self._threads,
                        partial(TimeLimit, options.track_timeout_seconds),
                        lambda _task: overdue_rows(options, opened.spec.embedding_dim),
                        stop,
                        Stopped,
                    )
                )
            )
            self._stack = stack.pop_all()
        self.spec = self._engine.spec
        separated = f", of voices by {self._separation.description}" if self._separation else ""
        self.description = f"{self._engine.description}{separated}, {self._threads} workers"

    def embed(
        self, tasks: Iterable[Task], *, isolated: bool = False, one_by_one: bool = False
    ) -> Iterator[tuple[Task, TrackRows]]:
        """Embed `tasks` and yield their rows in order; several callers share the threads.

        `isolated`: decode all of them in processes beside this one. `one_by_one`: never two at a time.
        """

        def embed(task: Task, limit: TimeLimit) -> TrackRows:
            row = task.track.row
            with self._journal.decoding(row):
                apart = isolated or row in self._journal.suspects
                return embed_track(
                    task.track,
                    self._engine,
                    self._options,
                    limit,
                    self._patience,
                    isolated=apart,
                    stop=self._stop,
                    separation=self._separation,
                    mixtures=self._mixtures if _is_looked_at(task.track) else None,
                )

        return ordered_map(
            partial(self._pool.submit, embed),
            tasks,
            max_running=1 if one_by_one else _TASKS_A_WORKER * self._threads,
            weight=lambda rows: rows.n_rows,
            max_waiting=_MAX_WAITING_ROWS,
        )

    def close(self) -> None:
        """End the threads and free the device."""
        self._stack.close()


def publish_units(
    results: Iterable[tuple[Task, TrackRows]],
    parts: PartStore,
    schema: pa.Schema,
    listeners: Sequence[Listener],
    previous: FinishedOutput | None = None,
) -> Counts:
    """Write `results`, in order, to the part files of their units; return the counts of what was embedded.

    Tracks of a `RevisedUnit` that are not among `results` keep the rows that they have in `previous`.
    """
    embedded = Counts()
    for _, of_unit in groupby(results, key=lambda result: result[0].unit.index):
        first = next(of_unit)
        unit = first[0].unit
        kept = _kept_rows(unit, schema, previous)
        with parts.writing(unit.index, schema) as part:
            position = 0
            for task, rows in chain([first], of_unit):
                embedded.add(rows)
                for listener in listeners:
                    listener.embedded(task.track, rows)
                for old in kept[position : task.position]:
                    part.keep(old)
                part.add(task.track, rows, unit.extra.slice(task.position, 1))
                position = task.position + 1
            for old in kept[position:]:
                part.keep(old)
        for listener in listeners:
            listener.published(unit.index, part.counts)
    return embedded


def publish_kept(
    units: Iterable[RevisedUnit],
    parts: PartStore,
    schema: pa.Schema,
    listeners: Sequence[Listener],
    previous: FinishedOutput,
    stop: Callable[[], int],
) -> None:
    """Write units none of whose tracks is embedded. Raises Stopped."""
    for unit in units:
        if stop():
            raise Stopped
        with parts.writing(unit.index, schema) as part:
            for rows in _kept_rows(unit, schema, previous):
                part.keep(rows)
        for listener in listeners:
            listener.published(unit.index, part.counts)


def _kept_rows(unit: Unit, schema: pa.Schema, previous: FinishedOutput | None) -> list[pa.Table]:
    """The rows that each track of `unit` has in `previous`; of a unit that is not there, or tells none apart, none."""
    if previous is None or not isinstance(unit, RevisedUnit):
        return []
    return previous.kept_rows(unit.index, unit.bounds, unit.columns, schema)


class UnitRunner:
    """Embeds the units of one run, or one shard of them, in this process."""

    def __init__(self, job: Job, parts: PartStore, listeners: Sequence[Listener], stop: Callable[[], int]) -> None:
        self._job, self._parts, self._listeners, self._stop = job, parts, listeners, stop
        self._catalog = Catalog(job.catalog, job.options.columns, RESERVED_COLUMNS)
        self._engine_file = read_engine_file(job.engine)
        self.left_work = False
        options = job.options
        self._separator_file = read_separator_file(options.separate) if options.separate else None
        self.schema = output_schema(
            self._catalog.extra_schema(),
            self._engine_file.spec.embedding_dim,
            options.embedding_dtype,
            audio_hash=options.audio_hash,
            packet_hash=options.identity == "audio",
            separated=options.separate is not None,
            stems=options.columns.vocals is not None,
        )

    def embed_all(self, total_tracks: int, work: Work, previous: FinishedOutput | None = None) -> Counts:
        """Embed and publish `work`. Returns the counts of what was embedded."""
        options, shards = self._job.options, self._job.shards
        journal = partial(CrashJournal, self._parts.local_folder, shard=self._job.shard)
        cores = max(1, available_cores() // shards)
        threads = EngineThreads(
            self._engine_file,
            options,
            journal,
            self._stop,
            device=self._job.device,
            cores=cores,
            separator_file=self._separator_file,
        )
        with closing(threads):
            for listener in self._listeners:
                listener.started(threads.spec, threads.description, total_tracks)
            tasks = (Task(unit, i) for unit, positions in self.until_deadline(work) for i in positions)
            try:
                return publish_units(
                    self._to_the_end(threads.embed(tasks), previous),
                    self._parts,
                    self.schema,
                    self._listeners,
                    previous,
                )
            except Stopped as exc:
                raise self._parts.interrupted(self._stop()) from exc

    def _to_the_end(
        self, results: Iterator[tuple[Task, TrackRows]], previous: FinishedOutput | None
    ) -> Iterator[tuple[Task, TrackRows]]:
        """Yield `results`, and tell the listeners of their end while the last unit can still be given up."""
        yield from results
        for listener in () if previous or self.left_work else self._listeners:
            listener.all_embedded()

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        deadline = self._job.options.deadline
        return deadline is not None and time.time() >= deadline

    def until_deadline(self, work: Work) -> Work:
        """Yield `work` as long as a unit may begin; `left_work` says whether some of it was not yielded."""
        for item in work:
            if self.is_late:
                self.left_work = True
                return
            yield item

    def is_complete(self) -> bool:
        """Whether every unit of the catalogue is done."""
        return all(unit.index in self._parts.done for unit in self._catalog.units(self._job.options.unit_minutes))

    def todays_tracks(self, *, with_facts: bool = True) -> TodaysTracks:
        """All tracks of the catalogue, with their files' sizes and times if wanted. Raises CatalogError and Stopped."""
        return TodaysTracks(
            self._catalog, self._parts.local_folder, self._job.options, self._stop, with_facts=with_facts
        )

    def open_units(self) -> Work:
        """Yield the units of this shard that are not done yet, with all their tracks. Raises Stopped."""
        job = self._job
        for unit in self._catalog.units(job.options.unit_minutes, job.unchanged_since):
            if self._stop():
                raise Stopped
            if unit.index % job.shards != job.shard:
                continue
            if unit.index not in self._parts.done:
                yield unit, range(len(unit.tracks))
                continue
            for listener in self._listeners:
                listener.skipped(len(unit.tracks))
