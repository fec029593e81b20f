"""Wires the stages: catalogue, embedding, part files, the merge; resume, retrying, and stopping."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from singerembed import storage
from singerembed.catalog import Catalog, Track, Unit
from singerembed.embedding import Stopped, embed_track
from singerembed.engine.base import Engine
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.load import bundled_engine_path, open_engine
from singerembed.errors import InterruptedRun, OutputError, UsageError
from singerembed.options import RunOptions
from singerembed.ordered import ordered_map
from singerembed.parquet import RESERVED_COLUMNS, Counts, PartWriter, TrackRows, output_schema
from singerembed.parts import PartStore, PreviousOutput, differences

# Rows that are embedded but wait for an earlier track, because the output keeps the catalogue's order: 80 MB.
_MAX_WAITING_ROWS = 20_000
_TASKS_A_WORKER = 4


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    output: str
    counts: Counts  # of the whole output
    embedded: Counts  # of what this run itself embedded
    seconds: float
    units_before: int = 0  # units that an earlier run had finished
    already_done: bool = False


class Listener(Protocol):
    """Is told what a run does, from one thread."""

    def started(self, engine: Engine, workers: int, total_tracks: int) -> None:
        """The engine is loaded; the catalogue has about `total_tracks` tracks."""

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


def run(
    catalog: str,
    output: str,
    *,
    engine: str | None = None,
    options: RunOptions | None = None,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], int] = lambda: 0,
) -> RunSummary:
    """Embed every track of the catalogue `catalog` into the Parquet file `output`; go on where an earlier run ended.

    `engine` is an engine file (default: the bundled one). `stop` returns 0, or the number of a signal on which to stop.
    Raises CatalogError, EngineError, OutputError, or InterruptedRun after a stop.
    """
    options = options or RunOptions()
    started = time.monotonic()
    source = Catalog(catalog, options.columns, RESERVED_COLUMNS)
    engine_file = read_engine_file(engine or bundled_engine_path())
    fingerprint = source.fingerprint()
    identity = {
        "catalog": {"name": storage.redacted(catalog).rpartition("/")[2], "sha256": fingerprint.sha256},
        "engine": {"name": engine_file.spec.name, "sha256": engine_file.sha256},
        "options": options.decisive(),
        "version": version("singerembed"),
    }
    with PartStore(output) as parts, closing(PreviousOutput(output)) as previous:
        if options.restart:
            parts.remove()
        elif previous.exists:
            _check_same(output, previous, identity)
            if not (options.retry_errors and previous.counts.errors):
                storage.remove_folder(parts.folder)
                return RunSummary(output, previous.counts, Counts(), time.monotonic() - started, already_done=True)
        elif options.retry_errors:
            raise UsageError(f"--retry-errors is for a finished output, and {output} does not exist. Run without it")
        retrying = previous if options.retry_errors and not options.restart else None
        parts.open(identity | {"retrying": dict(retrying.counts.errors)} if retrying else identity)
        running = _Run(source, parts, engine_file, options, listeners, stop)
        units_before = len(parts.done)
        embedded = running.retry_errors(retrying) if retrying else running.embed_all(fingerprint.rows)
        metadata = {**identity, "spec": engine_file.spec.to_dict(), "verification": engine_file.verification}
        counts = parts.merge(running.schema, metadata | {"engine_build": engine_file.build}, retrying)
    return RunSummary(output, counts, embedded, time.monotonic() - started, units_before)


def _check_same(output: str, previous: PreviousOutput, identity: dict[str, Any]) -> None:
    different = differences({key: previous.metadata.get(key) for key in identity}, identity)
    if different:
        raise OutputError(
            f"{output} comes from another run: {', '.join(different)}. Give another output, or --restart to replace it"
        )


class _Task(NamedTuple):
    unit: Unit
    position: int  # of the track in its unit

    @property
    def track(self) -> Track:
        return self.unit.tracks[self.position]


class _Run:
    """One run in progress."""

    def __init__(
        self,
        catalog: Catalog,
        parts: PartStore,
        engine_file: EngineFile,
        options: RunOptions,
        listeners: Sequence[Listener],
        stop: Callable[[], int],
    ) -> None:
        self._catalog, self._parts, self._options, self._listeners, self._stop = (
            catalog,
            parts,
            options,
            listeners,
            stop,
        )
        self._engine_file = engine_file
        self._embedded = Counts()
        spec = engine_file.spec
        self.schema = output_schema(catalog.extra_schema(), spec.embedding_dim, options.embedding_dtype)

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
        workers = self._options.workers or available_cores()
        with ExitStack() as stack:
            engine = stack.enter_context(closing(open_engine(self._engine_file, self._options.silence_dbfs)))
            journal = stack.enter_context(closing(self._parts.journal(workers)))
            for listener in self._listeners:
                listener.started(engine, workers, total_tracks)
                if self._parts.done:
                    listener.resumed(len(self._parts.done))

            def embed(task: _Task) -> TrackRows:
                row = task.track.row
                with journal.decoding(row):
                    isolated = row in journal.suspects
                    return embed_track(task.track, engine, self._options, isolated=isolated, stop=self._stop)

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
        for unit in self._catalog.units(self._options.unit_minutes):
            if self._stop():
                raise Stopped
            if unit.index not in self._parts.done:
                yield unit
                continue
            for listener in self._listeners:
                listener.skipped(self._parts.counts(unit.index))
