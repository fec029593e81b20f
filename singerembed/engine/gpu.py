"""The GPU runtime: callers' crops gathered into batches, and one thread that talks to the device.

Callers copy their crops into a ring of page-locked slots and wait. The device thread uploads a slot, has the levels
measured and read back, and lists the loud crops wherever they lie; full batches of those go through mel and network,
and only embeddings return. Three streams let copy in, computation and copy out overlap. docs/gpu.md has a drawing.

What differs between libraries is behind two protocols, `Device` and `Network`; a fake of both runs this file on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.base import EmbeddedCrops
from singerembed.engine.device import Capture, Device, DeviceBuffer, DeviceMel, Network, OutOfDeviceMemory, PinnedBuffer
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.mel import DEFAULT_SILENCE_DBFS, DEVICE_CROP, DEVICE_LEVEL, LOUD, Pcm
from singerembed.spec import ModelSpec

logger = logging.getLogger(__name__)

_SLOTS = 4  # one that callers fill, one on the bus, two whose crops are being computed or wait for it
_UPLOADS = 2  # in flight, so that the bus never waits for the host
_LANES = 2  # batches in flight, so that the device never waits for the host
_CALLERS_A_BATCH = 4  # what a caller is asked to bring at a time: a batch is gathered from several
_POLL_SECONDS = 0.001  # a batch of 64 takes longer than this on any device


AnyDevice = TypeVar("AnyDevice", bound=Device)


class GpuEngine:
    """An engine on one GPU. See `Engine`."""

    waits = True

    def __init__(
        self,
        spec: ModelSpec,
        open_device: Callable[[], AnyDevice],
        open_network: Callable[[AnyDevice], Network],
        silence_dbfs: float = DEFAULT_SILENCE_DBFS,
    ) -> None:
        """Start the device thread, which opens the device and the network. Returns when both are ready.

        As many crops go to the device at a time as the network takes, halved until they fit into its memory.
        Raises EngineError, or MissingDependencyError, when one of them cannot be opened.
        """
        self.spec = spec
        self.description = ""
        self.batch = 0
        self._ring = _Ring(spec.crop_samples)
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(open_device, open_network, silence_dbfs), name="singerembed-gpu", daemon=True
        )
        self._thread.start()
        self._started.wait()
        if self._ring.failure is not None:
            self._thread.join()
            raise self._ring.failure

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        """See `Engine.embed`. Raises ValueError for another shape or type."""
        if crops.ndim != 2 or crops.shape[1] != self.spec.crop_samples or crops.dtype not in (np.int16, np.float32):
            raise ValueError(
                f"crops must be int16 or float32 [n, {self.spec.crop_samples}], got {crops.dtype} {list(crops.shape)}"
            )
        request = _Request(len(crops), self.spec.embedding_dim)
        self._ring.put(request, crops)
        request.finished.wait()
        if request.failure is not None:
            raise EngineError(str(request.failure)) from request.failure
        return EmbeddedCrops(request.embedding[request.state == LOUD], request.peak, request.rms, request.state)

    def close(self) -> None:
        """Free the device. Callers that still wait get EngineError."""
        self._ring.fail(EngineError("the engine was closed"))
        self._thread.join()

    def _run(
        self, open_device: Callable[[], AnyDevice], open_network: Callable[[AnyDevice], Network], silence_dbfs: float
    ) -> None:
        try:
            with contextlib.ExitStack() as owned:
                device = open_device()
                owned.callback(device.close)
                network = open_network(device)
                owned.callback(network.close)
                worker = _Worker(self.spec, device, network, self._ring, silence_dbfs)
                owned.callback(worker.close)
                self.batch = max(1, worker.batch // _CALLERS_A_BATCH)
                self.description = f"{self.spec.name}, {self.spec.precision}, {network.description} on {device.name}"
                self._started.set()
                self._serve(worker)
        except BaseException as exc:
            self._ring.fail(exc)
        finally:
            self._started.set()

    def _serve(self, worker: _Worker) -> None:
        try:
            while self._ring.failure is None:
                if not worker.step():
                    self._ring.wait(worker.busy)
        except BaseException as exc:
            self._ring.fail(exc)
        finally:
            self._ring.wait_for_writers()  # before their page-locked memory goes


# --- what callers and the device thread share -----------------------------------------------------------------------


class _Request:
    """One call of `embed`. The device thread writes the results and sets `finished`."""

    def __init__(self, n: int, embedding_dim: int) -> None:
        self.embedding = np.empty((n, embedding_dim), np.float32)  # rows of loud crops are written
        self.peak = np.empty(n, np.float32)
        self.rms = np.empty(n, np.float32)
        self.state = np.empty(n, np.uint8)
        self.failure: SingerEmbedError | None = None
        self.finished = threading.Event()
        self._left = n
        self._finish_if_done()

    def crop_done(self) -> None:
        self._left -= 1
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._left == 0:
            self.finished.set()


@dataclass(eq=False)
class _Slot:
    """Room for crops of one sample type, in page-locked memory and on the device."""

    capacity: int  # crops
    pcm: PinnedBuffer
    device_pcm: DeviceBuffer
    levels: NDArray[Any]  # DEVICE_LEVEL [capacity], page-locked
    device_levels: DeviceBuffer
    is_int16: bool = False
    entries: list[tuple[_Request, int]] = field(default_factory=list)  # whose crops lie here, and their rows
    writers: int = 0  # callers that still copy
    waiting: int = 0  # loud crops that are not embedded yet
    uploaded: object = None  # event

    @property
    def sample_type(self) -> np.dtype[Any]:
        return np.dtype(np.int16 if self.is_int16 else np.float32)


class _Ring:
    """Slots between callers and the device thread: free, filling (one a sample type), full, in the device's hands."""

    def __init__(self, crop_samples: int) -> None:
        self._crop_samples = crop_samples
        self._changed = threading.Condition()
        self._slots: list[_Slot] = []
        self._free: list[_Slot] = []
        self._filling: dict[bool, _Slot] = {}  # by is_int16
        self._full: deque[_Slot] = deque()
        self._requests: set[_Request] = set()  # that may still need to be failed
        self.failure: SingerEmbedError | None = None

    # callers

    def put(self, request: _Request, crops: Pcm) -> None:
        """Copy `crops` into slots, waiting for room. After a failure `request` is failed, not raised from here."""
        with self._changed:
            self._requests = {known for known in self._requests if not known.finished.is_set()} | {request}
            if self.failure is not None:
                _fail(request, self.failure)
        first = 0
        while first < len(crops):
            reserved = self._reserve(request, crops.dtype == np.int16, first, len(crops) - first)
            if reserved is None:
                return
            slot, at, count = reserved
            try:
                room = slot.pcm.array.view(slot.sample_type)[
                    at * self._crop_samples : (at + count) * self._crop_samples
                ]
                room.reshape(count, self._crop_samples)[:] = crops[first : first + count]
            finally:
                with self._changed:
                    slot.writers -= 1
                    self._changed.notify_all()
            first += count

    def _reserve(self, request: _Request, is_int16: bool, first: int, wanted: int) -> tuple[_Slot, int, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or is_int16 in self._filling or self._free)
            if self.failure is not None:
                return None
            if is_int16 not in self._filling:
                self._filling[is_int16] = self._free.pop()
                self._filling[is_int16].is_int16 = is_int16
            slot = self._filling[is_int16]
            at = len(slot.entries)
            count = min(wanted, slot.capacity - at)
            slot.entries += [(request, row) for row in range(first, first + count)]
            slot.writers += 1
            if len(slot.entries) == slot.capacity:
                self._full.append(self._filling.pop(is_int16))
            return slot, at, count

    # the device thread

    def add(self, slot: _Slot) -> None:
        """Give a slot to the ring."""
        self._slots.append(slot)
        self._free.append(slot)

    def take(self, partial: bool) -> _Slot | None:
        """The next slot to upload, if all who write to it have finished; with `partial` also one that is not full."""
        with self._changed:
            for slot in self._full:
                if slot.writers == 0:
                    self._full.remove(slot)
                    return slot
            for is_int16, slot in self._filling.items() if partial else ():
                if slot.writers == 0:
                    return self._filling.pop(is_int16)
            return None

    def recycle(self, slot: _Slot) -> None:
        """Take back a slot whose crops are all done."""
        with self._changed:
            slot.entries = []
            self._free.append(slot)
            self._changed.notify_all()

    def wait(self, busy: bool) -> None:
        """Wait for crops; when the device is `busy`, no longer than its progress may be left alone."""
        with self._changed:
            if busy:
                self._changed.wait(_POLL_SECONDS)
            else:
                self._changed.wait_for(
                    lambda: (
                        self.failure is not None
                        or any(slot.writers == 0 for slot in (*self._full, *self._filling.values()))
                    )
                )

    def fail(self, exc: BaseException) -> None:
        """Fail all requests, now and from now on. The first failure counts."""
        with self._changed:
            if self.failure is None:
                self.failure = _as_singerembed_error(exc)
            for request in self._requests:
                _fail(request, self.failure)
            self._requests.clear()
            self._changed.notify_all()

    def wait_for_writers(self) -> None:
        """Return when no caller copies any more; after a failure none begins to."""
        with self._changed:
            self._changed.wait_for(lambda: all(slot.writers == 0 for slot in self._slots))


