"""The GPU runtime: gathers the crops of all callers into batches, and runs them from one device thread.

Callers copy their crops into the slots of a ring buffer (ring.py) and wait; the device thread runs mel kernels and
network on them (gpu_worker.py). docs/gpu.md has a diagram. Libraries are behind the protocols `Device` and `Network`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from singerembed.engine.base import EmbeddedCrops
from singerembed.engine.device import Device, Network
from singerembed.engine.gpu_worker import Worker
from singerembed.engine.ring import Request, Ring, Slot
from singerembed.errors import EngineError
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, LOUD, Pcm
from singerembed.model.spec import ModelSpec

_CALLERS_PER_BATCH = 4  # a device batch is gathered from several calls of `embed`

AnyDevice = TypeVar("AnyDevice", bound=Device)


class GpuEngine:
    """An engine on one GPU. See `Engine`."""

    waits = True

    def __init__(
        self,
        spec: ModelSpec,
        open_device: Callable[[], AnyDevice],
        open_network: Callable[[AnyDevice], Network],
        silence_dbfs: float = DEFAULT_SILENCE_DBFS,
    ) -> None:
        """Start the device thread, which opens the device and the network. Return when both are ready.

        The device batch is the network's largest, halved until it fits into the device's memory.
        Raises EngineError or MissingDependencyError if device or network cannot be opened.
        """
        self.spec = spec
        self.description = ""
        self.batch = 0
        self.device_index = 0
        self._ring = Ring(spec.crop_samples)
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(open_device, open_network, silence_dbfs), name="singerembed-gpu", daemon=True
        )
        self._thread.start()
        self._started.wait()
        if self._ring.failure is not None:
            self._thread.join()
            raise self._ring.failure

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        """See `Engine.embed`. Raises ValueError for another shape or type."""
        if crops.ndim != 2 or crops.shape[1] != self.spec.crop_samples or crops.dtype not in (np.int16, np.float32):
            raise ValueError(
                f"crops must be int16 or float32 [n, {self.spec.crop_samples}], got {crops.dtype} {list(crops.shape)}"
            )
        request = Request(len(crops), self.spec.embedding_dim)
        self._ring.put(request, crops)
        return self.result(request)

    def start_on_device(self, slot: Slot) -> Request:
        """Begin to embed the one crop of `slot`, float32, which is on this engine's device. Do not wait for `result`.

        The slot is released when the device is done with it, also after a failure.
        """
        request = Request(1, self.spec.embedding_dim)
        self._ring.put_on_device(request, slot)
        return request

    @staticmethod
    def result(request: Request) -> EmbeddedCrops:
        """Wait for what `start_on_device` has begun. Raises EngineError."""
        request.finished.wait()
        if request.failure is not None:
            raise EngineError(str(request.failure)) from request.failure
        return EmbeddedCrops(request.embedding[request.state == LOUD], request.peak, request.rms, request.state)

    def close(self) -> None:
        """Free the device. Calls of `embed` in progress raise EngineError."""
        self._ring.fail(EngineError("the engine was closed"))
        self._thread.join()

    def _run(
        self, open_device: Callable[[], AnyDevice], open_network: Callable[[AnyDevice], Network], silence_dbfs: float
    ) -> None:
        try:
            with (
                contextlib.closing(open_device()) as device,
                contextlib.closing(open_network(device)) as network,
                contextlib.closing(Worker(self.spec, device, network, self._ring, silence_dbfs)) as worker,
            ):
                self.device_index = device.index
                self.batch = max(1, worker.batch // _CALLERS_PER_BATCH)
                self.description = f"{self.spec.name}, {self.spec.precision}, {network.description} on {device.name}"
                self._started.set()
                self._serve(worker)
        except BaseException as exc:
            self._ring.fail(exc)
        finally:
            self._ring.release_on_device()
            self._started.set()

    def _serve(self, worker: Worker) -> None:
        try:
            while self._ring.failure is None:
                if not worker.step():
                    self._ring.wait(worker.busy)
        except BaseException as exc:
            self._ring.fail(exc)
        finally:
            self._ring.wait_for_writers()  # before the page-locked memory they copy into is freed
