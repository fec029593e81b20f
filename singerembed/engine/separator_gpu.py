"""Runs a separator's network on a GPU by TensorRT: segments of many callers, from one device thread.

A segment is a batch of its own, so its result depends on nothing else. Callers copy it into the page-locked memory of a
lane and wait; the device thread enqueues copy in, network and copy out on three streams, so that they overlap between
lanes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.device import Device, DeviceBuffer, PinnedBuffer
from singerembed.engine.file import SeparatorFile
from singerembed.engine.ring import POLL_SECONDS, as_singerembed_error
from singerembed.engine.tensorrt import LIBRARIES, Plan, Tensors, load_library
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.model.separator_spec import SeparatorSpec, SpectrogramSpec, WaveformSpec
from singerembed.model.spec import ModelSpec

INPUT_NAME = "magnitude"  # of a separator that masks a spectrogram
OUTPUT_NAME = "mask"
LANES = 6  # some are filled or read by callers while others are computed

AnyDevice = TypeVar("AnyDevice", bound=Device)
AnyBuffer = TypeVar("AnyBuffer", DeviceBuffer, PinnedBuffer)


class SegmentNetwork(Protocol):
    """A separator's network on the device. See `Plan`, which is one."""

    description: str

    def output_of(self, size: int) -> tuple[int, ...]: ...

    def prepare(self, lanes: int, batches: Sequence[int]) -> None: ...

    def execute(self, lane: int, size: int, source: int, result: int, stream: int) -> None: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class _Lane:
    """Buffers of one segment, of FP32, large enough for the largest."""

    index: int
    source: PinnedBuffer
    device_source: DeviceBuffer
    device_result: DeviceBuffer
    result: PinnedBuffer
    size: int = 0  # of the segment in it, where the network leaves one open
    source_bytes: int = 0
    result_bytes: int = 0
    downloaded: object = None  # event
    finished: threading.Event = field(default_factory=threading.Event)


