"""A CUDA device through pycuda: context, streams, events, device and page-locked memory.

The context is the device's primary context, which the CUDA runtime in the mel extension, TensorRT and ONNX Runtime
use. Handles of another context would be invalid in those libraries (NVIDIA/TensorRT issues 930, 1133 and 4335,
inducer/pycuda issue 242). It is current only in the thread that opened the device, and retained until the process ends:
those libraries keep state in it, which would be gone with the last reference, and pycuda's `detach` leaves a context
current that it has popped.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed import _csrc
from singerembed.engine.device import Capture, DeviceBuffer, DeviceMel, OutOfDeviceMemory, PinnedBuffer
from singerembed.errors import EngineError, MissingDependencyError
from singerembed.model.mel import cuda_mel
from singerembed.model.spec import ModelSpec

_retained: dict[int, Any] = {}  # pycuda's context of each device, never detached
_retaining = threading.Lock()

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit synchronisation with the legacy default stream


def load_driver() -> Any:
    """Return pycuda's driver module, initialised. Raises MissingDependencyError, or EngineError without a driver."""
    try:
        from pycuda import driver
    except ImportError as exc:
        if exc.name is not None and exc.name.startswith("pycuda"):
            raise MissingDependencyError("the GPU path", "pycuda", "gpu") from exc
        raise EngineError(f"pycuda does not load: {exc}. Is the NVIDIA driver (libcuda.so.1) installed?") from exc
    try:
        driver.init()
    except driver.Error as exc:
        raise EngineError(f"the NVIDIA driver does not start: {exc}. nvidia-smi says more") from exc
    return driver


def device_count() -> int:
    """Return the number of CUDA devices visible to this process. Raises as `load_driver`."""
    return int(load_driver().Device.count())


class CudaDevice:
    """See `Device`. Open, use and close it in one thread."""

    def __init__(self, index: int = 0) -> None:
        """Retain the primary context of device `index`. Raises EngineError or MissingDependencyError."""
        self._driver = load_driver()
        count = self._driver.Device.count()
        if not 0 <= index < count:
            raise EngineError(f"there is no CUDA device {index}; this process sees {count}")
        device = self._driver.Device(index)
        self.index = index
        self.compute_capability: tuple[int, int] = device.compute_capability()
        self.name = f"{device.name()} ({index})"
        try:
            with _retaining:
                self._context = _retained.get(index) or _retained.setdefault(index, device.retain_primary_context())
        except self._driver.Error as exc:
            raise EngineError(
                f"cannot create a context on {self.name}: {exc}. Is it in use, or in another compute mode?"
            ) from exc
        self._context.push()
        self._streams: dict[int, Any] = {}

    def close(self) -> None:
        """Leave the context. Buffers must have been freed before."""
        self._streams.clear()  # while the context that they belong to is current
        self._context.pop()

    def allocate(self, n_bytes: int) -> DeviceBuffer:
        """See `Device.allocate`."""
        try:
            return _DeviceBuffer(self._driver.mem_alloc(n_bytes))
        except self._driver.MemoryError as exc:
            free, total = self._driver.mem_get_info()
            raise OutOfDeviceMemory(f"no {n_bytes:,} bytes on {self.name}: {free:,} of {total:,} are free") from exc

    def pinned(self, n_bytes: int) -> PinnedBuffer:
        """See `Device.pinned`."""
        try:
            return _PinnedBuffer(self._driver.pagelocked_empty(n_bytes, np.uint8))
        except self._driver.MemoryError as exc:
            raise OutOfDeviceMemory(f"no {n_bytes:,} bytes of page-locked host memory") from exc

    def stream(self) -> int:
        """See `Device.stream`."""
        stream = self._driver.Stream(_NON_BLOCKING)
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def as_stream(self, stream: int) -> Any:
        """Return pycuda's object for a stream handle of this device."""
        return self._streams[stream]

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None:
        """See `Device.upload`."""
        self._driver.memcpy_htod_async(destination, source, self.as_stream(stream))

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None:
        """See `Device.download`."""
        self._driver.memcpy_dtoh_async(destination, source, self.as_stream(stream))

    def record(self, stream: int) -> object:
        """See `Device.record`."""
        return self._driver.Event(self._driver.event_flags.DISABLE_TIMING).record(self.as_stream(stream))

    def wait(self, stream: int, event: object) -> None:
        """See `Device.wait`."""
        self.as_stream(stream).wait_for_event(event)

    def is_done(self, event: Any) -> bool:
        """See `Device.is_done`."""
        return bool(event.query())

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        for stream in self._streams.values():
            stream.synchronize()

    def capture(self, stream: int) -> Capture:
        """See `Device.capture`."""
        return _csrc.CapturedGraph(stream)

    def mel(self, spec: ModelSpec, silence_dbfs: float) -> DeviceMel:
        """See `Device.mel`."""
        return cuda_mel(spec, silence_dbfs)


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
