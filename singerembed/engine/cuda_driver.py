"""A CUDA device: context, streams, events, device and page-locked memory, through one of two packages.

`cuda-bindings` is NVIDIA's, and comes as a wheel; pycuda is compiled when it is installed, and is used where it is.

The context is the device's primary context, which the CUDA runtime in the mel extension, TensorRT and ONNX Runtime
use. Handles of another context would be invalid in those libraries (NVIDIA/TensorRT issues 930, 1133 and 4335,
inducer/pycuda issue 242). It is current only in the thread that opened the device, and retained until the process ends:
those libraries keep state in it, which would be gone with the last reference, and pycuda's `detach` leaves a context
current that it has popped.
"""

from __future__ import annotations

import importlib.util
import threading
from functools import cache

from singerembed import _csrc
from singerembed.engine.cuda_calls import Driver, DriverError
from singerembed.engine.device import Capture, DeviceBuffer, DeviceMel, OutOfDeviceMemory, PinnedBuffer, VoiceMix
from singerembed.errors import EngineError, MissingDependencyError
from singerembed.model.mel import cuda_mel
from singerembed.model.spec import ModelSpec

_loading = threading.Lock()


def load_driver() -> Driver:
    """Return the CUDA driver, initialised, through pycuda if that is installed, else through cuda-bindings.

    Raises MissingDependencyError, or EngineError without a driver.
    """
    with _loading:
        return _load()


def driver_package() -> str | None:
    """The package through which the driver is called; None if neither is installed."""
    if _is_there("pycuda.driver"):
        return "pycuda"
    return "cuda-bindings" if _is_there("cuda.bindings.driver") else None


@cache
def _load() -> Driver:
    package = driver_package()
    if package == "pycuda":
        from singerembed.engine.cuda_pycuda import PycudaDriver

        return PycudaDriver()
    if package is not None:
        from singerembed.engine.cuda_bindings import BindingsDriver

        return BindingsDriver()
    raise MissingDependencyError("the GPU path", "cuda-bindings", "gpu")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def device_count() -> int:
    """Return the number of CUDA devices visible to this process. Raises as `load_driver`."""
    return load_driver().device_count()


class CudaDevice:
    """See `Device`. Open, use and close it in one thread."""

    def __init__(self, index: int = 0) -> None:
        """Make the primary context of device `index` current. Raises EngineError or MissingDependencyError."""
        driver = self._driver = load_driver()
        count = driver.device_count()
        if not 0 <= index < count:
            raise EngineError(f"there is no CUDA device {index}; this process sees {count}")
        self.index = index
        major, minor = (driver.attribute(index, f"COMPUTE_CAPABILITY_{which}") for which in ("MAJOR", "MINOR"))
        self.compute_capability = (major, minor)
        self.name = f"{driver.device_name(index)} ({index})"
        self._streams: list[int] = []
        try:
            driver.enter(index)
        except (DriverError, OutOfDeviceMemory) as exc:
            raise EngineError(
                f"cannot create a context on {self.name}: {exc}. Is it in use, or in another compute mode?"
            ) from exc
        self.upload, self.download = driver.upload, driver.download
        self.record, self.wait, self.is_done = driver.record, driver.wait, driver.is_done

    def close(self) -> None:
        """Leave the context. Buffers must have been freed before."""
        for stream in self._streams:
            self._driver.destroy(stream)
        self._streams.clear()
        self._driver.leave(self.index)

    def attribute(self, name: str) -> int:
        """An attribute of the device, see `Driver.attribute`."""
        return self._driver.attribute(self.index, name)

    def allocate(self, n_bytes: int) -> DeviceBuffer:
        """See `Device.allocate`."""
        try:
            return self._driver.allocate(n_bytes)
        except OutOfDeviceMemory as exc:
            free, total = self._driver.free_memory()
            raise OutOfDeviceMemory(f"no {n_bytes:,} bytes on {self.name}: {free:,} of {total:,} are free") from exc

    def pinned(self, n_bytes: int) -> PinnedBuffer:
        """See `Device.pinned`."""
        try:
            return self._driver.pinned(n_bytes)
        except OutOfDeviceMemory as exc:
            raise OutOfDeviceMemory(f"no {n_bytes:,} bytes of page-locked host memory") from exc

    def stream(self) -> int:
        """See `Device.stream`."""
        self._streams.append(self._driver.stream())
        return self._streams[-1]

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        for stream in self._streams:
            self._driver.synchronize(stream)

    def capture(self, stream: int) -> Capture:
        """See `Device.capture`."""
        return _csrc.CapturedGraph(stream)

    def mel(self, spec: ModelSpec, silence_dbfs: float) -> DeviceMel:
        """See `Device.mel`."""
        return cuda_mel(spec, silence_dbfs)

    def mix_voice(self, mix: VoiceMix, stream: int) -> None:
        """See `Device.mix_voice`."""
        _csrc.mix_voice(**vars(mix), stream=stream)
