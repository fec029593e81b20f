"""A GPU of host memory: streams that really run late and in any order that events allow, and the emulated kernels."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from singerembed import _csrc
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.model.mel import emulated_mel
from singerembed.model.spec import ModelSpec

FREED = 0x5A  # fills memory that was given back, so that late readers find nonsense


@dataclass
class Event:
    done: bool = False


@dataclass
class Buffer:
    """Memory of the fake device, or page-locked."""

    device: FakeDevice
    array: NDArray[np.uint8]
    freed: bool = False

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def free(self) -> None:
        assert not self.freed, "freed twice"
        self.freed = True
        self.array[:] = FREED
        self.device.used -= self.array.nbytes


@dataclass
class FakeDevice:
    """See `Device`. Nothing happens when it is enqueued: work is done when events are asked for, streams at random."""

    seed: int = 0
    memory: int = 1 << 62  # bytes, page-locked ones included
    name: str = "fake GPU"
    fail_after: int | None = None  # operations, then the device is lost
    used: int = 0
    operations: int = 0
    closed: bool = False
    buffers: list[Buffer] = field(default_factory=list)
    replays: int = 0
    overlaps: int = 0  # operations that ran while another stream had work too

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._streams: dict[int, deque[Callable[[], bool]]] = {}
        self._recording: dict[int, list[Callable[[], bool]]] = {}

    def allocate(self, n_bytes: int) -> Buffer:
        if self.used + n_bytes > self.memory:
            raise OutOfDeviceMemory(f"{n_bytes} bytes")
        self.used += n_bytes
        buffer = Buffer(self, np.full(n_bytes, FREED, np.uint8))
        self.buffers.append(buffer)
        return buffer

    pinned = allocate

    def stream(self) -> int:
        self._streams[len(self._streams) + 1] = deque()
        return len(self._streams)

    def enqueue(self, stream: int, operation: Callable[[], object]) -> None:
        """Have `stream` do `operation` some time."""

        def run() -> bool:
            self.operations += 1
            if self.fail_after is not None and self.operations > self.fail_after:
                raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: unspecified launch failure")
            operation()
            return True

        self._append(stream, run)

    def _append(self, stream: int, run: Callable[[], bool]) -> None:
        (self._recording[stream] if stream in self._recording else self._streams[stream]).append(run)

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None:
        self.enqueue(stream, lambda: ctypes.memmove(destination, source.ctypes.data, source.nbytes))

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None:
        self.enqueue(stream, lambda: ctypes.memmove(destination.ctypes.data, source, destination.nbytes))

    def record(self, stream: int) -> Event:
        event = Event()
        self.enqueue(stream, lambda: setattr(event, "done", True))
        return event

    def wait(self, stream: int, event: object) -> None:
        assert isinstance(event, Event)
        self._append(stream, lambda: event.done)

    def is_done(self, event: object) -> bool:
        assert isinstance(event, Event)
        for _ in range(self._random.randrange(4)):
            self._advance()
        return event.done

    def synchronize(self) -> None:
        while any(self._streams.values()):
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
        self._recording[stream] = []
        return Graph(self, stream)

    def mel(self, spec: ModelSpec, silence_dbfs: float) -> FakeMel:
        return FakeMel(self, emulated_mel(spec, silence_dbfs))

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
        self.recorded = self.device._recording.pop(self.stream)

    def abandon(self) -> None:
        self.device._recording.pop(self.stream, None)

    def launch(self, stream: int) -> None:
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
        if self.model is not None:
            self._session = onnxruntime.InferenceSession(self.model, providers=["CPUExecutionProvider"])

    def prepare(self, batch: int) -> None:
        if batch > self.largest:
            raise OutOfDeviceMemory(f"batch {batch}")

    def enqueue(self, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        if batch > self.largest:
            raise OutOfDeviceMemory(f"batch {batch}")
        self.batches.append(batch)

        def run() -> None:
            shape = (batch, self.spec.n_mels, self.spec.n_frames)
            mel = view(log_mel, shape, np.dtype(np.float16 if self.half_input else np.float32))
            view(embedding, (batch, self.spec.embedding_dim), np.dtype(np.float32))[:] = self.embed(mel)

        self.device.enqueue(stream, run)

    def embed(self, mel: NDArray[Any]) -> NDArray[np.float32]:
        if self.model is not None:
            return np.concatenate([self._session.run(None, {"log_mel": one[np.newaxis]})[0] for one in mel])
        return fake_embedding(mel, self.spec.embedding_dim)

    def close(self) -> None:
        assert not self.device.closed
        self.closed = True


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