class SegmentRunner:
    """A separator's network on one GPU. `run` is thread-safe."""

    def __init__(
        self,
        tensors: Tensors,
        open_device: Callable[[], AnyDevice],
        open_network: Callable[[AnyDevice], SegmentNetwork],
    ) -> None:
        """Start the device thread, which opens the device and the network. Return when both are ready.

        Raises EngineError or MissingDependencyError if they cannot be opened.
        """
        self.description = ""
        self._tensors = tensors
        self._changed = threading.Condition()
        self._free: list[_Lane] = []
        self._lanes: list[_Lane] = []
        self._submitted: deque[_Lane] = deque()
        self._failure: SingerEmbedError | None = None
        self._output_of: Callable[[int], tuple[int, ...]] = lambda _size: ()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(open_device, open_network, started), name="singerembed-separator", daemon=True
        )
        self._thread.start()
        started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def run(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the network gives for `values`, of its input's shape. Raises EngineError."""
        size = self._size_of(values.shape)
        lane = self._take()
        try:
            lane.size, lane.source_bytes = size, values.nbytes
            lane.source.array[: values.nbytes].view(np.float32).reshape(values.shape)[:] = values
            shape = self._output_of(size)
            lane.result_bytes = _n_bytes(shape)
            with self._changed:
                self._raise_failure()
                self._submitted.append(lane)
                self._changed.notify_all()
            lane.finished.wait()
            self._raise_failure()
            return lane.result.array[: lane.result_bytes].view(np.float32).reshape(shape).copy()
        finally:
            with self._changed:
                self._free.append(lane)
                self._changed.notify_all()

    def close(self) -> None:
        """Free the device. Calls of `run` in progress raise EngineError."""
        self._fail(EngineError("the separator was closed"))
        self._thread.join()

    # --- called by callers of `run` ---

    def _size_of(self, shape: tuple[int, ...]) -> int:
        wanted = self._tensors
        size = shape[wanted.input_shape.index(-1)] if -1 in wanted.input_shape else wanted.largest
        if shape != wanted.input_of(size):
            raise ValueError(f"a segment is {list(wanted.input_shape)}, not {list(shape)}")
        if not wanted.smallest <= size <= wanted.largest:
            raise EngineError(
                f"the separator was built for segments of {wanted.smallest} to {wanted.largest} frames, and one of "
                f"{size} was asked for. Build it for --backend onnxruntime, which takes all"
            )
        return size

    def _take(self) -> _Lane:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._free)
            self._raise_failure()
            lane = self._free.pop()
            lane.finished.clear()
            return lane

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure

    def _fail(self, exc: BaseException) -> None:
        """Fail all calls in progress and all later ones. Only the first failure is kept."""
        with self._changed:
            self._failure = self._failure or as_singerembed_error(exc)
            for lane in self._lanes:
                lane.finished.set()
            self._changed.notify_all()

    # --- the device thread ---

    def _run(
        self,
        open_device: Callable[[], AnyDevice],
        open_network: Callable[[AnyDevice], SegmentNetwork],
        started: threading.Event,
    ) -> None:
        try:
            with (
                contextlib.closing(open_device()) as device,
                contextlib.closing(open_network(device)) as network,
                contextlib.ExitStack() as owned,
            ):
                self._output_of = network.output_of
                network.prepare(LANES, [self._tensors.usual])
                lanes = [self._new_lane(index, device, owned) for index in range(LANES)]
                self.description = f"{network.description} on {device.name}"
                self._lanes, self._free = lanes, list(lanes)
                started.set()
                self._serve(device, network)
        except BaseException as exc:
            self._fail(exc)
        finally:
            started.set()

    def _new_lane(self, index: int, device: Device, owned: contextlib.ExitStack) -> _Lane:
        source, result = self._tensors.input_of(self._tensors.largest), self._output_of(self._tensors.largest)

        def keep(buffer: AnyBuffer) -> AnyBuffer:
            owned.callback(buffer.free)
            return buffer

        return _Lane(
            index,
            keep(device.pinned(_n_bytes(source))),
            keep(device.allocate(_n_bytes(source))),
            keep(device.allocate(_n_bytes(result))),
            keep(device.pinned(_n_bytes(result))),
        )

    def _serve(self, device: Device, network: SegmentNetwork) -> None:
        running: deque[_Lane] = deque()
        try:
            streams = device.stream(), device.stream(), device.stream()
            prepared = self._tensors.usual
            while self._failure is None:
                if running and device.is_done(running[0].downloaded):
                    running.popleft().finished.set()
                elif lane := self._next(busy=bool(running)):
                    if lane.size != prepared:
                        device.synchronize()  # nothing may be running then
                        network.prepare(LANES, [lane.size])
                        prepared = lane.size
                    self._launch(lane, device, network, *streams)
                    running.append(lane)
        except BaseException as exc:
            self._fail(exc)
        finally:
            with contextlib.suppress(Exception):  # a lost device, which has been reported
                device.synchronize()
            for lane in self._lanes:
                lane.downloaded = None  # here, because the last reference might go in another thread
            with self._changed:  # before the page-locked memory that callers copy into and from is freed
                self._changed.wait_for(lambda: len(self._free) == len(self._lanes))

    def _next(self, busy: bool) -> _Lane | None:
        """The next lane to compute, or None; wait for one or a failure, while the device is `busy` POLL_SECONDS."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._submitted, POLL_SECONDS if busy else None)
            return self._submitted.popleft() if self._submitted else None

    @staticmethod
    def _launch(lane: _Lane, device: Device, network: SegmentNetwork, up: int, compute: int, down: int) -> None:
        device.upload(lane.device_source.address, lane.source.array[: lane.source_bytes], up)
        device.wait(compute, device.record(up))
        network.execute(lane.index, lane.size, lane.device_source.address, lane.device_result.address, compute)
        device.wait(down, device.record(compute))
        device.download(lane.result.array[: lane.result_bytes], lane.device_result.address, down)
        lane.downloaded = device.record(down)


def separator_tensors(spec: SeparatorSpec) -> Tensors:
    """What a separator's network takes and gives for one segment."""
    if isinstance(spec, WaveformSpec):
        return Tensors(
            input_name=spec.input_name,
            input_shape=(*[1] * spec.batch_axis, spec.channels, spec.segment),
            output_name=spec.output_name,
            output_shape=None,
        )
    assert isinstance(spec, SpectrogramSpec)
    shape = (1, spec.channels, -1, spec.n_bins)
    crop = spec.segment_samples(ModelSpec(name="", method="").crop_samples)
    usual, largest = ((n - spec.n_fft) // spec.hop_samples + 1 for n in (crop, spec.stem_segment_samples))
    return Tensors(
        input_name=INPUT_NAME,
        input_shape=shape,
        output_name=OUTPUT_NAME,
        output_shape=shape,
        smallest=spec.frame_multiple,
        usual=usual,
        largest=largest,
    )


def open_plan(file: SeparatorFile, device: int) -> SegmentRunner:
    """Start the network of `file`, a plan, on CUDA device `device`. Raises EngineError or MissingDependencyError."""
    load_library(LIBRARIES[file.backend])  # first, so that a missing package is reported before a missing device
    tensors = separator_tensors(file.spec)
    return SegmentRunner(tensors, lambda: CudaDevice(device), lambda cuda: Plan(file, tensors, cuda))


def _n_bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * np.dtype(np.float32).itemsize
