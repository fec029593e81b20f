"""The queue between callers and the device thread: requests, and a ring buffer of page-locked slots for crops."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.device import DeviceBuffer, PinnedBuffer
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.model.mel import Pcm

POLL_SECONDS = 0.001  # a batch of 64 takes longer than this on any device


class Request:
    """One call of `embed`. The device thread fills in the results and sets `finished`."""

    def __init__(self, n: int, embedding_dim: int) -> None:
        self.embedding = np.empty((n, embedding_dim), np.float32)  # only rows of loud crops are written
        self.peak = np.empty(n, np.float32)
        self.rms = np.empty(n, np.float32)
        self.state = np.empty(n, np.uint8)
        self.failure: SingerEmbedError | None = None
        self.finished = threading.Event()
        self._left = n
        self._finish_if_done()

    def crop_done(self) -> None:
        """Count one crop as done; the last one sets `finished`."""
        self._left -= 1
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._left == 0:
            self.finished.set()


@dataclass(eq=False)
class Slot:
    """A buffer for crops of one sample type, in page-locked memory and on the device, or on the device alone."""

    capacity: int  # crops
    pcm: PinnedBuffer | None  # None: one crop, which something else has put on the device
    device_pcm: DeviceBuffer
    levels: NDArray[Any]  # DEVICE_LEVEL [capacity], page-locked
    device_levels: DeviceBuffer
    is_int16: bool = False
    entries: list[tuple[Request, int]] = field(default_factory=list)  # request of each crop, and the crop's row in it
    writers: int = 0  # callers that are copying into it
    waiting: int = 0  # loud crops that are not embedded yet
    uploaded: object = None  # event
    release: Callable[[], None] = lambda: None  # called when such a slot is free again

    @property
    def sample_type(self) -> np.dtype[Any]:
        return np.dtype(np.int16 if self.is_int16 else np.float32)


class Ring:
    """The slots, each free, filling (at most one per sample type), full, or with the device thread. Thread-safe."""

    def __init__(self, crop_samples: int) -> None:
        self._crop_samples = crop_samples
        self._changed = threading.Condition()
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._filling: dict[bool, Slot] = {}  # by is_int16
        self._full: deque[Slot] = deque()
        self._on_device: set[Slot] = set()  # those without `pcm`, from `put_on_device` until they are released
        self._requests: set[Request] = set()  # unfinished; `fail` fails them
        self.failure: SingerEmbedError | None = None

    # --- called by callers of `embed` ---

    def put(self, request: Request, crops: Pcm) -> None:
        """Copy `crops` into slots, waiting for free ones. After a failure, set `request.failure` instead of raising."""
        with self._changed:
            self._add(request)
        first = 0
        while first < len(crops):
            reserved = self._reserve(request, crops.dtype == np.int16, first, len(crops) - first)
            if reserved is None:
                return
            slot, at, count = reserved
            assert slot.pcm is not None
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

    def put_on_device(self, request: Request, slot: Slot) -> None:
        """Queue a slot whose one crop, float32, is on the device. It is released when the device is done with it."""
        with self._changed:
            self._add(request)
            queued = self.failure is None
            if queued:
                slot.entries = [(request, 0)]
                self._on_device.add(slot)
                self._full.append(slot)
                self._changed.notify_all()
        if not queued:
            slot.release()

    def _add(self, request: Request) -> None:
        self._requests = {known for known in self._requests if not known.finished.is_set()} | {request}
        if self.failure is not None:
            _fail(request, self.failure)

    def _reserve(self, request: Request, is_int16: bool, first: int, wanted: int) -> tuple[Slot, int, int] | None:
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

    # --- called by the device thread ---

    def add(self, slot: Slot) -> None:
        """Add a free slot."""
        self._slots.append(slot)
        self._free.append(slot)

    def take(self, partial: bool) -> Slot | None:
        """Return the next full slot, or with `partial` a filling one, that no caller is writing to; else None."""
        with self._changed:
            for slot in self._full:
                if slot.writers == 0:
                    self._full.remove(slot)
                    return slot
            for is_int16, slot in self._filling.items() if partial else ():
                if slot.writers == 0:
                    return self._filling.pop(is_int16)
            return None

    def recycle(self, slot: Slot) -> None:
        """Mark a slot as free, when all its crops are done."""
        with self._changed:
            slot.entries = []
            if slot.pcm is not None:
                self._free.append(slot)
                self._changed.notify_all()
                return
            self._on_device.remove(slot)
        slot.release()

    def wait(self, busy: bool) -> None:
        """Wait for a slot to upload, or a failure; while the device is `busy`, at most POLL_SECONDS."""
        with self._changed:
            if busy:
                self._changed.wait(POLL_SECONDS)
            else:
                self._changed.wait_for(
                    lambda: (
                        self.failure is not None
                        or any(slot.writers == 0 for slot in (*self._full, *self._filling.values()))
                    )
                )

    def fail(self, exc: BaseException) -> None:
        """Fail all unfinished and all later requests. Only the first failure is kept."""
        with self._changed:
            if self.failure is None:
                self.failure = as_singerembed_error(exc)
            for request in self._requests:
                _fail(request, self.failure)
            self._requests.clear()
            self._changed.notify_all()

    def release_on_device(self) -> None:
        """Release the slots without page-locked memory that are left after a failure. The device must be idle."""
        with self._changed:
            slots, self._on_device = self._on_device, set()
        for slot in slots:
            slot.release()

    def wait_for_writers(self) -> None:
        """Wait until no caller is copying. After a failure no new copy starts."""
        with self._changed:
            self._changed.wait_for(lambda: all(slot.writers == 0 for slot in self._slots))


def _fail(request: Request, failure: SingerEmbedError) -> None:
    if not request.finished.is_set():
        request.failure = failure
        request.finished.set()


def as_singerembed_error(exc: BaseException) -> SingerEmbedError:
    """Return `exc`, or an EngineError that it caused: a failure of the device thread, for those who wait for it."""
    if isinstance(exc, SingerEmbedError):
        return exc
    error = EngineError(f"the GPU failed: {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error
