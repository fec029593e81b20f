"""The same units on a Ray cluster: one actor a GPU or a group of cores, fed by this process.

Ray starts and watches processes, and carries units to them; everything else is decided here. Actors are never restarted
by Ray: one that is gone is replaced while its node is there, and what it had in hand goes to another (orders.py). They
belong to this process, and end when it does, however it does.
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

from singerembed.catalog.read import Unit
from singerembed.engine.machine import available_cores
from singerembed.errors import ClusterError, MissingDependencyError, SingerEmbedError
from singerembed.jobs.ray_worker import ClusterJob, unpack
from singerembed.jobs.scheduling import Order, Orders
from singerembed.jobs.track import Stopped
from singerembed.jobs.units import Listener
from singerembed.output.parts import PartStore
from singerembed.output.schema import Counts

LOCAL = "local"  # the address of a cluster to be started here
# The engine goes through it, and hardly anything else.
_OBJECT_STORE_BYTES = 256 << 20
_CORES_A_WORKER = 8  # threads of one process share Python's lock
_ORDERS_A_WORKER = 2  # one is embedded, and the next is there when its last tracks are
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.2
_STAFF_SECONDS = 1.0  # between looks at which nodes there are
_START_SECONDS = 300.0  # after which a worker that does not answer is given up; on a busy cluster the next waits, too
_QUIET_SECONDS = 60.0  # without any worker, after which it is said
_BARREN_DEATHS = 20  # in a row, of workers that have finished nothing: the machines are broken, not the recordings
# Ray counts usage unless told not to; under uv it ships the working folder.
_RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}

_log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """A place for one worker."""

    node: str  # Ray's name of it
    address: str
    number: int  # on its node
    cores: int
    gpus: int


def slots_of(nodes: Sequence[dict[str, Any]], backend: str, threads: int | None) -> list[Slot]:
    """Where workers go, given what `ray.nodes()` says: one a GPU with its share of the node's cores, or one a group of
    cores; nodes without a GPU are of no use to an engine that needs one. `threads`: cores a group, if it was asked for.
    """
    slots = []
    for node in nodes:
        cores, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if not node["Alive"] or (not gpus and backend != "onnxruntime"):
            continue
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
    finished: int = 0  # orders
    orders: list[Order] = field(default_factory=list)

    @property
    def alone(self) -> bool:
        return any(order.alone for order in self.orders)


class _Call(NamedTuple):
    worker: _Worker
    order: Order | None  # None: it is asked for its version, or to start


def embed_on_ray(
    address: str,
    job: ClusterJob,
    work: Iterator[tuple[Unit, Sequence[int]]],
    parts: PartStore,
    total_tracks: int,
    listeners: Sequence[Listener],
    stop: Callable[[], int],
) -> Counts:
    """Embed `work`, units and which of their tracks, on the Ray cluster at `address`. Returns what was embedded.

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
    """Ray, connected to the cluster at `address`, or to the one that this process is connected to already."""
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
    # Ray prints what befalls workers to stdout, whatever the log level; 2.60 has no other switch than its debugger's.
    ray._private.worker._worker_logs_enabled = False
    try:
        _knock(address)
        quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        ray.init(address=address, **quiet, **(local if address == LOCAL else {}))
    except Exception as exc:
        what = "start Ray here" if address == LOCAL else f"reach the Ray cluster at {address}"
        raise ClusterError(f"cannot {what}: {exc}") from exc
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray takes it


