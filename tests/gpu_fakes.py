"""A GPU of host memory: streams that really run late and in any order that events allow, and the emulated kernels.

What CUDA and TensorRT leave undefined or refuse, by their documentation, raises `Undefined` here, and is noted.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from singerembed import _csrc
from singerembed.engine.device import OutOfDeviceMemory, VoiceMix
from singerembed.model.mel import emulated_mel
from singerembed.model.spec import ModelSpec

FREED = 0x5A  # fills memory that was given back, so that late readers find nonsense


class Undefined(Exception):
    """Something was done that CUDA or TensorRT leave undefined, or refuse."""


class Lost(RuntimeError):
    """The device is gone, as after an illegal address: every call fails from then on."""


@dataclass
class Event:
    done: bool = False
    captured: bool = False  # recorded while its stream was captured: it has no state to ask for


@dataclass
class Buffer:
    """Memory of the fake device, or page-locked."""

    device: FakeDevice
    array: NDArray[np.uint8]
    pinned: bool
    freed: bool = False

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def free(self) -> None:
        self.device.require(not self.freed, "memory is freed twice")
        self.device.require(not self.device.capturing, "memory is freed while a stream is captured")
        self.freed = True
        self.array[:] = FREED
        self.device.used -= self.array.nbytes

    def holds(self, address: int, n_bytes: int) -> bool:
        return self.address <= address and address + n_bytes <= self.address + self.array.nbytes


@dataclass
class FakeDevice:
    """See `Device`. Nothing happens when it is enqueued: work is done when events are asked for, streams at random.

    It keeps the state that decides whether a call is allowed, and notes in `undefined` what is not.
    """

    seed: int = 0
    memory: int = 1 << 62  # bytes, page-locked ones included
    name: str = "fake GPU"
    index: int = 0
    fail_after: int | None = None  # operations, then the device is lost
    lost_at_call: int | None = None  # of the calls to it
    no_memory_at: frozenset[int] = frozenset()  # of the allocations
    used: int = 0
    operations: int = 0
    calls: int = 0
    allocations: int = 0
    closed: bool = False
    buffers: list[Buffer] = field(default_factory=list)
    undefined: list[str] = field(default_factory=list)
    replays: int = 0
    overlaps: int = 0  # operations that ran while another stream had work too

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._streams: dict[int, deque[Callable[[], bool]]] = {}
        self._recording: dict[int, list[Callable[[], bool]]] = {}
        self._thread: int | None = None

    # --- rules ---

    @property
    def capturing(self) -> bool:
        return bool(self._recording)

    @property
    def idle(self) -> bool:
        return not any(self._streams.values())

    def works_for(self, owner: object) -> bool:
        """Whether something that `owner` has enqueued, or a graph of it, has not been done yet."""
        return any(getattr(run, "owner", None) is owner for queue in self._streams.values() for run in queue)

    def require(self, allowed: bool, otherwise: str) -> None:
        if not allowed:
            self.undefined.append(otherwise)
            raise Undefined(otherwise)

    def _called(self) -> None:
        self._thread = self._thread or threading.get_ident()
        self.require(self._thread == threading.get_ident(), "the device is used in a thread that did not open it")
        self.require(not self.closed, "the device is used after it was closed")
        self.calls += 1
        if self.lost_at_call is not None and self.calls > self.lost_at_call:
            raise Lost("CUDA_ERROR_ILLEGAL_ADDRESS: unspecified launch failure")

    def check_memory(self, address: int, n_bytes: int, *, pinned: bool) -> None:
        """Raise Undefined unless these bytes lie in one buffer of the kind, which is still allocated."""
        kind = "page-locked" if pinned else "device"
        found = [buffer for buffer in self.buffers if buffer.pinned == pinned and buffer.holds(address, n_bytes)]
        self.require(any(not buffer.freed for buffer in found), f"{n_bytes} bytes are not in {kind} memory")

    # --- memory, streams, events ---

    def allocate(self, n_bytes: int, *, pinned: bool = False) -> Buffer:
        self._called()
        self.require(n_bytes > 0, "an allocation of no bytes")
        self.require(not self.capturing, "memory is allocated while a stream is captured")
        self.allocations += 1
        if self.used + n_bytes > self.memory or self.allocations in self.no_memory_at:
            raise OutOfDeviceMemory(f"{n_bytes} bytes")
        self.used += n_bytes
        buffer = Buffer(self, np.full(n_bytes, FREED, np.uint8), pinned)
        self.buffers.append(buffer)
        return buffer

    def pinned(self, n_bytes: int) -> Buffer:
        return self.allocate(n_bytes, pinned=True)

    def stream(self) -> int:
        self._called()
        self._streams[len(self._streams) + 1] = deque()
        return len(self._streams)

    def enqueue(self, stream: int, operation: Callable[[], object], owner: object = None) -> None:
        """Have `stream` do `operation` some time."""
        self._called()

        def run() -> bool:
            self.operations += 1
            if self.fail_after is not None and self.operations > self.fail_after:
                raise Lost("CUDA_ERROR_ILLEGAL_ADDRESS: unspecified launch failure")
            operation()
            return True

        run.owner = owner  # type: ignore[attr-defined]
        self._append(stream, run)

    def _append(self, stream: int, run: Callable[[], bool]) -> None:
        (self._recording[stream] if stream in self._recording else self._streams[stream]).append(run)

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None:
        self._copy(destination, source.ctypes.data, source.nbytes, stream, up=True)

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None:
        self._copy(destination.ctypes.data, source, destination.nbytes, stream, up=False)

    def _copy(self, destination: int, source: int, n_bytes: int, stream: int, *, up: bool) -> None:
        def copy() -> None:  # when it is run, as memory may have been freed meanwhile
            self.check_memory(source, n_bytes, pinned=up)
            self.check_memory(destination, n_bytes, pinned=not up)
            ctypes.memmove(destination, source, n_bytes)

        self.check_memory(source, n_bytes, pinned=up)
        self.check_memory(destination, n_bytes, pinned=not up)
        self.enqueue(stream, copy)

    def record(self, stream: int) -> Event:
        event = Event(captured=stream in self._recording)
        self.enqueue(stream, lambda: setattr(event, "done", True))
        return event

    def wait(self, stream: int, event: object) -> None:
        assert isinstance(event, Event)
        self._called()
        self.require(event.captured == (stream in self._recording), "a captured stream waits for one that is not")
        self._append(stream, lambda: event.done)

    def is_done(self, event: object) -> bool:
        assert isinstance(event, Event)
        self._called()
        self.require(not event.captured, "a captured event is asked whether it is done")
        for _ in range(self._random.randrange(4)):
            self._advance()
        return event.done

    def synchronize(self) -> None:
        self._called()
        self.require(not self.capturing, "the host waits while a stream is captured")
        while not self.idle:
            self._advance()

    def _advance(self) -> None:
        ready = [queue for queue in self._streams.values() if queue]
        if not ready:
            return
        self.overlaps += len(ready) > 1
        queue = self._random.choice(ready)
        if queue[0]():
            queue.popleft()

    def capture(self, stream: int) -> Graph:
        self._called()
        self.require(stream not in self._recording, "a stream is captured twice")
        self._recording[stream] = []
        return Graph(self, stream)

    def mel(self, spec: ModelSpec, silence_dbfs: float) -> FakeMel:
        self._called()
        return FakeMel(self, emulated_mel(spec, silence_dbfs))

    def mix_voice(self, mix: VoiceMix, stream: int) -> None:
        def run() -> None:
            for address, n in (
                (mix.voice, mix.channels * mix.stride),
                (mix.mono, mix.crop_samples),
                (mix.energies, -(-mix.crop_samples // mix.segment)),
            ):
                self.check_memory(address, 4 * n, pinned=False)
            _csrc.emulate_mix_voice(**vars(mix), order=self._random.randrange(4))

        self.enqueue(stream, run)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass
class Graph:
    """See `Capture`."""

    device: FakeDevice
    stream: int
    recorded: list[Callable[[], bool]] = field(default_factory=list)

    def finish(self) -> None:
        self.device._called()
        self.recorded = self.device._recording.pop(self.stream)

    def abandon(self) -> None:
        self.device._recording.pop(self.stream, None)

    def launch(self, stream: int) -> None:
        self.device._called()
        self.device.require(bool(self.recorded), "a graph is launched that was not captured to its end")
        self.device.replays += 1
        for run in self.recorded:
            self.device._append(stream, run)


@dataclass
class FakeMel:
    """The emulated kernels, on the fake's streams."""

    device: FakeDevice
    kernels: _csrc.EmulatedMel

    def scratch_bytes(self, crops: int) -> int:
        return self.kernels.scratch_bytes(crops)

    def level(self, pcm: int, *, is_int16: bool, crops: int, levels: int, stream: int) -> None:
        self.device.enqueue(
            stream, lambda: self.kernels.level(pcm, is_int16=is_int16, crops=crops, levels=levels, stream=0)
        )

    def mel(self, list: int, *, crops: int, scratch: int, out: int, stream: int, half: bool) -> None:
        self.device.enqueue(
            stream, lambda: self.kernels.mel(list, crops=crops, scratch=scratch, out=out, stream=0, half=half)
        )


