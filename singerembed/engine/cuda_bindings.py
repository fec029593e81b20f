"""The CUDA driver through NVIDIA's cuda-bindings. See `Driver`."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.cuda_calls import DriverError, no_driver
from singerembed.engine.device import DeviceBuffer, OutOfDeviceMemory, PinnedBuffer


class BindingsDriver:
    """See `Driver`."""

    def __init__(self) -> None:
        """Raises EngineError without a driver."""
        from cuda.bindings import driver  # type: ignore[import-untyped, import-not-found, unused-ignore]

        self._cuda: Any = driver
        self.name = f"cuda-bindings {version('cuda-bindings')}"
        try:
            self._call("cuInit", 0)
        except (RuntimeError, DriverError) as exc:  # RuntimeError: libcuda.so.1 is not there
            raise no_driver(exc) from exc
        self._contexts: dict[int, Any] = {}  # never released

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver, which returns an error and its results; return the result."""
        error, *results = getattr(self._cuda, name)(*arguments)
        codes = self._cuda.CUresult
        if error == codes.CUDA_SUCCESS:
            return results[0] if len(results) == 1 else tuple(results)
        message = f"{name} failed: {codes(error).name}"
        if error == codes.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfDeviceMemory(message)
        raise DriverError(message)

    def device_count(self) -> int:
        """See `Driver`."""
        return int(self._call("cuDeviceGetCount"))

    def device_name(self, index: int) -> str:
        """See `Driver`."""
        name: bytes = self._call("cuDeviceGetName", 256, self._call("cuDeviceGet", index))
        return name.split(b"\0", 1)[0].decode(errors="replace")

    def attribute(self, index: int, name: str) -> int:
        """See `Driver`."""
        which = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", which, self._call("cuDeviceGet", index)))

    def enter(self, index: int) -> None:
        """See `Driver`."""
        if index not in self._contexts:
            self._contexts[index] = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", index))
        self._call("cuCtxPushCurrent", self._contexts[index])

    def leave(self, index: int) -> None:
        """See `Driver`."""
        self._call("cuCtxPopCurrent")

    def free_memory(self) -> tuple[int, int]:
        """See `Driver`."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, n_bytes: int) -> DeviceBuffer:
        """See `Driver`."""
        return _DeviceBuffer(self, int(self._call("cuMemAlloc", n_bytes)))

    def pinned(self, n_bytes: int) -> PinnedBuffer:
        """See `Driver`."""
        return _PinnedBuffer(self, int(self._call("cuMemHostAlloc", n_bytes, 0)), n_bytes)

    def stream(self) -> int:
        """See `Driver`."""
        return int(self._call("cuStreamCreate", self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value))

    def destroy(self, stream: int) -> None:
        """See `Driver`."""
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """See `Driver`."""
        self._call("cuStreamSynchronize", stream)

    def upload(self, destination: int, source: NDArray[Any], stream: int) -> None:
        """See `Driver`."""
        self._call("cuMemcpyHtoDAsync", destination, source.ctypes.data, source.nbytes, stream)

    def download(self, destination: NDArray[Any], source: int, stream: int) -> None:
        """See `Driver`."""
        self._call("cuMemcpyDtoHAsync", destination.ctypes.data, source, destination.nbytes, stream)

    def record(self, stream: int) -> object:
        """See `Driver`."""
        event = _Event(self, self._call("cuEventCreate", self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING.value))
        self._call("cuEventRecord", event.handle, stream)
        return event

    def wait(self, stream: int, event: Any) -> None:
        """See `Driver`."""
        self._call("cuStreamWaitEvent", stream, event.handle, 0)

    def is_done(self, event: Any) -> bool:
        """See `Driver`."""
        (error,) = self._cuda.cuEventQuery(event.handle)
        codes = self._cuda.CUresult
        if error not in {codes.CUDA_SUCCESS, codes.CUDA_ERROR_NOT_READY}:
            raise DriverError(f"cuEventQuery failed: {codes(error).name}")
        return bool(error == codes.CUDA_SUCCESS)


class _Event:
    """An event, destroyed with its last reference; the driver lets what waits for it go on."""

    def __init__(self, driver: BindingsDriver, handle: Any) -> None:
        self._driver, self.handle = driver, handle

    def __del__(self) -> None:
        self._driver._cuda.cuEventDestroy(self.handle)


class _DeviceBuffer:
    def __init__(self, driver: BindingsDriver, address: int) -> None:
        self._driver, self.address = driver, address

    def free(self) -> None:
        self._driver._call("cuMemFree", self.address)


class _PinnedBuffer:
    def __init__(self, driver: BindingsDriver, address: int, n_bytes: int) -> None:
        self._driver, self._address = driver, address
        memory: Any = (ctypes.c_uint8 * n_bytes).from_address(address)
        self.array: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)

    def free(self) -> None:
        self._driver._call("cuMemFreeHost", self._address)
