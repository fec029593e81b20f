"""The CUDA device through either package: what is taken is given back, and failures say what to do.

cuda-bindings itself runs on a driver library of host memory (fake_libcuda.c). pycuda is compiled against a toolkit, and
is faked: the names that the fake offers were checked against pycuda 2026.1, over such a library too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from singerembed.engine import cuda_driver, cuda_pycuda
from singerembed.engine.cuda_driver import CudaDevice, device_count
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.errors import EngineError, MissingDependencyError

# What both do, in a process of its own: the driver is loaded once a process.
CONTRACT = """
import numpy as np
from singerembed.engine.cuda_driver import CudaDevice, device_count, load_driver
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.errors import EngineError

assert load_driver().name.startswith(NAME), load_driver().name
assert device_count() == 2
for _ in range(2):  # a second engine in one process
    device = CudaDevice(1)
    assert (device.name, device.compute_capability) == ("Fake (1)", (8, 9))
    assert device.attribute("MULTIPROCESSOR_COUNT") == 16
    up, down = device.stream(), device.stream()
    assert up != down
    buffer, pinned = device.allocate(400), device.pinned(400)
    pinned.array[:] = np.arange(400) % 251
    device.upload(buffer.address, pinned.array, up)
    event = device.record(up)
    device.wait(down, event)
    assert not device.is_done(event)
    assert device.is_done(event)
    received = np.zeros(400, np.uint8)
    device.download(received, buffer.address, down)
    device.synchronize()
    assert (received == pinned.array).all()
    for ask, message in ((device.allocate, "1,048,576 of 2,097,152 are free"), (device.pinned, "page-locked")):
        try:
            ask(1 << 21)
        except OutOfDeviceMemory as exc:
            assert message in str(exc), exc
        else:
            raise AssertionError("no error")
    del event
    buffer.free()
    pinned.free()
    device.close()
try:
    CudaDevice(2)
except EngineError as exc:
    assert "there is no CUDA device 2; this process sees 2" in str(exc)
print("all of it")
"""


@pytest.fixture(autouse=True)
def own_driver() -> Iterator[None]:
    """Forget the driver that a test has loaded."""
    yield
    cuda_driver._load.cache_clear()


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose CUDA driver is of host memory."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("libcuda")
    source = Path(__file__).parent / "fake_libcuda.c"
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def contract(package: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = f"NAME = {package!r}\n{CONTRACT}"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("package", "module"), [("cuda-bindings", "cuda.bindings"), ("pycuda", "pycuda")])
def test_a_device_through_the_package_itself(package: str, module: str, fake_library: dict[str, str]) -> None:
    try:
        there = importlib.util.find_spec(f"{module}.driver")
    except ModuleNotFoundError:
        there = None
    if there is None:
        pytest.skip(f"{package} is not installed")
    done = contract(package, fake_library)
    assert done.stdout.strip() == "all of it", done.stderr
    # The primary context is retained until the process ends.
    assert "left: contexts 1 current 0 buffers 0 pinned 0 streams 0 events 0" in done.stderr


def test_a_driver_without_a_device_says_so(fake_library: dict[str, str]) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed", exc_type=ImportError)
    done = contract("cuda-bindings", {**fake_library, "FAKE_NO_DEVICE": "1"})
    assert "EngineError: the NVIDIA driver does not start: cuInit failed: CUDA_ERROR_NO_DEVICE" in done.stderr


# --- pycuda ----------------------------------------------------------------------------------------------------------


class Pycuda(types.ModuleType):
    """As much of pycuda.driver as is used, noting the calls that must balance."""

    class Error(Exception): ...

    class MemoryError(Error): ...

    class LogicError(Error): ...

    def __init__(self, devices: int = 1, init_error: Exception | None = None) -> None:
        super().__init__("pycuda.driver")
        self.told: list[str] = []
        self.room = 1000
        self.device_attribute = types.SimpleNamespace(COMPUTE_CAPABILITY_MAJOR=75, COMPUTE_CAPABILITY_MINOR=76)
        driver = self

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            @staticmethod
            def count() -> int:
                return devices

            def name(self) -> str:
                return "Fake"

            def get_attribute(self, which: int) -> int:
                return {75: 8, 76: 9}[which]

            def retain_primary_context(self) -> Any:
                driver.told.append("retain")
                return types.SimpleNamespace(
                    push=lambda: driver.told.append("push"),
                    pop=lambda: driver.told.append("pop"),
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


def use(monkeypatch: pytest.MonkeyPatch, driver: Pycuda | None) -> None:
    """Let pycuda be there, with this driver, or no package at all."""
    cuda_driver._load.cache_clear()
    monkeypatch.setattr(cuda_driver, "_is_there", lambda module: driver is not None and module.startswith("pycuda"))
    monkeypatch.setattr(cuda_pycuda, "version", lambda _package: "1")
    if driver is not None:
        package = types.ModuleType("pycuda")
        package.driver = driver  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pycuda", package)
        monkeypatch.setitem(sys.modules, "pycuda.driver", driver)


def test_pycudas_primary_context_is_kept_for_the_next_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Pycuda()
    use(monkeypatch, driver)
    for _ in range(2):
        device = CudaDevice()
        assert (device.name, device.compute_capability) == ("Fake (0)", (8, 9))
        device.allocate(10).free()
        device.close()
    assert driver.told == ["retain", "push", "free", "pop", "push", "free", "pop"]


def test_no_room_is_told_from_other_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Pycuda())
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
    cuda_pycuda._PinnedBuffer(array[:]).free()
    assert freed == ["free"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    with pytest.raises(MissingDependencyError, match=r"cuda-bindings: pip install 'singerembed\[gpu\]'"):
        device_count()
    use(monkeypatch, Pycuda(init_error=Pycuda.LogicError("cuInit failed: no CUDA-capable device is detected")))
    with pytest.raises(EngineError, match="the NVIDIA driver does not start: cuInit failed: no CUDA-capable device"):
        device_count()
    use(monkeypatch, Pycuda(devices=2))
    assert device_count() == 2
    with pytest.raises(EngineError, match="there is no CUDA device 2; this process sees 2"):
        CudaDevice(2)
