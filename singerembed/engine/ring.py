"""What callers and the device thread share: requests, and the ring of page-locked slots that crops wait in."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.device import DeviceBuffer, PinnedBuffer
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.model.mel import Pcm

POLL_SECONDS = 0.001  # a batch of 64 takes longer than this on any device


class Request:
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
        """Count one crop as done; after the last the caller goes on."""
        self._left -= 1
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._left == 0:
            self.finished.set()


@dataclass(eq=False)
class Slot:
    """Room for crops of one sample type, in page-locked memory and on the device."""

    capacity: int  # crops
    pcm: PinnedBuffer
    device_pcm: DeviceBuffer
    levels: NDArray[Any]  # DEVICE_LEVEL [capacity], page-locked
    device_levels: DeviceBuffer
    is_int16: bool = False
    entries: list[tuple[Request, int]] = field(default_factory=list)  # whose crops lie here, and their rows
    writers: int = 0  # callers that still copy
    waiting: int = 0  # loud crops that are not embedded yet
    uploaded: object = None  # event

    @property
    def sample_type(self) -> np.dtype[Any]:
        return np.dtype(np.int16 if self.is_int16 else np.float32)


class Ring:
    """Slots between callers and the device thread: free, filling (one a sample type), full, in the device's hands."""

    def __init__(self, crop_samples: int) -> None:
        self._crop_samples = crop_samples
        self._changed = threading.Condition()
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._filling: dict[bool, Slot] = {}  # by is_int16
        self._full: deque[Slot] = deque()
        self._requests: set[Request] = set()  # that may still need to be failed
        self.failure: SingerEmbedError | None = None

    # callers

    def put(self, request: Request, crops: Pcm) -> None:
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

    # the device thread

    def add(self, slot: Slot) -> None:
        """Give a slot to the ring."""
        self._slots.append(slot)
        self._free.append(slot)

    def take(self, partial: bool) -> Slot | None:
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

    def recycle(self, slot: Slot) -> None:
        """Take back a slot whose crops are all done."""
        with self._changed:
            slot.entries = []
            self._free.append(slot)
            self._changed.notify_all()

    def wait(self, busy: bool) -> None:
        """Wait for crops; when the device is `busy`, no longer than its progress may be left alone."""
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


def _fail(request: Request, failure: SingerEmbedError) -> None:
    if not request.finished.is_set():
        request.failure = failure
        request.finished.set()


def _as_singerembed_error(exc: BaseException) -> SingerEmbedError:
    if isinstance(exc, SingerEmbedError):
        return exc
    error = EngineError(f"the GPU failed: {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error
