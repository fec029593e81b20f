"""The back ends TensorRT (10 and 11) and TensorRT for RTX, which share an API.

Plans of encoders run on the runtime of gpu.py, those of separators on that of separator_gpu.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from singerembed.engine.cuda_driver import CudaDevice, device_count
from singerembed.engine.device import DeviceBuffer, OutOfDeviceMemory
from singerembed.engine.file import EngineFile, SeparatorFile
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.onnxruntime import INPUT_NAME, OUTPUT_NAME
from singerembed.errors import EngineError, MissingDependencyError, SingerEmbedError
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, require_cuda_kernels
from singerembed.model.spec import ModelSpec

_AMPERE = (8, 0)  # compute capability
_FACTS = "tensorrt"  # key of the PlanFacts in EngineFile.build


@dataclass(frozen=True)
class Library:
    """One of the two TensorRT libraries."""

    backend: str  # name in the engine file
    package: str
    title: str
    extra: str
    oldest: int  # oldest supported major version


TENSORRT = Library("tensorrt", "tensorrt", "TensorRT", "gpu", 10)
TENSORRT_RTX = Library("tensorrt-rtx", "tensorrt_rtx", "TensorRT for RTX", "rtx", 1)
LIBRARIES = {library.backend: library for library in (TENSORRT, TENSORRT_RTX)}


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """The versions and GPUs that a plan runs on, recorded when it was built."""

    version: str  # of the library
    compute_capabilities: tuple[str, ...]  # of the GPUs it was built for, such as "8.9"
    hardware_compatible: bool  # runs on any GPU from Ampere on
    version_compatible: bool  # runs on later versions of the library too
    max_batch: int

    @classmethod
    def from_file(cls, file: EngineFile | SeparatorFile) -> PlanFacts:
        """Read the facts from an engine file. Raises EngineError if they are missing."""
        try:
            facts = file.build[_FACTS]
            return cls(**{**facts, "compute_capabilities": tuple(facts["compute_capabilities"])})
        except (KeyError, TypeError) as exc:
            raise EngineError(f"the engine does not say what its plan was built for ({exc}). Build it again") from exc

    def check(self, library: Library, version: str, compute_capability: tuple[int, int]) -> None:
        """Raise EngineError, naming the difference, unless this GPU and version of the library can run the plan."""
        here = ".".join(map(str, compute_capability))
        anywhere = self.hardware_compatible and compute_capability >= _AMPERE
        if here not in self.compute_capabilities and not anywhere:
            raise EngineError(
                f"the engine was built for compute capability {', '.join(self.compute_capabilities)}; "
                f"this GPU has {here}. "
                f"Build it again on this machine: singerembed build-engine CHECKPOINT --backend {library.backend}"
            )
        newer = _numbers(version) >= _numbers(self.version)
        if version != self.version and not (self.version_compatible and newer):
            raise EngineError(
                f"the engine was built by {library.title} {self.version}; here is {version}. Install that version, or "
                f"build the engine again: singerembed build-engine CHECKPOINT --backend {library.backend}"
            )


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The input and the output of a network, both FP32. At most one size is open, -1, and has a range."""

    input_name: str
    input_shape: tuple[int, ...]
    output_name: str
    output_shape: tuple[int, ...] | None  # None: known by the plan alone
    smallest: int = 1
    usual: int = 1  # which kernels are chosen for
    largest: int = 1

    def input_of(self, size: int) -> tuple[int, ...]:
        """The shape of the input where what is open is `size`."""
        return tuple(size if one == -1 else one for one in self.input_shape)


