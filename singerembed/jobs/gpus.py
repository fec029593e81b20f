"""Embed on GPUs, a process for each, or several on one: Python has one lock for all threads of a process."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from queue import Empty
from typing import Any

from singerembed.catalog.read import Track
from singerembed.engine.file import EngineFile
from singerembed.engine.load import devices_for
from singerembed.errors import EngineError, InterruptedRun, SingerEmbedError, UsageError
from singerembed.jobs.crash_journal import gather_suspects
from singerembed.jobs.units import Job, Listener, UnitRunner
from singerembed.model.spec import ModelSpec
from singerembed.output.parts import PartStore
from singerembed.output.schema import Counts, TrackRows

_POLL_SECONDS = 0.2
_MAX_RESTARTS = 20  # of all processes together, see supervisor.py


def choose_devices(engine: EngineFile, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Choose the CUDA devices for `engine`; (0,) where it runs on the CPU. `wanted` None: all devices.

    Raises UsageError for a device that is not there.
    """
    available = devices_for(engine)
    if wanted is None:
        return tuple(range(available)) or (0,)
    missing = [device for device in wanted if device >= max(1, available)]
    if missing:
        raise UsageError(f"--devices {missing[0]}: there is no such device; this engine can use {available} here")
    return wanted


def embed_on_devices(
    job: Job,
    devices: Sequence[int],
    parts: PartStore,
    total_tracks: int,
    listeners: Sequence[Listener],
    stop: Callable[[], int],
) -> Counts:
    """Embed the units of `job`, one process a device. Returns the counts of what was embedded.

    A process that crashes is started again, and goes on with what it had not finished. Raises what a process raises,
    and InterruptedRun after a stop.
    """
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    stopping = context.Value("i", 0)
    jobs = [replace(job, device=device, shard=i, shards=len(devices)) for i, device in enumerate(devices)]

    def start(one: Job) -> BaseProcess:
        process = context.Process(target=_work, args=(one, events, stopping, total_tracks), daemon=True)
        process.start()
        return process

    running = {one.shard: start(one) for one in jobs}
    relay = _Relay(listeners)
    restarts = 0
    try:
        while running:
            stopping.value = stopping.value or stop()
            relay.drain(events, _POLL_SECONDS)
            for shard, process in list(running.items()):
                if process.is_alive():
                    continue
                del running[shard]
                relay.drain(events, 0)
                if process.exitcode is not None and process.exitcode < 0 and not relay.failure:
                    restarts += 1
                    if restarts > _MAX_RESTARTS:
                        name = signal.Signals(-process.exitcode).name
                        raise EngineError(f"the process of device {devices[shard]} died again and again ({name})")
                    gather_suspects(parts.local_folder)
                    running[shard] = start(jobs[shard])
            if relay.failure:
                stopping.value = stopping.value or signal.SIGTERM
    finally:
        for process in running.values():
            process.terminate()
            process.join()
        parts.refresh()
    if relay.failure:
        raise relay.failure
    if stopping.value:
        raise parts.interrupted(stopping.value)
    return relay.embedded


def _work(job: Job, events: Any, stopping: Any, total_tracks: int) -> None:
    """Entry point of a child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    try:
        runner = UnitRunner(
            job,
            PartStore.of_parent(job.output, partitioned=job.partitioned),
            [_Sender(events)],
            lambda: int(stopping.value),
        )
        runner.embed_all(total_tracks, runner.open_units())
    except InterruptedRun:
        pass
    except SingerEmbedError as exc:
        events.put(("failed", exc))
    except Exception as exc:
        events.put(("failed", EngineError(f"the process of device {job.device} failed: {type(exc).__name__}: {exc}")))
    events.close()
    events.join_thread()


class _Sender(Listener):
    """A `Listener` that sends every event, without embeddings, to the parent process."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def started(self, spec: ModelSpec, description: str, total_tracks: int) -> None:
        self._events.put(("started", spec, description, total_tracks))

    def resumed(self, units: int) -> None:
        self._events.put(("resumed", units))

    def skipped(self, tracks: int) -> None:
        self._events.put(("skipped", tracks))

    def embedded(self, track: Track, rows: TrackRows) -> None:
        self._events.put(("embedded", track, replace(rows, embedding=rows.embedding[:0].copy())))

    def published(self, unit: int, counts: Counts) -> None:
        self._events.put(("published", unit, counts))


class _Relay:
    """Passes the events of the child processes to the parent's listeners."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self.embedded = Counts()
        self.failure: SingerEmbedError | None = None

    def drain(self, events: Any, seconds: float) -> None:
        """Handle the events that have arrived, waiting up to `seconds` for the first."""
        try:
            while True:
                kind, *arguments = events.get(timeout=seconds) if seconds else events.get_nowait()
                seconds = 0
                if kind == "failed":
                    self.failure = self.failure or arguments[0]
                    continue
                if kind == "embedded":
                    self.embedded.add(arguments[1])
                for listener in self._listeners:
                    getattr(listener, kind)(*arguments)
        except Empty:
            pass