def _fail(request: _Request, failure: SingerEmbedError) -> None:
    if not request.finished.is_set():
        request.failure = failure
        request.finished.set()


def _as_singerembed_error(exc: BaseException) -> SingerEmbedError:
    if isinstance(exc, SingerEmbedError):
        return exc
    error = EngineError(f"the GPU failed: {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error


# --- the device thread ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Lane:
    """Buffers of one batch in flight. Their addresses never change, so that a graph may be replayed."""

    crops: NDArray[Any]  # DEVICE_CROP [batch], page-locked
    device_crops: DeviceBuffer
    scratch: DeviceBuffer
    log_mel: DeviceBuffer
    device_embedding: DeviceBuffer
    embedding: NDArray[np.float32]  # [batch, embedding_dim], page-locked
    batch: list[tuple[_Slot, int]] = field(default_factory=list)  # slot and place of each crop
    downloaded: object = None  # event
    graph: Capture | None = None  # of a full batch


class _Worker:
    """Moves crops through the device. `step` never waits."""

    def __init__(self, spec: ModelSpec, device: Device, network: Network, ring: _Ring, silence_dbfs: float) -> None:
        self._spec, self._device, self._network, self._ring = spec, device, network, ring
        self._owned = contextlib.ExitStack()
        self.batch = network.max_batch
        self._lanes: list[_Lane] = []
        self._uploads: deque[_Slot] = deque()
        self._pending: deque[tuple[_Slot, int]] = deque()  # loud crops on the device
        self._computing: deque[_Lane] = deque()
        try:
            self._up, self._compute, self._down = device.stream(), device.stream(), device.stream()
            self._mel: DeviceMel | None = device.mel(spec, silence_dbfs)
            self._lanes = self._allocate()
        except BaseException:
            self.close()
            raise
        self._idle_lanes = list(self._lanes)
        self._capture_graphs = network.capturable

    @property
    def busy(self) -> bool:
        """Whether the device has something in hand."""
        return bool(self._uploads or self._pending or self._computing)

    def close(self) -> None:
        """Free what was allocated, in the thread that did it."""
        with contextlib.suppress(Exception):  # of a device that is lost, which has been reported
            self._device.synchronize()
        # Graphs, events and kernels go here and now: with their last reference they would go in any thread.
        for lane in self._lanes:
            lane.graph = lane.downloaded = None
        for slot in self._uploads:
            slot.uploaded = None
        self._mel = None
        self._owned.close()

    def step(self) -> bool:
        """Do what can be done without waiting; say whether anything was."""
        done = [self._finish_uploads(), self._finish_batches(), self._start_uploads(), self._start_batch()]
        return any(done)

    # memory

    def _allocate(self) -> list[_Lane]:
        """Make the slots and lanes, for batches half as large as long as there is no room."""
        while True:
            try:
                self._network.prepare(self.batch)
                slots = [self._new_slot() for _ in range(_SLOTS)]
                lanes = [self._new_lane() for _ in range(_LANES)]
            except OutOfDeviceMemory as exc:
                self._owned.close()
                self._halve(exc)
            else:
                for slot in slots:
                    self._ring.add(slot)
                return lanes

    def _halve(self, exc: OutOfDeviceMemory) -> None:
        if self.batch == 1:
            raise EngineError(f"{self._device.name} has too little free memory for even one crop: {exc}") from exc
        self.batch //= 2
        logger.warning("%s: out of memory, going on with batches of %d crops", self._device.name, self.batch)

    def _device_buffer(self, n_bytes: int) -> DeviceBuffer:
        buffer = self._device.allocate(n_bytes)
        self._owned.callback(buffer.free)
        return buffer

    def _pinned_buffer(self, n_bytes: int) -> PinnedBuffer:
        buffer = self._device.pinned(n_bytes)
        self._owned.callback(buffer.free)
        return buffer

    def _new_slot(self) -> _Slot:
        n_bytes = self.batch * self._spec.crop_samples * np.dtype(np.float32).itemsize
        levels_bytes = self.batch * DEVICE_LEVEL.itemsize
        return _Slot(
            self.batch,
            self._pinned_buffer(n_bytes),
            self._device_buffer(n_bytes),
            self._pinned_buffer(levels_bytes).array.view(DEVICE_LEVEL),
            self._device_buffer(levels_bytes),
        )

    def _new_lane(self) -> _Lane:
        spec, mel = self._spec, self._kernels()
        value_bytes = 2 if self._network.half_input else 4
        embedding_bytes = self.batch * spec.embedding_dim * 4
        crops_bytes = self.batch * DEVICE_CROP.itemsize
        return _Lane(
            self._pinned_buffer(crops_bytes).array.view(DEVICE_CROP),
            self._device_buffer(crops_bytes),
            self._device_buffer(mel.scratch_bytes(self.batch)),
            self._device_buffer(self.batch * spec.n_mels * spec.n_frames * value_bytes),
            self._device_buffer(embedding_bytes),
            self._pinned_buffer(embedding_bytes).array.view(np.float32).reshape(self.batch, spec.embedding_dim),
        )

    def _kernels(self) -> DeviceMel:
        if self._mel is None:
            raise EngineError("the engine was closed")
        return self._mel

    # copy in, levels

    def _start_uploads(self) -> bool:
        started = False
        while len(self._uploads) < _UPLOADS:
            # A slot that is not full goes only when the device would run dry: slots are few.
            runs_dry = not self._uploads and len(self._pending) < self.batch and bool(self._idle_lanes)
            slot = self._ring.take(partial=runs_dry)
            if slot is None:
                break
            self._upload(slot)
            started = True
        return started

    def _upload(self, slot: _Slot) -> None:
        n = len(slot.entries)
        n_bytes = n * self._spec.crop_samples * slot.sample_type.itemsize
        self._device.upload(slot.device_pcm.address, slot.pcm.array[:n_bytes], self._up)
        self._kernels().level(
            slot.device_pcm.address,
            is_int16=slot.is_int16,
            crops=n,
            levels=slot.device_levels.address,
            stream=self._up,
        )
        self._device.download(slot.levels[:n], slot.device_levels.address, self._up)
        slot.uploaded = self._device.record(self._up)
        self._uploads.append(slot)

    def _finish_uploads(self) -> bool:
        finished = False
        while self._uploads and self._device.is_done(self._uploads[0].uploaded):
            self._sort_out(self._uploads.popleft())
            finished = True
        return finished

    def _sort_out(self, slot: _Slot) -> None:
        """Report the levels of a slot's crops; the loud ones go on."""
        slot.uploaded = None
        levels = slot.levels[: len(slot.entries)]
        loud = levels["state"] == LOUD
        slot.waiting = int(loud.sum())
        for place, ((request, row), level) in enumerate(zip(slot.entries, levels.tolist(), strict=True)):
            request.peak[row], request.rms[row], _, request.state[row] = level
            if loud[place]:
                self._pending.append((slot, place))
            else:
                request.crop_done()
        if slot.waiting == 0:
            self._ring.recycle(slot)

    # mel, network, copy out

    def _start_batch(self) -> bool:
        full = len(self._pending) >= self.batch
        runs_dry = not self._uploads and not self._computing
        if not self._idle_lanes or not (full or (self._pending and runs_dry)):
            return False
        lane = self._idle_lanes.pop()
        lane.batch = [self._pending.popleft() for _ in range(min(self.batch, len(self._pending)))]
        try:
            self._launch(lane)
        except OutOfDeviceMemory as exc:
            self._pending.extendleft(reversed(lane.batch))
            self._idle_lanes.append(lane)
            self._shrink(exc)
        return True

    def _shrink(self, exc: OutOfDeviceMemory) -> None:
        while self._computing:  # what the network has in hand still needs its memory
            if not self._finish_batches():
                time.sleep(_POLL_SECONDS)
        self._halve(exc)
        for lane in self._lanes:
            lane.graph = None
        try:
            self._network.prepare(self.batch)
        except OutOfDeviceMemory as again:
            self._shrink(again)

    def _launch(self, lane: _Lane) -> None:
        n = len(lane.batch)
        self._describe(lane)
        if n == self.batch and lane.graph is not None:
            lane.graph.launch(self._compute)
        else:
            self._enqueue(lane, n)
            if n == self.batch and self._capture_graphs:  # after a first run, in which libraries set themselves up
                lane.graph = self._capture(lane)
        self._device.wait(self._down, self._device.record(self._compute))
        self._device.download(lane.embedding[:n], lane.device_embedding.address, self._down)
        lane.downloaded = self._device.record(self._down)
        self._computing.append(lane)

    def _describe(self, lane: _Lane) -> None:
        n = self._spec.crop_samples
        lane.crops[: len(lane.batch)] = [
            (
                slot.device_pcm.address + place * n * slot.sample_type.itemsize,
                slot.levels["scale"][place],
                slot.is_int16,
            )
            for slot, place in lane.batch
        ]

    def _enqueue(self, lane: _Lane, n: int) -> None:
        self._device.upload(lane.device_crops.address, lane.crops[:n], self._compute)
        self._kernels().mel(
            lane.device_crops.address,
            crops=n,
            scratch=lane.scratch.address,
            out=lane.log_mel.address,
            stream=self._compute,
            half=self._network.half_input,
        )
        self._network.enqueue(n, lane.log_mel.address, lane.device_embedding.address, self._compute)

    def _capture(self, lane: _Lane) -> Capture | None:
        graph = self._device.capture(self._compute)
        try:
            self._enqueue(lane, self.batch)
            graph.finish()
        except Exception as exc:  # graphs only save launches; a device that is lost fails the next call as well
            graph.abandon()
            self._capture_graphs = False
            logger.warning("%s: going on without CUDA graphs: %s", self._device.name, exc)
            return None
        return graph

    def _finish_batches(self) -> bool:
        finished = False
        while self._computing and self._device.is_done(self._computing[0].downloaded):
            lane = self._computing.popleft()
            for (slot, place), embedding in zip(lane.batch, lane.embedding, strict=False):
                request, row = slot.entries[place]
                request.embedding[row] = embedding
                request.crop_done()
                slot.waiting -= 1
                if slot.waiting == 0:
                    self._ring.recycle(slot)
            lane.batch, lane.downloaded = [], None
            self._idle_lanes.append(lane)
            finished = True
        return finished