def encoder_tensors(spec: ModelSpec, max_batch: int) -> Tensors:
    """What an encoder takes and gives, in batches of 1 to `max_batch`."""
    return Tensors(
        input_name=INPUT_NAME,
        input_shape=(-1, spec.n_mels, spec.n_frames),
        output_name=OUTPUT_NAME,
        output_shape=(-1, spec.embedding_dim),
        usual=max_batch,  # nearly all batches are full
        largest=max_batch,
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def load_library(library: Library) -> Any:
    """Import and return the library. Raises MissingDependencyError, or EngineError if it is too old."""
    try:
        module = importlib.import_module(library.package)
    except ImportError as exc:
        raise MissingDependencyError(f"back end {library.backend}", library.package, library.extra) from exc
    if _numbers(module.__version__)[0] < library.oldest:
        raise EngineError(
            f"{library.title} {module.__version__} is too old: {library.oldest} or later is needed. "
            f"pip install --upgrade 'singerembed[{library.extra}]'"
        )
    return module


def cuda_devices() -> int:
    """Return the number of usable CUDA devices: 0 also if the CUDA kernels, the extra gpu or the driver are missing."""
    try:
        require_cuda_kernels()
        return device_count()
    except SingerEmbedError:
        return 0


def usable_library() -> Library | None:
    """Return the preferred library that is installed, TensorRT first; None if there is none, or no GPU."""
    installed = [library for library in LIBRARIES.values() if importlib.util.find_spec(library.package)]
    return installed[0] if installed and cuda_devices() else None


def make_log(trt: Any) -> Any:
    """Return a logger for `trt` that collects error messages, because the API reports them only there."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def taken(self) -> str:
            """Return the errors since the last call, on one line."""
            text, self.errors = "; ".join(self.errors), []
            return text or "no reason given"

    return Log()


def create(factory: Any, log: Any, library: Library) -> Any:
    """Make a Builder or a Runtime. Raises EngineError with the logged reason; the library only raises TypeError."""
    try:
        return factory(log)
    except TypeError as exc:
        raise EngineError(f"{library.title} does not start: {log.taken()}") from exc


class Plan:
    """A plan on a device, with an execution context for each size in each lane. Use it in the thread that made it."""

    def __init__(self, file: EngineFile | SeparatorFile, tensors: Tensors, device: CudaDevice) -> None:
        """Load the plan of `file` on `device`. Raises EngineError or MissingDependencyError."""
        library = LIBRARIES[file.backend]
        self._trt = load_library(library)
        facts = PlanFacts.from_file(file)
        facts.check(library, self._trt.__version__, device.compute_capability)
        self.description = f"{library.title} {self._trt.__version__}"
        self.max_batch = facts.max_batch
        self._tensors, self._device, self._title = tensors, device, library.title
        self._log = make_log(self._trt)
        self._memory: DeviceBuffer | None = None
        self._runtime = create(self._trt.Runtime, self._log, library)
        # A version-compatible plan contains its own runtime, which is host code.
        self._runtime.engine_host_code_allowed = facts.version_compatible
        self._engine = self._runtime.deserialize_cuda_engine(file.payload)
        if self._engine is None:
            raise EngineError(f"{library.title} cannot load the engine: {self._log.taken()}")
        self.half_input = self._engine.get_tensor_dtype(tensors.input_name) == self._trt.float16
        self._output_shape = self._check_tensors()
        self._contexts: dict[tuple[int, int], Any] = {}  # by lane and size: a captured graph owns its context
        # TensorRT for RTX compiles kernels when it first sees a shape, and may replace them later from another thread;
        # since 1.2 it captures by itself.
        self.capturable = library is TENSORRT

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        """See `Network.prepare`; what is open need not be the batch."""
        self._contexts = {}
        if self._memory is not None:
            self._memory.free()
            self._memory = None
        needed = [1]
        for lane in range(lanes):
            for size in batches:
                context = self._contexts[lane, size] = self._new_context()
                needed.append(self._set_size(context, size))
        # All contexts work in the same memory, because one stream runs them, one after the other.
        self._memory = self._device.allocate(max(needed))
        for context in self._contexts.values():
            context.set_device_memory(self._memory.address, max(needed))

    def output_of(self, size: int) -> tuple[int, ...]:
        """The shape of the output where what is open is `size`."""
        return tuple(size if one == -1 else one for one in self._output_shape)

    def execute(self, lane: int, size: int, source: int, result: int, stream: int) -> None:
        """Enqueue the network from the device address `source` to `result`, in a size that was prepared."""
        context = self._contexts[lane, size]
        context.set_tensor_address(self._tensors.input_name, source)
        context.set_tensor_address(self._tensors.output_name, result)
        if not context.execute_async_v3(stream):
            raise self._failure("failed")

    def close(self) -> None:
        """See `Network.close`."""
        self._contexts = {}
        del self._engine, self._runtime  # in this order, while the CUDA context exists
        if self._memory is not None:
            self._memory.free()

    def _new_context(self) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self._trt, "CudaGraphStrategy"):
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._failure("cannot prepare the engine")
        return context

    def _set_size(self, context: Any, size: int) -> int:
        """Set the shape of a context for good, and return the bytes of device memory that it needs."""
        shape = self._tensors.input_of(size)
        if not context.set_input_shape(self._tensors.input_name, shape):
            raise self._failure(f"refuses an input of {list(shape)}")
        if size == self._tensors.largest:
            return int(self._engine.device_memory_size_v2)
        n_bytes = int(context.update_device_memory_size_for_shapes())  # less than the profile's largest size needs
        if n_bytes <= 0:  # which is how it reports a failure
            raise self._failure(f"cannot prepare an input of {list(shape)}")
        return n_bytes

    def _failure(self, what: str) -> Exception:
        """The error to raise, with the library's own reason."""
        reason = self._log.taken()
        if "out of memory" in reason.lower() or "outofmemory" in reason.lower():
            return OutOfDeviceMemory(reason)
        return EngineError(f"{self._title} {what}: {reason}")

    def _check_tensors(self) -> tuple[int, ...]:
        """Return the shape of the output. Raises EngineError where tensors are not those of the spec."""
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        found = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        wanted = self._tensors
        expected = {
            wanted.input_name: wanted.input_shape,
            wanted.output_name: wanted.output_shape or found.get(wanted.output_name),
        }
        if found != expected or self._engine.get_tensor_dtype(wanted.output_name) != self._trt.float32:
            raise EngineError(f"the engine's plan has tensors {found}; its spec wants {expected}. Build it again")
        return found[wanted.output_name]


class TensorRtNetwork(Plan):
    """See `Network`."""

    def __init__(self, file: EngineFile, device: CudaDevice) -> None:
        """Load the plan of `file` on `device`. Raises EngineError or MissingDependencyError."""
        super().__init__(file, encoder_tensors(file.spec, PlanFacts.from_file(file).max_batch), device)

    def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        """See `Network.enqueue`."""
        self.execute(lane, batch, log_mel, embedding, stream)


def open_tensorrt(file: EngineFile, silence_dbfs: float = DEFAULT_SILENCE_DBFS, device: int = 0) -> GpuEngine:
    """Start the engine of `file`, a plan, on CUDA device `device`. Raises EngineError or MissingDependencyError."""
    load_library(LIBRARIES[file.backend])  # first, so that a missing package is reported before a missing device
    return GpuEngine(file.spec, lambda: CudaDevice(device), lambda cuda: TensorRtNetwork(file, cuda), silence_dbfs)