@dataclass
class Context:
    """An execution context: one shape for good, and at most one graph captured from it."""

    batch: int
    captured: bool = False
    destroyed: bool = False


@dataclass
class FakeNetwork:
    """See `Network`: an ONNX model on the CPU, or sums of mel bands where there is none."""

    device: FakeDevice
    spec: ModelSpec
    model: bytes | None = None
    half_input: bool = False
    max_batch: int = 4
    capturable: bool = True
    largest: int = 1 << 30  # batch that its memory takes
    description: str = "fake network"
    batches: list[int] = field(default_factory=list)  # as they were enqueued; a replay adds none
    closed: bool = False

    def __post_init__(self) -> None:
        self._contexts: dict[tuple[int, int], Context] = {}
        self._memory: Buffer | None = None
        if self.model is not None:
            self._session = onnxruntime.InferenceSession(self.model, providers=["CPUExecutionProvider"])

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        self.device.require(not self.device.works_for(self), "the network is prepared while it computes")
        for context in self._contexts.values():
            context.destroyed = True
        self._contexts = {}
        if self._memory is not None:
            self._memory.free()
            self._memory = None
        if max(batches) > self.largest:
            raise OutOfDeviceMemory(f"batch {max(batches)}")
        self._memory = self.device.allocate(64)
        self._contexts = {(lane, batch): Context(batch) for lane in range(lanes) for batch in batches}

    def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        self.device.require((lane, batch) in self._contexts, f"a batch of {batch} was not prepared in lane {lane}")
        if batch > self.largest:
            raise OutOfDeviceMemory(f"batch {batch}")
        context = self._contexts[lane, batch]
        if self.device.capturing:
            self.device.require(not context.captured, "two graphs are captured from one context")
            context.captured = True
        self.batches.append(batch)
        shape, dtype = (batch, self.spec.n_mels, self.spec.n_frames), np.float16 if self.half_input else np.float32
        memory = self._memory

        def run() -> None:
            self.device.require(not context.destroyed, "a graph is launched whose context is gone")
            assert memory is not None
            self.device.require(not memory.freed, "the network's memory was freed")
            mel = view(log_mel, shape, np.dtype(dtype))
            view(embedding, (batch, self.spec.embedding_dim), np.dtype(np.float32))[:] = self.embed(mel)

        self.device.enqueue(stream, run, owner=self)

    def embed(self, mel: NDArray[Any]) -> NDArray[np.float32]:
        if self.model is not None:
            return np.concatenate([self._session.run(None, {"log_mel": one[np.newaxis]})[0] for one in mel])
        return fake_embedding(mel, self.spec.embedding_dim)

    def close(self) -> None:
        assert not self.device.closed
        self.closed = True
        if self._memory is not None:
            self._memory.free()
            self._memory = None


def fake_embedding(mel: NDArray[Any], dim: int) -> NDArray[np.float32]:
    """An embedding that tells crops apart: the sums of the spectrogram's bands, repeated."""
    sums = mel.astype(np.float32).sum(axis=2)
    return np.tile(sums, (1, -(-dim // sums.shape[1])))[:, :dim]


def view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array at an address."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    memory: Any = (ctypes.c_char * n_bytes).from_address(address)
    array: NDArray[Any] = np.frombuffer(memory, dtype).reshape(shape)
    return array
