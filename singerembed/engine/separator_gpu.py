"""Runs a separator's network on a GPU by TensorRT: segments of many callers, from one device thread.

A segment is a batch of its own, so its result depends on nothing else. Callers copy its samples into the page-locked
memory of a lane and wait; the device thread enqueues copy in, network and copy out on three streams, so that they
overlap between lanes. A voice that an encoder on the same device takes stays there: it is mixed down to mono, and only
its energy is copied out.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.device import Device, DeviceBuffer, PinnedBuffer, VoiceMix
from singerembed.engine.file import SeparatorFile
from singerembed.engine.ring import POLL_SECONDS, Slot, as_singerembed_error
from singerembed.engine.tensorrt import LIBRARIES, Plan, Tensors, load_library
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.model.mel import DEVICE_LEVEL
from singerembed.model.separator_spec import SeparatorSpec, SpectrogramSpec, WaveformSpec
from singerembed.model.spec import ModelSpec

MIXTURE_NAME = "mixture"  # of Spleeter from samples to samples
VOICE_NAME = "voice"
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


@dataclass(frozen=True)
class CropMix:
    """Where the voice is in what a separator gives, and how an encoder wants a crop of it."""

    spec: SeparatorSpec
    crop_samples: int
    segment: int  # samples in which one decision is made on how to mix down to mono

    @property
    def n_segments(self) -> int:
        """Number of those decisions."""
        return -(-self.crop_samples // self.segment)


@dataclass(frozen=True)
class DeviceVoice:
    """A crop of a voice on the device, in mono. Its slot must be given to an encoder there, or released."""

    energy: float  # sum of squares over all channels
    slot: Slot


@dataclass(eq=False)
class _Crop:
    """Buffers of one crop of a voice, and which part of the segment it is."""

    slot: Slot
    device_energies: DeviceBuffer
    energies: NDArray[np.float32]  # page-locked
    first: int = 0
    samples: int = 0


@dataclass(eq=False)
class _Lane:
    """Buffers of one segment, of FP32, large enough for the largest."""

    index: int
    source: PinnedBuffer
    device_source: DeviceBuffer
    device_result: DeviceBuffer
    result: PinnedBuffer
    crop: _Crop | None = None
    stays: bool = False  # the voice is for an encoder on the device
    size: int = 0  # of the segment in it, where the network leaves one open
    source_bytes: int = 0
    result_bytes: int = 0
    downloaded: object = None  # event
    finished: threading.Event = field(default_factory=threading.Event)


class SegmentRunner:
    """A separator's network on one GPU. `run` and `voice` are thread-safe."""

    def __init__(
        self,
        tensors: Tensors,
        open_device: Callable[[], AnyDevice],
        open_network: Callable[[AnyDevice], SegmentNetwork],
        crop_mix: CropMix | None = None,
    ) -> None:
        """Start the device thread, which opens the device and the network. Return when both are ready.

        `crop_mix`: of an encoder, for `voice`. Raises EngineError or MissingDependencyError if they cannot be opened.
        """
        self.description = ""
        self.device_index = 0
        self.leaves_voices = crop_mix is not None
        self._tensors, self._crop_mix = tensors, crop_mix
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
        lane = self._take(self._size_of(values.shape))
        try:
            self._compute(lane, values)
            shape = self._output_of(lane.size)
            return lane.result.array[: lane.result_bytes].view(np.float32).reshape(shape).copy()
        finally:
            self._give_back(lane)

    def voice(self, values: NDArray[np.float32], first: int, samples: int) -> DeviceVoice:
        """Separate `values`, of the network's input shape, and leave a crop of the voice on the device, in mono.

        The crop begins at sample `first` of the segment and has `samples` samples, then zeros. Raises EngineError.
        """
        lane = self._take(self._size_of(values.shape))
        try:
            assert lane.crop is not None
            lane.crop.first, lane.crop.samples, lane.stays = first, samples, True
            self._compute(lane, values)
            return DeviceVoice(float(lane.crop.energies.sum(dtype=np.float64)), lane.crop.slot)
        except BaseException:
            self._give_back(lane)
            raise

    def close(self) -> None:
        """Free the device, when all voices on it are released. Calls in progress raise EngineError."""
        self._fail(EngineError("the separator was closed"))
        self._thread.join()

    # --- called by callers of `run` and `voice` ---

    def _compute(self, lane: _Lane, values: NDArray[np.float32]) -> None:
        """Have the device thread compute `values` in `lane`, and wait."""
        lane.source_bytes, lane.result_bytes = values.nbytes, _n_bytes(self._output_of(lane.size))
        lane.source.array[: values.nbytes].view(np.float32).reshape(values.shape)[:] = values
        with self._changed:
            self._raise_failure()
            self._submitted.append(lane)
            self._changed.notify_all()
        lane.finished.wait()
        self._raise_failure()

    def _give_back(self, lane: _Lane) -> None:
        with self._changed:
            self._free.append(lane)
            self._changed.notify_all()

    def _size_of(self, shape: tuple[int, ...]) -> int:
        wanted = self._tensors
        size = shape[wanted.input_shape.index(-1)] if -1 in wanted.input_shape else wanted.largest
        if shape != wanted.input_of(size):
            raise ValueError(f"a segment is {list(wanted.input_shape)}, not {list(shape)}")
        if not wanted.smallest <= size <= wanted.largest:
            raise EngineError(
                f"the separator was built for segments of {wanted.smallest} to {wanted.largest} hops, and one of "
                f"{size} was asked for. Build it for --backend onnxruntime, which takes all"
            )
        return size

    def _take(self, size: int) -> _Lane:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._free)
            self._raise_failure()
            lane = self._free.pop()
            lane.size, lane.stays = size, False
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
                self._output_of, self.device_index = network.output_of, device.index
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

        lane = _Lane(
            index,
            keep(device.pinned(_n_bytes(source))),
            keep(device.allocate(_n_bytes(source))),
            keep(device.allocate(_n_bytes(result))),
            keep(device.pinned(_n_bytes(result))),
        )
        if self._crop_mix is not None:
            energies_bytes = _n_bytes((self._crop_mix.n_segments,))
            slot = Slot(
                1,
                None,
                keep(device.allocate(_n_bytes((self._crop_mix.crop_samples,)))),
                keep(device.pinned(DEVICE_LEVEL.itemsize)).array.view(DEVICE_LEVEL),
                keep(device.allocate(DEVICE_LEVEL.itemsize)),
                release=partial(self._give_back, lane),
            )
            energies = keep(device.pinned(energies_bytes)).array.view(np.float32)
            lane.crop = _Crop(slot, keep(device.allocate(energies_bytes)), energies)
        return lane

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

    def _launch(self, lane: _Lane, device: Device, network: SegmentNetwork, up: int, compute: int, down: int) -> None:
        device.upload(lane.device_source.address, lane.source.array[: lane.source_bytes], up)
        device.wait(compute, device.record(up))
        network.execute(lane.index, lane.size, lane.device_source.address, lane.device_result.address, compute)
        if lane.stays:
            device.mix_voice(self._mix_of(lane), compute)
        device.wait(down, device.record(compute))
        if lane.crop is not None and lane.stays:
            device.download(lane.crop.energies, lane.crop.device_energies.address, down)
        else:
            device.download(lane.result.array[: lane.result_bytes], lane.device_result.address, down)
        lane.downloaded = device.record(down)

    def _mix_of(self, lane: _Lane) -> VoiceMix:
        assert self._crop_mix is not None and lane.crop is not None
        spec = self._crop_mix.spec
        shape = self._output_of(lane.size)
        stride, stem = (shape[-1], spec.stem or 0) if isinstance(spec, WaveformSpec) else (shape[-1] * shape[-2], 0)
        return VoiceMix(
            voice=lane.device_result.address + _n_bytes((stem, spec.channels, stride)),
            channels=spec.channels,
            stride=stride,
            first=lane.crop.first,
            samples=lane.crop.samples,
            crop_samples=self._crop_mix.crop_samples,
            segment=self._crop_mix.segment,
            mono=lane.crop.slot.device_pcm.address,
            energies=lane.crop.device_energies.address,
        )


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
    shape = (spec.channels, -1, spec.hop_samples)
    crop = spec.segment_samples(ModelSpec(name="", method="").crop_samples)
    return Tensors(
        input_name=MIXTURE_NAME,
        input_shape=shape,
        output_name=VOICE_NAME,
        output_shape=shape,
        smallest=spec.frame_multiple - 1 + spec.n_fft // spec.hop_samples,
        usual=crop // spec.hop_samples,
        largest=spec.stem_segment_samples // spec.hop_samples,
    )


def open_plan(file: SeparatorFile, device: int, crop_mix: CropMix | None) -> SegmentRunner:
    """Start the network of `file`, a plan, on CUDA device `device`. Raises EngineError or MissingDependencyError."""
    load_library(LIBRARIES[file.backend])  # first, so that a missing package is reported before a missing device
    tensors = separator_tensors(file.spec)
    return SegmentRunner(tensors, lambda: CudaDevice(device), lambda cuda: Plan(file, tensors, cuda), crop_mix)


def _n_bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * np.dtype(np.float32).itemsize
