"""The calls of the CUDA driver that are used, whichever package makes them: cuda_bindings.py or cuda_pycuda.py."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from singerembed.engine.device import DeviceBuffer, PinnedBuffer
from singerembed.errors import EngineError


class DriverError(Exception):
    """A call of the CUDA driver failed; the message names the call and the error."""


def no_driver(exc: Exception) -> EngineError:
    """The error to raise where the driver did not start because of `exc`."""
    reason = str(exc).rstrip(".")
    return EngineError(
        f"the NVIDIA driver does not start: {reason}. What was asked for needs an NVIDIA GPU; nvidia-smi says whether "
        "one is seen here"
    )


class Driver(Protocol):
    """The calls of the CUDA driver that are used. They raise DriverError, and OutOfDeviceMemory for want of memory."""

    name: str  # of the package, with its version

    def device_count(self) -> int: ...

    def device_name(self, index: int) -> str: ...

    def attribute(self, index: int, name: str) -> int:
        """An attribute of a device by its name in the CUDA driver, without the prefix CU_DEVICE_ATTRIBUTE_."""
        ...

    def enter(self, index: int) -> None:
        """Make the primary context of a device current, retaining it if it is not yet."""
        ...

    def leave(self, index: int) -> None:
        """Make the context that was current before `enter` current again."""
        ...

    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free on the current device, and all of them."""
        ...

    def allocate(self, n_bytes: int) -> DeviceBuffer: ...

    def pinned(self, n_bytes: int) -> PinnedBuffer: ...

    def stream(self) -> int:
        """Return the handle of a new stream that is not synchronised with the legacy default stream."""
        ...

    def destroy(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None: ...

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None: ...

    def record(self, stream: int) -> object:
        """Return an event, without a time, after all work enqueued on `stream` so far."""
        ...

    def wait(self, stream: int, event: Any) -> None: ...

    def is_done(self, event: Any) -> bool: ...
