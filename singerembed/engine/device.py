"""What the GPU runtime asks of a device and of the encoder on it; a fake of both runs the runtime on a CPU."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from singerembed.model.spec import ModelSpec


class OutOfDeviceMemory(Exception):
    """The device has no room for a buffer or a batch; a smaller one may fit."""


class DeviceBuffer(Protocol):
    """Device memory, freed by its owner."""

    @property
    def address(self) -> int: ...

    def free(self) -> None: ...


class PinnedBuffer(Protocol):
    """Page-locked host memory, freed by its owner."""

    @property
    def array(self) -> NDArray[np.uint8]: ...

    def free(self) -> None: ...


class DeviceMel(Protocol):
    """The mel kernels, as csrc/mel_device.h says. Addresses are the device's; the calls only enqueue."""

    def scratch_bytes(self, crops: int) -> int: ...

    def level(self, pcm: int, *, is_int16: bool, crops: int, levels: int, stream: int) -> None: ...

    def mel(self, list: int, *, crops: int, scratch: int, out: int, stream: int, half: bool) -> None: ...


class Capture(Protocol):
    """A recording of what a stream is told, to be replayed."""

    def finish(self) -> None: ...

    def abandon(self) -> None: ...

    def launch(self, stream: int) -> None: ...


class Device(Protocol):
    """What the runtime asks of a GPU. All calls come from the thread that opened it; copies are asynchronous.

    Calls raise OutOfDeviceMemory, or whatever the library below raises: either ends up as EngineError in the callers.
    """

    name: str

    def allocate(self, n_bytes: int) -> DeviceBuffer: ...

    def pinned(self, n_bytes: int) -> PinnedBuffer: ...

    def stream(self) -> int: ...

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None: ...

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None: ...

    def record(self, stream: int) -> object:
        """An event after all that `stream` was told so far."""
        ...

    def wait(self, stream: int, event: object) -> None:
        """Have `stream` wait for `event`."""
        ...

    def is_done(self, event: object) -> bool: ...

    def synchronize(self) -> None:
        """Wait for all streams."""
        ...

    def capture(self, stream: int) -> Capture: ...

    def mel(self, spec: ModelSpec, silence_dbfs: float) -> DeviceMel: ...

    def close(self) -> None: ...


class Network(Protocol):
    """The encoder on the device."""

    description: str
    max_batch: int  # crops
    half_input: bool  # takes log-mel as FP16, else FP32
    capturable: bool  # `enqueue` may be recorded in a graph

    def prepare(self, batch: int) -> None:
        """Make ready for batches up to `batch`. Raises OutOfDeviceMemory."""
        ...

    def enqueue(self, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        """Map [batch, n_mels, n_frames] at `log_mel` to float32 [batch, embedding_dim] at `embedding`."""
        ...

    def close(self) -> None: ...
