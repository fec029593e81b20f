"""The CUDA device on a fake of pycuda: what is retained is given back, and failures say what to do.

The names that the fake offers were checked against pycuda 2026.1 itself, over a driver library of host memory.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from singerembed.engine import cuda_driver
from singerembed.engine.cuda_driver import CudaDevice, device_count
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.errors import EngineError, MissingDependencyError


class Driver(types.ModuleType):
    """As much of pycuda.driver as is used, noting the calls that must balance."""

    class Error(Exception): ...

    class MemoryError(Error): ...

    class LogicError(Error): ...

    def __init__(self, devices: int = 1, init_error: Exception | None = None) -> None:
        super().__init__("pycuda.driver")
        self.told: list[str] = []
        self.room = 1000
        driver = self

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            @staticmethod
            def count() -> int:
                return devices

            def name(self) -> str:
                return "Fake"

            def compute_capability(self) -> tuple[int, int]:
                return 8, 9

            def retain_primary_context(self) -> Any:
                driver.told.append("retain")
                return types.SimpleNamespace(
                    push=lambda: driver.told.append("push"),
                    pop=lambda: driver.told.append("pop"),
                    detach=lambda: driver.told.append("detach"),
                )

        self.Device = Device
        self._init_error = init_error

    def init(self) -> None:
        if self._init_error:
            raise self._init_error

    def mem_get_info(self) -> tuple[int, int]:
        return self.room, 2000

    def mem_alloc(self, n_bytes: int) -> Any:
        if n_bytes > self.room:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        driver = self

        class Allocation:
            def __int__(self) -> int:
                return 4096

            def free(self) -> None:
                driver.told.append("free")

        return Allocation()

    def pagelocked_empty(self, n_bytes: int, dtype: type) -> Any:
        raise self.MemoryError("cuMemHostAlloc failed: out of memory")


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    package = types.ModuleType("pycuda") if driver else None
    if package is not None:
        package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setattr(cuda_driver, "_retained", {})
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)


def test_the_primary_context_is_made_current_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    use(monkeypatch, driver)
    device = CudaDevice()
    assert (device.name, device.compute_capability) == ("Fake (0)", (8, 9))
    device.allocate(10).free()
    device.close()
    assert driver.told == ["retain", "push", "free", "pop"]


def test_a_second_engine_uses_the_context_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    use(monkeypatch, driver)
    for _ in range(2):
        CudaDevice().close()
    assert driver.told == ["retain", "push", "pop", "push", "pop"]


def test_no_room_is_told_from_other_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Driver())
    device = CudaDevice()
    with pytest.raises(OutOfDeviceMemory, match=r"no 1,001 bytes on Fake \(0\): 1,000 of 2,000 are free"):
        device.allocate(1001)
    with pytest.raises(OutOfDeviceMemory, match="no 16 bytes of page-locked host memory"):
        device.pinned(16)


def test_pinned_memory_is_freed_through_its_owner() -> None:
    freed: list[str] = []

    class Owned(np.ndarray[Any, np.dtype[np.uint8]]):
        def free(self) -> None:
            freed.append("free")

    array = np.zeros(4, np.uint8).view(Owned)
    cuda_driver._PinnedBuffer(array[:]).free()
    assert freed == ["free"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'singerembed\[gpu\]'"):
        device_count()
    use(monkeypatch, Driver(init_error=Driver.LogicError("cuInit failed: no CUDA-capable device is detected")))
    with pytest.raises(EngineError, match="the NVIDIA driver does not start: cuInit failed: no CUDA-capable device"):
        device_count()
    use(monkeypatch, Driver(devices=2))
    assert device_count() == 2
    with pytest.raises(EngineError, match="there is no CUDA device 2; this process sees 2"):
        CudaDevice(2)
