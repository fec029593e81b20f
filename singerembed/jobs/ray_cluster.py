"""Embed units on a Ray cluster: one actor a GPU or a group of cores, fed by this process, the driver.

Ray starts and watches processes, and sends units to them; everything else is decided here. Actors are never restarted
by Ray: a lost one is replaced while its node is there, and its units go to another (scheduling.py). Actors
belong to the driver, and end when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import pyarrow as pa

from singerembed.engine.file import EngineFile
from singerembed.engine.load import PORTABLE_BACKENDS, needs_native
from singerembed.engine.machine import available_cores
from singerembed.errors import ClusterError, MissingDependencyError, SingerEmbedError
from singerembed.jobs.ray_worker import ClusterJob, unpack
from singerembed.jobs.scheduling import Assignment, Scheduler
from singerembed.jobs.track import Stopped
from singerembed.jobs.units import Listener, Work
from singerembed.output.parts import PartStore
from singerembed.output.schema import Counts

LOCAL = "local"  # the address of a cluster to be started here
# The engine goes through it, and hardly anything else.
_OBJECT_STORE_BYTES = 256 << 20
_CORES_A_WORKER = 8  # threads of one process share Python's lock
_ASSIGNMENTS_A_WORKER = 2  # the second is there when the first runs out of tracks
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.2
_NODES_SECONDS = 1.0  # between looks at which nodes there are
_START_SECONDS = 300.0  # after which a worker that does not answer is given up; on a busy cluster the next waits, too
_QUIET_SECONDS = 60.0  # without any worker, until a warning is logged
_IDLE_DEATHS = 20  # in a row, of workers that have finished nothing: the machines are broken, not the recordings
# Ray counts usage unless told not to; under uv it ships the working folder.
_RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}

_log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """Where one worker runs."""

    node: str  # Ray's name of it
    address: str
    number: int  # on its node
    cores: int
    gpus: int


def slots_of(nodes: Sequence[dict[str, Any]], engine: EngineFile, threads: int | None) -> list[Slot]:
    """Choose where workers run, given what `ray.nodes()` returns.

    One a GPU with its share of the node's cores, or one a group of cores; nodes without a GPU are left out for an
    engine that needs one, and GPUs for an engine that cannot use one. `threads`: cores a group, if it was asked for.
    """
    slots = []
    for node in nodes:
        cores, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if not node["Alive"] or (not gpus and engine.backend not in PORTABLE_BACKENDS):
            continue
        if needs_native(engine):
            gpus = 0
        groups = gpus or (cores // min(threads, cores or 1) if threads else -(-cores // _CORES_A_WORKER))
        for number in range(groups):
            share = cores // groups + (number < cores % groups)
            if threads:
                share = min(threads, share)
            slots.append(Slot(node["NodeID"], node["NodeManagerAddress"], number, share, 1 if gpus else 0))
    return slots


@dataclass(eq=False)
class _Worker:
    slot: Slot
    actor: Any
    created: float
    ready: bool = False
    finished: int = 0  # assignments
    assignments: list[Assignment] = field(default_factory=list)

    @property
    def alone(self) -> bool:
        return any(assignment.alone for assignment in self.assignments)


class _Call(NamedTuple):
    worker: _Worker
    assignment: Assignment | None  # None: the call is for its version, or to start


def embed_on_ray(
    address: str,
    job: ClusterJob,
    work: Work,
    parts: PartStore,
    total_tracks: int,
    listeners: Sequence[Listener],
    stop: Callable[[], int],
) -> Counts:
    """Embed `work`, units and which of their tracks, on the Ray cluster at `address`; return their counts.

    Raises ClusterError, what a worker raises, and InterruptedRun after a stop.
    """
    with _connected(address) as ray:
        run = _ClusterRun(ray, job, work, parts, total_tracks, listeners)
        try:
            run.go_on(stop)
        except Stopped as exc:
            raise parts.interrupted(stop()) from exc
        finally:
            run.dismiss()
        return run.embedded


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Yield Ray, connected to the cluster at `address`, or to the one that this process is connected to already."""
    with _environment(_RAY_ENVIRONMENT):
        try:
            import ray
        except ImportError as exc:
            raise MissingDependencyError("--ray", "ray", "ray") from exc
        own = not ray.is_initialized()
        if own:
            _connect(ray, address)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
            ray._private.worker._worker_logs_enabled = True


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _connect(ray: Any, address: str) -> None:
    """Connect to the cluster at `address`, or start one. Raises ClusterError."""
    local = {
        "num_cpus": available_cores(),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    handler = signal.getsignal(signal.SIGTERM)
    # Ray prints the deaths of workers to stdout, whatever the log level; 2.60 has no public switch for that.
    ray._private.worker._worker_logs_enabled = False
    try:
        _check_reachable(address)
        quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        ray.init(address=address, **quiet, **(local if address == LOCAL else {}))
    except Exception as exc:
        what = "start Ray here" if address == LOCAL else f"reach the Ray cluster at {address}"
        raise ClusterError(f"cannot {what}: {exc}") from exc
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray replaces it


def _check_reachable(address: str) -> None:
    """Raise OSError where nothing listens; Ray would try for two minutes, and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _worker_class() -> Any:
    """The actors' class. Defined within a function, its code travels with it, so that a node with another version of
    this package, or without it, can say so.
    """

    class Worker:
        def version(self) -> str:
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("singerembed")
            except PackageNotFoundError:
                return ""

        def start(self, job: Any, cores: int) -> Any:
            from singerembed.jobs.ray_worker import ClusterWorker

            self._worker = ClusterWorker(job, cores)
            return self._worker.started

        def embed(self, unit: Any, positions: Any, careful: bool, alone: bool) -> Any:
            return self._worker.embed(unit, positions, careful=careful, alone=alone)

        def attempt(self, unit: Any, position: int) -> None:
            self._worker.attempt(unit, position)

    return Worker


class _ClusterRun:
    def __init__(
        self,
        ray: Any,
        job: ClusterJob,
        work: Work,
        parts: PartStore,
        total_tracks: int,
        listeners: Sequence[Listener],
    ) -> None:
        self._ray, self._parts, self._listeners = ray, parts, listeners
        self._engine, self._threads = job.engine_file, job.options.workers
        self._job = ray.put(job)
        self._scheduler = Scheduler(work)
        self._total_tracks = total_tracks
        self._workers: dict[Slot, _Worker] = {}
        self._calls: dict[Any, _Call] = {}
        self._actor_class = ray.remote(_worker_class())
        self._looked = self._said = 0.0
        self._idle_deaths = 0
        self._announced = False
        self.embedded = Counts()

    def go_on(self, stop: Callable[[], int]) -> None:
        """Run until every unit is done. Raises Stopped, and what workers raise."""
        while True:
            if stop():
                raise Stopped
            self._start_missing_workers()
            self._assign()
            if self._scheduler.all_given and not any(worker.assignments for worker in self._workers.values()):
                return
            self._collect()

    def dismiss(self) -> None:
        """End all workers; their unfinished units are given up."""
        for worker in list(self._workers.values()):
            self._end(worker)

    # --- workers ----------------------------------------------------------------------------------------------------

    def _start_missing_workers(self) -> None:
        """Start a worker in every free slot, new nodes included."""
        now = time.monotonic()
        if now - self._looked < _NODES_SECONDS:
            return
        self._looked = now
        for worker in list(self._workers.values()):
            if not worker.ready and now - worker.created > _START_SECONDS:
                self._end(worker)
        slots = slots_of(self._ray.nodes(), self._engine, self._threads)
        for slot in slots:
            if slot not in self._workers:
                self._start(slot, now)
        if any(worker.ready for worker in self._workers.values()):
            self._said = now
        elif now - (self._said or now) > _QUIET_SECONDS:
            self._said = now
            _log.warning("no worker has started yet: the cluster has slots for %d, and none is free", len(slots))
        self._said = self._said or now

    def _start(self, slot: Slot, now: float) -> None:
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(slot.node, soft=False)
        actor = self._actor_class.options(
            num_cpus=slot.cores,
            num_gpus=slot.gpus,
            max_concurrency=_ASSIGNMENTS_A_WORKER + 1,
            scheduling_strategy=strategy,
        ).remote()
        worker = self._workers[slot] = _Worker(slot, actor, now)
        self._calls[actor.version.remote()] = _Call(worker, None)

    def _end(self, worker: _Worker) -> None:
        if self._workers.get(worker.slot) is worker:
            del self._workers[worker.slot]
        with contextlib.suppress(Exception):  # it is gone, or the connection is
            self._ray.kill(worker.actor)

    # --- assignments ------------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Assign units to workers. An assignment that must run alone waits for the least busy worker to be idle."""
        ready = (worker for worker in self._workers.values() if worker.ready and not worker.alone)
        workers = sorted(ready, key=lambda worker: len(worker.assignments))
        reserved = workers[: self._scheduler.waiting_alone]
        for worker in reserved:
            if not worker.assignments and (assignment := self._scheduler.next(alone=True)):
                self._give(worker, assignment)
        for depth in range(1, _ASSIGNMENTS_A_WORKER + 1):
            for worker in workers[len(reserved) :]:
                if len(worker.assignments) < depth and (assignment := self._scheduler.next()):
                    self._give(worker, assignment)

    def _give(self, worker: _Worker, assignment: Assignment) -> None:
        worker.assignments.append(assignment)
        # A slice of a table would take along all that it was cut from.
        unit = replace(assignment.unit, extra=assignment.unit.extra.take(pa.array(range(len(assignment.unit.tracks)))))
        if assignment.trial is None:
            ref = worker.actor.embed.remote(unit, assignment.positions, assignment.careful, assignment.alone)
        else:
            ref = worker.actor.attempt.remote(unit, assignment.positions[assignment.trial])
        self._calls[ref] = _Call(worker, assignment)

    def _collect(self) -> None:
        """Wait for a call to end, and handle all that have."""
        if not self._calls:
            time.sleep(_POLL_SECONDS)
            return
        waiting = list(self._calls)
        done, _ = self._ray.wait(waiting, num_returns=1, timeout=_POLL_SECONDS)
        if done:
            done, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for ref in done:
            call = self._calls.pop(ref)
            if call.assignment:
                call.worker.assignments.remove(call.assignment)
            try:
                self._ended(call, self._ray.get(ref))
            except self._ray.exceptions.RayTaskError as exc:
                raise self._failure(call.worker, exc.cause) from exc
            except self._ray.exceptions.RayError:
                self._died(call)

    def _ended(self, call: _Call, value: Any) -> None:
        worker, assignment = call.worker, call.assignment
        if assignment is None and isinstance(value, str):
            if value != version("singerembed"):
                found = f"singerembed {value}" if value else "no singerembed"
                raise ClusterError(
                    f"the node {worker.slot.address} has {found}, and this machine has {version('singerembed')}. "
                    "Install the same on all of them"
                )
            self._calls[worker.actor.start.remote(self._job, worker.slot.cores)] = _Call(worker, None)
            return
        if assignment is None:
            worker.ready = True
            self._announce(*value)
            return
        worker.finished += 1
        self._idle_deaths = 0
        if not self._scheduler.finished(assignment):
            return
        embedded, counts, rows = value
        self._parts.done.add(assignment.unit.index)
        self.embedded.merge(embedded)
        for listener in self._listeners:
            for position, of_track in zip(assignment.positions, unpack(rows), strict=True):
                listener.embedded(assignment.unit.tracks[position], of_track)
            listener.published(assignment.unit.index, counts)

    def _announce(self, spec: Any, description: str) -> None:
        if self._announced:
            return
        self._announced = True
        nodes = len({slot.node for slot in self._workers})
        where = f"Ray, {len(self._workers)} x ({description}) on {nodes} {'node' if nodes == 1 else 'nodes'}"
        for listener in self._listeners:
            listener.started(spec, where, self._total_tracks)

    def _died(self, call: _Call) -> None:
        worker = call.worker
        if self._workers.get(worker.slot) is worker:
            self._end(worker)
            if not worker.finished:
                self._idle_deaths += 1
        if self._idle_deaths > _IDLE_DEATHS + len(self._workers):
            raise ClusterError(
                f"workers die again and again before they have done anything, the last on {worker.slot.address}. "
                "Ray's logs on that node say more; finished units are safe"
            )
        if call.assignment:
            unit = call.assignment.unit.index + 1
            _log.info("a worker on %s died while embedding unit %d", worker.slot.address, unit)
            self._scheduler.failed(call.assignment)

    def _failure(self, worker: _Worker, cause: BaseException) -> SingerEmbedError:
        """Turn a worker's exception into one that names the node."""
        if isinstance(cause, SingerEmbedError):
            cause.args = (f"{cause} (on the node {worker.slot.address})",)
            return cause
        return ClusterError(f"a worker on the node {worker.slot.address} failed: {type(cause).__name__}: {cause}")
