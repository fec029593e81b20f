"""The CUDA driver through pycuda. See `Driver`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.cuda_calls import DriverError, no_driver
from singerembed.engine.device import DeviceBuffer, OutOfDeviceMemory, PinnedBuffer
from singerembed.errors import EngineError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class PycudaDriver:
    """See `Driver`."""

    def __init__(self) -> None:
        """Raises EngineError without a driver."""
        try:
            from pycuda import driver
        except ImportError as exc:
            raise EngineError(f"pycuda does not load: {exc}. Is the NVIDIA driver (libcuda.so.1) installed?") from exc
        self._driver: Any = driver
        try:
            driver.init()
        except driver.Error as exc:
            raise no_driver(exc) from exc
        self.name = f"pycuda {version('pycuda')}"
        self._contexts: dict[int, Any] = {}  # never detached
        self._streams: dict[int, Any] = {}

    def device_count(self) -> int:
        """See `Driver`."""
        return int(self._driver.Device.count())

    def device_name(self, index: int) -> str:
        """See `Driver`."""
        return str(self._driver.Device(index).name())

    def attribute(self, index: int, name: str) -> int:
        """See `Driver`."""
        return int(self._driver.Device(index).get_attribute(getattr(self._driver.device_attribute, name)))

    def enter(self, index: int) -> None:
        """See `Driver`."""
        with self._errors():
            if index not in self._contexts:
                self._contexts[index] = self._driver.Device(index).retain_primary_context()
            self._contexts[index].push()

    def leave(self, index: int) -> None:
        """See `Driver`."""
        with self._errors():
            self._contexts[index].pop()

    def free_memory(self) -> tuple[int, int]:
        """See `Driver`."""
        with self._errors():
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, n_bytes: int) -> DeviceBuffer:
        """See `Driver`."""
        with self._errors():
            return _DeviceBuffer(self._driver.mem_alloc(n_bytes))

    def pinned(self, n_bytes: int) -> PinnedBuffer:
        """See `Driver`."""
        with self._errors():
            return _PinnedBuffer(self._driver.pagelocked_empty(n_bytes, np.uint8))

    def stream(self) -> int:
        """See `Driver`."""
        with self._errors():
            stream = self._driver.Stream(_NON_BLOCKING)
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def destroy(self, stream: int) -> None:
        """See `Driver`."""
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        """See `Driver`."""
        with self._errors():
            self._streams[stream].synchronize()

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None:
        """See `Driver`."""
        with self._errors():
            self._driver.memcpy_htod_async(destination, source, self._streams[stream])

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None:
        """See `Driver`."""
        with self._errors():
            self._driver.memcpy_dtoh_async(destination, source, self._streams[stream])

    def record(self, stream: int) -> object:
        """See `Driver`."""
        with self._errors():
            return self._driver.Event(self._driver.event_flags.DISABLE_TIMING).record(self._streams[stream])

    def wait(self, stream: int, event: Any) -> None:
        """See `Driver`."""
        with self._errors():
            self._streams[stream].wait_for_event(event)

    def is_done(self, event: Any) -> bool:
        """See `Driver`."""
        with self._errors():
            return bool(event.query())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._driver.MemoryError as exc:
            raise OutOfDeviceMemory(str(exc)) from exc
        except self._driver.Error as exc:
            raise DriverError(str(exc)) from exc


class _DeviceBuffer:
    def __init__(self, allocation: Any) -> None:
        self._allocation = allocation
        self.address = int(allocation)

    def free(self) -> None:
        self._allocation.free()


class _PinnedBuffer:
    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array

    def free(self) -> None:
        allocation: Any = self.array.base  # pycuda's; the garbage collector might free it in another thread
        allocation.free()
