"""The interfaces of a GPU and of the encoder on it, as the GPU runtime uses them. Tests run it on fakes of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from singerembed.model.spec import ModelSpec


class OutOfDeviceMemory(Exception):
    """The device has too little memory for a buffer or a batch; a smaller one may fit."""


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
    """The mel kernels, see csrc/mel_device.h. Addresses are device addresses; the calls are asynchronous."""

    def scratch_bytes(self, crops: int) -> int: ...

    def level(self, pcm: int, *, is_int16: bool, crops: int, levels: int, stream: int) -> None: ...

    def mel(self, list: int, *, crops: int, scratch: int, out: int, stream: int, half: bool) -> None: ...


@dataclass(frozen=True, kw_only=True)
class VoiceMix:
    """A crop of a voice on the device to mix down to mono: VoiceJob in csrc/mel_device.h, with device addresses."""

    voice: int
    channels: int
    stride: int
    first: int
    samples: int
    crop_samples: int
    segment: int
    mono: int
    energies: int


class Capture(Protocol):
    """A CUDA graph being captured from a stream, then launched."""

    def finish(self) -> None: ...

    def abandon(self) -> None: ...

    def launch(self, stream: int) -> None: ...


class Device(Protocol):
    """A GPU. All calls must come from the thread that opened it; copies are asynchronous.

    Calls raise OutOfDeviceMemory, or whatever the library below raises; the caller of `embed` gets an EngineError.
    """

    name: str
    index: int

    def allocate(self, n_bytes: int) -> DeviceBuffer: ...

    def pinned(self, n_bytes: int) -> PinnedBuffer: ...

    def stream(self) -> int: ...

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None: ...

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None: ...

    def record(self, stream: int) -> object:
        """Return an event after all work enqueued on `stream` so far."""
        ...

    def wait(self, stream: int, event: object) -> None:
        """Make `stream` wait for `event`; the calling thread does not."""
        ...

    def is_done(self, event: object) -> bool: ...

    def synchronize(self) -> None:
        """Block until all streams are idle."""
        ...

    def capture(self, stream: int) -> Capture: ...

    def mel(self, spec: ModelSpec, silence_dbfs: float) -> DeviceMel: ...

    def mix_voice(self, mix: VoiceMix, stream: int) -> None: ...

    def close(self) -> None: ...


class Network(Protocol):
    """The encoder on the device."""

    description: str
    max_batch: int  # crops
    half_input: bool  # log-mel input is FP16, else FP32
    capturable: bool  # `enqueue` may be captured in a CUDA graph

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        """Make ready for batches of these sizes in `lanes` lanes, and for no others. Raises OutOfDeviceMemory.

        Nothing that was enqueued may be running, and graphs that were captured before are void.
        """
        ...

    def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        """Enqueue inference from [batch, n_mels, n_frames] at `log_mel` to float32 [batch, embedding_dim]."""
        ...

    def close(self) -> None: ...