def _knock(address: str) -> None:
    """Raise OSError where nobody answers; Ray would try for two minutes, and then end the process."""
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
        work: Iterator[tuple[Unit, Sequence[int]]],
        parts: PartStore,
        total_tracks: int,
        listeners: Sequence[Listener],
    ) -> None:
        self._ray, self._parts, self._listeners = ray, parts, listeners
        self._backend, self._threads = job.engine_file.backend, job.options.workers
        self._job = ray.put(job)
        self._orders = Orders(work)
        self._total_tracks = total_tracks
        self._workers: dict[Slot, _Worker] = {}
        self._calls: dict[Any, _Call] = {}
        self._actor_class = ray.remote(_worker_class())
        self._looked = self._said = 0.0
        self._barren = 0
        self._announced = False
        self.embedded = Counts()

    def go_on(self, stop: Callable[[], int]) -> None:
        """Work until everything is done. Raises Stopped, and what workers raise."""
        while True:
            if stop():
                raise Stopped
            self._staff()
            self._hand_out()
            if self._orders.all_given and not any(worker.orders for worker in self._workers.values()):
                return
            self._collect()

    def dismiss(self) -> None:
        """End all workers; what they have in hand is given up."""
        for worker in list(self._workers.values()):
            self._end(worker)

    # --- workers ----------------------------------------------------------------------------------------------------

    def _staff(self) -> None:
        """Have a worker in each place there is, new nodes included."""
        now = time.monotonic()
        if now - self._looked < _STAFF_SECONDS:
            return
        self._looked = now
        for worker in list(self._workers.values()):
            if not worker.ready and now - worker.created > _START_SECONDS:
                self._end(worker)
        slots = slots_of(self._ray.nodes(), self._backend, self._threads)
        for slot in slots:
            if slot not in self._workers:
                self._start(slot, now)
        if any(worker.ready for worker in self._workers.values()):
            self._said = now
        elif now - (self._said or now) > _QUIET_SECONDS:
            self._said = now
            _log.warning("no worker has started yet: the cluster has places for %d, and none is free", len(slots))
        self._said = self._said or now

    def _start(self, slot: Slot, now: float) -> None:
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(slot.node, soft=False)
        actor = self._actor_class.options(
            num_cpus=slot.cores,
            num_gpus=slot.gpus,
            max_concurrency=_ORDERS_A_WORKER + 1,
            scheduling_strategy=strategy,
        ).remote()
        worker = self._workers[slot] = _Worker(slot, actor, now)
        self._calls[actor.version.remote()] = _Call(worker, None)

    def _end(self, worker: _Worker) -> None:
        if self._workers.get(worker.slot) is worker:
            del self._workers[worker.slot]
        with contextlib.suppress(Exception):  # it is gone, or the connection is
            self._ray.kill(worker.actor)

    # --- orders -----------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give every worker something to do. An order that has to be alone waits for the least busy one to be idle."""
        workers = sorted((w for w in self._workers.values() if w.ready and not w.alone), key=lambda w: len(w.orders))
        reserved = workers[: self._orders.waiting_alone]
        for worker in reserved:
            if not worker.orders and (order := self._orders.next(alone=True)):
                self._give(worker, order)
        for depth in range(1, _ORDERS_A_WORKER + 1):
            for worker in workers[len(reserved) :]:
                if len(worker.orders) < depth and (order := self._orders.next()):
                    self._give(worker, order)

    def _give(self, worker: _Worker, order: Order) -> None:
        worker.orders.append(order)
        # A slice of a table would take along all that it was cut from.
        unit = replace(order.unit, extra=order.unit.extra.take(pa.array(range(len(order.unit.tracks)))))
        if order.trial is None:
            ref = worker.actor.embed.remote(unit, order.positions, order.careful, order.alone)
        else:
            ref = worker.actor.attempt.remote(unit, order.positions[order.trial])
        self._calls[ref] = _Call(worker, order)

    def _collect(self) -> None:
        """Wait for a call to end, and see to all that have."""
        if not self._calls:
            time.sleep(_POLL_SECONDS)
            return
        waiting = list(self._calls)
        done, _ = self._ray.wait(waiting, num_returns=1, timeout=_POLL_SECONDS)
        if done:
            done, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for ref in done:
            call = self._calls.pop(ref)
            if call.order:
                call.worker.orders.remove(call.order)
            try:
                self._ended(call, self._ray.get(ref))
            except self._ray.exceptions.RayTaskError as exc:
                raise self._failure(call.worker, exc.cause) from exc
            except self._ray.exceptions.RayError:
                self._died(call)

    def _ended(self, call: _Call, value: Any) -> None:
        worker, order = call.worker, call.order
        if order is None and isinstance(value, str):
            if value != version("singerembed"):
                found = f"singerembed {value}" if value else "no singerembed"
                raise ClusterError(
                    f"the node {worker.slot.address} has {found}, and this machine has {version('singerembed')}. "
                    "Install the same on all of them"
                )
            self._calls[worker.actor.start.remote(self._job, worker.slot.cores)] = _Call(worker, None)
            return
        if order is None:
            worker.ready = True
            self._announce(*value)
            return
        worker.finished += 1
        self._barren = 0
        if not self._orders.finished(order):
            return
        embedded, counts, rows = value
        self._parts.done.add(order.unit.index)
        self.embedded.merge(embedded)
        for listener in self._listeners:
            for position, of_track in zip(order.positions, unpack(rows), strict=True):
                listener.embedded(order.unit.tracks[position], of_track)
            listener.published(order.unit.index, counts)

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
                self._barren += 1
        if self._barren > _BARREN_DEATHS + len(self._workers):
            raise ClusterError(
                f"workers die again and again before they have done anything, the last on {worker.slot.address}. "
                "Ray's logs on that node say more; finished units are safe"
            )
        if call.order:
            _log.info("a worker on %s died with unit %d in hand", worker.slot.address, call.order.unit.index + 1)
            self._orders.failed(call.order)

    def _failure(self, worker: _Worker, cause: BaseException) -> SingerEmbedError:
        """What a worker's exception is to the person who runs it."""
        if isinstance(cause, SingerEmbedError):
            cause.args = (f"{cause} (on the node {worker.slot.address})",)
            return cause
        return ClusterError(f"a worker on the node {worker.slot.address} failed: {type(cause).__name__}: {cause}")
