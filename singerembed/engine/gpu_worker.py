"""The work of the device thread: upload slots, read levels back, run mel kernels and network, return embeddings.

Batches are gathered from the loud crops of several slots, through a list of their addresses, so that most batches are
full. Three streams let copy in, computation and copy out overlap.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.device import Capture, Device, DeviceBuffer, DeviceMel, Network, OutOfDeviceMemory, PinnedBuffer
from singerembed.engine.ring import POLL_SECONDS, Ring, Slot
from singerembed.errors import EngineError
from singerembed.model.mel import DEVICE_CROP, DEVICE_LEVEL, LOUD
from singerembed.model.spec import ModelSpec

logger = logging.getLogger(__name__)

SLOTS = 4  # one being filled, one being uploaded, two whose crops are being computed or are pending
_UPLOADS = 2  # in flight, so that the copy engine never waits for the host
_LANES = 2  # batches in flight, so that the device never waits for the host


@dataclass(eq=False)
class Lane:
    """Buffers of one batch in flight. Their addresses are fixed, so that a CUDA graph can be replayed."""

    index: int
    crops: NDArray[Any]  # DEVICE_CROP [batch], page-locked
    device_crops: DeviceBuffer
    scratch: DeviceBuffer
    log_mel: DeviceBuffer
    device_embedding: DeviceBuffer
    embedding: NDArray[np.float32]  # [batch, embedding_dim], page-locked
    batch: list[tuple[Slot, int]] = field(default_factory=list)  # slot and index of each crop
    downloaded: object = None  # event
    graphs: dict[int, Capture] = field(default_factory=dict)  # by the size of the batch


def batch_sizes(largest: int) -> list[int]:
    """The sizes that batches are filled up to, ascending: few, so that each has a graph of its own."""
    return sorted({max(1, largest // 4), max(1, largest // 2), largest})


class Worker:
    """Runs crops through the device. `step` never blocks."""

    def __init__(self, spec: ModelSpec, device: Device, network: Network, ring: Ring, silence_dbfs: float) -> None:
        self._spec, self._device, self._network, self._ring = spec, device, network, ring
        self._owned = contextlib.ExitStack()
        self.batch = network.max_batch
        self._lanes: list[Lane] = []
        self._uploads: deque[Slot] = deque()
        self._pending: deque[tuple[Slot, int]] = deque()  # loud crops on the device
        self._computing: deque[Lane] = deque()
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
        """Whether uploads, pending crops or batches are left."""
        return bool(self._uploads or self._pending or self._computing)

    def close(self) -> None:
        """Free all buffers. Call it in the thread that allocated them."""
        with contextlib.suppress(Exception):  # a lost device, which has been reported
            self._device.synchronize()
        # Graphs, events and kernels are released here, because their last reference might go in another thread.
        for lane in self._lanes:
            lane.graphs, lane.downloaded = {}, None
        for slot in self._uploads:
            slot.uploaded = None
        self._mel = None
        self._owned.close()

    def step(self) -> bool:
        """Do all work that needs no waiting. Return whether there was any."""
        done = [self._finish_uploads(), self._finish_batches(), self._start_uploads(), self._start_batch()]
        return any(done)

    # --- memory ---

    def _allocate(self) -> list[Lane]:
        """Allocate slots and lanes, halving the batch until they fit."""
        while True:
            try:
                self._network.prepare(_LANES, batch_sizes(self.batch))
                slots = [self._new_slot() for _ in range(SLOTS)]
                lanes = [self._new_lane(index) for index in range(_LANES)]
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

    def _new_slot(self) -> Slot:
        n_bytes = self.batch * self._spec.crop_samples * np.dtype(np.float32).itemsize
        levels_bytes = self.batch * DEVICE_LEVEL.itemsize
        return Slot(
            self.batch,
            self._pinned_buffer(n_bytes),
            self._device_buffer(n_bytes),
            self._pinned_buffer(levels_bytes).array.view(DEVICE_LEVEL),
            self._device_buffer(levels_bytes),
        )

    def _new_lane(self, index: int) -> Lane:
        spec, mel = self._spec, self._kernels()
        value_bytes = 2 if self._network.half_input else 4
        embedding_bytes = self.batch * spec.embedding_dim * 4
        crops_bytes = self.batch * DEVICE_CROP.itemsize
        return Lane(
            index,
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

    # --- copy in, levels ---

    def _start_uploads(self) -> bool:
        started = False
        while len(self._uploads) < _UPLOADS:
            # Upload a slot that is not full only if the device would be idle: there are few slots.
            starved = not self._uploads and len(self._pending) < self.batch and bool(self._idle_lanes)
            slot = self._ring.take(partial=starved)
            if slot is None:
                break
            self._upload(slot)
            started = True
        return started

    def _upload(self, slot: Slot) -> None:
        n = len(slot.entries)
        if slot.pcm is not None:
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
            self._dispatch_levels(self._uploads.popleft())
            finished = True
        return finished

    def _dispatch_levels(self, slot: Slot) -> None:
        """Write the levels of a slot's crops into their requests, and queue the loud ones."""
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

    # --- mel, network, copy out ---

    def _start_batch(self) -> bool:
        full = len(self._pending) >= self.batch
        starved = not self._uploads and not self._computing
        if not self._idle_lanes or not (full or (self._pending and starved)):
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
        while self._computing:  # batches in flight still use the network's memory
            if not self._finish_batches():
                time.sleep(POLL_SECONDS)
        self._halve(exc)
        for lane in self._lanes:
            lane.graphs = {}
        try:
            self._network.prepare(_LANES, batch_sizes(self.batch))
        except OutOfDeviceMemory as again:
            self._shrink(again)

    def _launch(self, lane: Lane) -> None:
        n = len(lane.batch)
        size = next(size for size in batch_sizes(self.batch) if size >= n)
        self._fill_crop_records(lane, size)
        if size in lane.graphs:
            lane.graphs[size].launch(self._compute)
        else:
            self._enqueue(lane, size)
            if self._capture_graphs:  # after a first run, in which libraries initialise
                self._capture(lane, size)
        self._device.wait(self._down, self._device.record(self._compute))
        self._device.download(lane.embedding[:n], lane.device_embedding.address, self._down)
        lane.downloaded = self._device.record(self._down)
        self._computing.append(lane)

    def _fill_crop_records(self, lane: Lane, size: int) -> None:
        """List the batch's crops; the last one is listed again until there are `size`."""
        n = self._spec.crop_samples
        lane.crops[: len(lane.batch)] = [
            (
                slot.device_pcm.address + place * n * slot.sample_type.itemsize,
                slot.levels["scale"][place],
                slot.is_int16,
            )
            for slot, place in lane.batch
        ]
        lane.crops[len(lane.batch) : size] = lane.crops[len(lane.batch) - 1]

    def _enqueue(self, lane: Lane, n: int) -> None:
        self._device.upload(lane.device_crops.address, lane.crops[:n], self._compute)
        self._kernels().mel(
            lane.device_crops.address,
            crops=n,
            scratch=lane.scratch.address,
            out=lane.log_mel.address,
            stream=self._compute,
            half=self._network.half_input,
        )
        self._network.enqueue(lane.index, n, lane.log_mel.address, lane.device_embedding.address, self._compute)

    def _capture(self, lane: Lane, size: int) -> None:
        graph: Capture | None = None
        try:
            graph = self._device.capture(self._compute)
            self._enqueue(lane, size)
            graph.finish()
        except Exception as exc:  # graphs only save launch overhead; a lost device fails the next call too
            if graph is not None:
                graph.abandon()
            self._capture_graphs = False
            logger.warning("%s: going on without CUDA graphs: %s", self._device.name, exc)
        else:
            lane.graphs[size] = graph

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
