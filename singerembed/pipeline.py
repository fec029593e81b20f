"""Wires the stages: catalogue, decoding, crops, engine, part files; threads, resume, and stopping."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from singerembed import mel, storage
from singerembed.audio import DEFAULT_TRACK_TIMEOUT_SECONDS, TimeLimit, open_recording
from singerembed.catalog import DEFAULT_UNIT_MINUTES, Catalog, Columns, Track, Unit
from singerembed.crops import CropBlock, CropPlan, read_crops
from singerembed.engine.base import EmbeddedCrops, Engine
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.load import bundled_engine_path, open_engine
from singerembed.errors import InterruptedRun, OutputError, SingerEmbedError, TrackError
from singerembed.parquet import ERROR, OK, RESERVED_COLUMNS, SILENT, Counts, TrackRows, output_schema
from singerembed.parts import PartStore, differences, read_output

# Rows that are embedded but wait for an earlier track, because the output keeps the catalogue's order: 80 MB.
_MAX_WAITING_ROWS = 20_000
_TASKS_A_WORKER = 4
Item = TypeVar("Item")
Result = TypeVar("Result")
_STATUS = {mel.LOUD: OK, mel.SILENT: SILENT, mel.INVALID: ERROR}


@dataclass(frozen=True)
class RunOptions:
    """What a run may be told. All but the last three decide the rows, and have to stay the same when a run goes on."""

    crops: int | None = None  # None: all consecutive crops; otherwise this many of them a track, evenly spaced
    hop_seconds: float | None = None  # None: the crop's length
    pool: str = "none"  # "mean": one row a track, the mean of its crops' embeddings
    embedding_dtype: str = "float32"
    silence_dbfs: float = mel.DEFAULT_SILENCE_DBFS
    columns: Columns = field(default_factory=Columns)
    unit_minutes: float = DEFAULT_UNIT_MINUTES  # of audio
    track_timeout_seconds: float = DEFAULT_TRACK_TIMEOUT_SECONDS
    workers: int | None = None  # None: the cores this process may use
    restart: bool = False

    def decisive(self) -> dict[str, Any]:
        """The options that decide the rows, as JSON types."""
        fields = asdict(self)
        return {name: fields[name] for name in fields if name not in {"track_timeout_seconds", "workers", "restart"}}


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
    """Is told what a run does."""

    def started(self, engine: Engine, workers: int, total_tracks: int) -> None: ...
    def resumed(self, units: int) -> None: ...
    def skipped(self, counts: Counts) -> None: ...
    def embedded(self, track: Track, rows: TrackRows) -> None: ...


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
    listener: Listener | None = None,
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
    with PartStore(output, identity) as parts:
        if options.restart:
            read_output(output)  # refuses a file that is not ours
            parts.remove()
        elif (finished := _finished(output, identity)) is not None:
            storage.remove_folder(parts.folder)
            return RunSummary(output, finished, Counts(), time.monotonic() - started, already_done=True)
        parts.open()
        running = _Run(source, parts, engine_file, options, listener, stop)
        embedded, units_before = running.embed_all(fingerprint.rows)
        metadata = {**identity, "spec": engine_file.spec.to_dict(), "verification": engine_file.verification}
        counts = parts.merge(running.schema, metadata | {"engine_build": engine_file.build})
    return RunSummary(output, counts, embedded, time.monotonic() - started, units_before)


def _finished(output: str, identity: dict[str, Any]) -> Counts | None:
    found = read_output(output)
    if found is None:
        return None
    metadata, counts = found
    different = differences({key: metadata.get(key) for key in identity}, identity)
    if different:
        raise OutputError(
            f"{output} comes from another run: {', '.join(different)}. Give another output, or --restart to replace it"
        )
    return counts


class _Run:
    """One run in progress."""

    def __init__(
        self,
        catalog: Catalog,
        parts: PartStore,
        engine_file: EngineFile,
        options: RunOptions,
        listener: Listener | None,
        stop: Callable[[], int],
    ) -> None:
        self._catalog, self._parts, self._options, self._listener, self._stop = catalog, parts, options, listener, stop
        self._engine_file = engine_file
        self._units_before = len(parts.done)
        spec = engine_file.spec
        self.schema = output_schema(catalog.extra_schema(), spec.embedding_dim, options.embedding_dtype)

    def embed_all(self, total_tracks: int) -> tuple[Counts, int]:
        """Embed the units that are not done yet. Returns what was embedded, and how many units were done before."""
        embedded = Counts()
        workers = self._options.workers or available_cores()
        engine = open_engine(self._engine_file, self._options.silence_dbfs)
        if self._listener:
            self._listener.started(engine, workers, total_tracks)
            if self._units_before:
                self._listener.resumed(self._units_before)
        with ThreadPoolExecutor(workers, thread_name_prefix="embed") as pool:
            try:
                results = ordered_map(
                    pool,
                    lambda task: embed_track(task[1], engine, self._options, self._stop),
                    ((unit, track, i) for unit in self._open_units() for i, track in enumerate(unit.tracks)),
                    max_running=_TASKS_A_WORKER * workers,
                    weight=lambda rows: rows.n_rows,
                    max_waiting=_MAX_WAITING_ROWS,
                )
                for index, tracks in groupby(results, key=lambda result: result[0][0].index):
                    with self._parts.writing(index, self.schema) as part:
                        for (unit, track, i), rows in tracks:
                            part.add(track, rows, unit.extra.slice(i, 1))
                            embedded.add(rows)
                            if self._listener:
                                self._listener.embedded(track, rows)
            except _Stopped as exc:
                raise InterruptedRun(self._stopped_message(), self._stop()) from exc
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                engine.close()
        return embedded, self._units_before

    def _open_units(self) -> Iterator[Unit]:
        for unit in self._catalog.units(self._options.unit_minutes):
            if self._stop():
                raise _Stopped
            if unit.index not in self._parts.done:
                yield unit
            elif self._listener:
                self._listener.skipped(self._parts.counts(unit.index))

    def _stopped_message(self) -> str:
        return f"stopped; {len(self._parts.done):,} units are done. The same command goes on from here"


class _Stopped(Exception):
    """A signal asked to stop."""


def embed_track(track: Track, engine: Engine, options: RunOptions, stop: Callable[[], int] = lambda: 0) -> TrackRows:
    """Embed one track; whatever is wrong with it becomes `TrackRows.error`. Raises EngineError, and on a stop."""
    spec = engine.spec
    gathered = _Gathered(engine, options)
    error: TrackError | None = None
    try:
        if track.problem:
            raise track.problem
        limit = TimeLimit(options.track_timeout_seconds)
        with open_recording(track.location, spec.sample_rate, limit) as reader:
            blocks = read_crops(reader, _crop_plan(track, engine, options), engine.batch)
            while True:
                with limit.counting():
                    block = next(blocks, None)
                if block is None:
                    break
                if stop():
                    raise _Stopped
                gathered.add(block)
            if track.end is None and options.crops is None:
                reader.check_complete()
    except TrackError as exc:
        error = exc
    except (SingerEmbedError, _Stopped):
        raise
    except Exception as exc:  # one track must not stop a run, whatever a library raises on it
        error = TrackError("internal", f"{type(exc).__name__}: {exc}")
    return gathered.rows(error)


def _crop_plan(track: Track, engine: Engine, options: RunOptions) -> CropPlan:
    spec = engine.spec
    hop = spec.crop_samples if options.hop_seconds is None else max(1, round(options.hop_seconds * spec.sample_rate))
    stop = None if track.end is None else round(track.end * spec.sample_rate)
    return CropPlan(spec.crop_samples, hop, options.crops, round(track.start * spec.sample_rate), stop)


class _Gathered:
    """The crops of one track, as they come out of the engine."""

    def __init__(self, engine: Engine, options: RunOptions) -> None:
        self._engine, self._options = engine, options
        self._blocks: list[tuple[CropBlock, EmbeddedCrops]] = []

    def add(self, block: CropBlock) -> None:
        embedded = self._engine.embed(block.pcm)
        self._blocks.append((replace(block, pcm=block.pcm[:0]), embedded))  # the samples are not needed any more

    def rows(self, error: TrackError | None) -> TrackRows:
        spec = self._engine.spec
        state = _concatenate([e.state for _, e in self._blocks], np.uint8)
        rows = TrackRows(
            crop=np.array([i for block, _ in self._blocks for i in block.index], np.int32),
            start=_concatenate([block.start for block, _ in self._blocks], np.int64) / spec.sample_rate,
            end=_concatenate([block.stop for block, _ in self._blocks], np.int64) / spec.sample_rate,
            status=[_STATUS[int(s)] for s in state],
            peak=_concatenate([e.peak for _, e in self._blocks], np.float32),
            rms=_concatenate([e.rms for _, e in self._blocks], np.float32),
            embedding=np.concatenate(
                [np.empty((0, spec.embedding_dim), np.float32), *(e.embedding for _, e in self._blocks)]
            ),
            error=error,
        )
        return _pooled(rows) if self._options.pool == "mean" and len(rows.crop) else rows


def _concatenate(arrays: list[Any], dtype: Any) -> Any:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _pooled(rows: TrackRows) -> TrackRows:
    """One row for the whole track: the mean embedding of its loud crops, over the time from the first to the last."""
    valid = ~np.isnan(rows.peak)
    status = OK if len(rows.embedding) else SILENT if valid.any() else ERROR
    return TrackRows(
        crop=np.zeros(1, np.int32),
        start=rows.start[:1],
        end=rows.end[-1:],
        status=[status],
        peak=rows.peak[valid].max(keepdims=True) if valid.any() else np.full(1, np.nan, np.float32),
        rms=np.sqrt((rows.rms[valid] ** 2).mean(keepdims=True)) if valid.any() else np.full(1, np.nan, np.float32),
        embedding=rows.embedding.mean(axis=0, keepdims=True) if len(rows.embedding) else rows.embedding,
        error=rows.error,
    )


def ordered_map(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    max_running: int,
    weight: Callable[[Result], int],
    max_waiting: int,
) -> Iterator[tuple[Item, Result]]:
    """Map `function` over `items` on `pool`, and yield (item, result) in the order of the items.

    At most `max_running` calls are under way; no new one starts while results of a weight above `max_waiting` wait for
    an earlier item. The first exception of a call is raised when its turn comes.
    """
    changed = threading.Condition()
    running, waiting = 0, 0
    queue: deque[tuple[Item, Future[Result]]] = deque()

    def finished(future: Future[Result]) -> None:
        nonlocal running, waiting
        with changed:
            running -= 1
            if not future.cancelled() and future.exception() is None:
                waiting += weight(future.result())
            changed.notify()

    def collect() -> tuple[Item, Result]:
        nonlocal waiting
        item, future = queue.popleft()
        result = future.result()
        with changed:
            waiting -= weight(result)
        return item, result

    def wait_for_head_or_room() -> bool:
        """Return whether the oldest item's result is there; if not, there is room for another call."""
        with changed:
            changed.wait_for(lambda: queue[0][1].done() or (running < max_running and waiting <= max_waiting))
        return queue[0][1].done()

    for item in items:
        while queue and wait_for_head_or_room():
            yield collect()
        with changed:
            running += 1
        future = pool.submit(function, item)
        queue.append((item, future))
        future.add_done_callback(finished)
    while queue:
        queue[0][1].exception()  # waits
        yield collect()
