"""Opens an engine file with the back end that it was built for."""

from __future__ import annotations

from importlib import resources

from singerembed.engine.base import Engine
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.errors import EngineError
from singerembed.model.mel import DEFAULT_SILENCE_DBFS

# Of engines that run anywhere: their payload is an ONNX model.
PORTABLE_BACKENDS = ("onnxruntime", "native")


def bundled_engine_path() -> str:
    """Return the path of the engine that ships with the package."""
    return str(resources.files("singerembed") / "data" / "default.engine")


def open_engine(file: EngineFile, silence_dbfs: float = DEFAULT_SILENCE_DBFS, device: int = 0) -> Engine:
    """Start the back end of `file`, on CUDA device `device` if it uses a GPU. Raises EngineError if it cannot run here.

    An engine of ONNX Runtime or the native back end uses a GPU if there is one, with onnxruntime-gpu, the extra gpu and
    the CUDA kernels. A native engine runs on ONNX Runtime where the processor has none of its instruction sets. One in
    int8 always runs on the CPU, by the native back end.
    """
    if needs_native(file):
        from singerembed.engine.native import NativeEngine

        return NativeEngine(file, silence_dbfs)
    if file.backend in PORTABLE_BACKENDS:
        from singerembed.engine import native, onnxruntime, onnxruntime_cuda

        if onnxruntime_cuda.is_usable():
            return onnxruntime_cuda.open_onnxruntime_cuda(file, silence_dbfs, device)
        if file.backend == "native" and native.has_kernels():
            return native.NativeEngine(file, silence_dbfs)
        return onnxruntime.OnnxRuntimeEngine(file, silence_dbfs)
    if file.backend in {"tensorrt", "tensorrt-rtx"}:
        from singerembed.engine.tensorrt import open_tensorrt

        return open_tensorrt(file, silence_dbfs, device)
    raise EngineError(f"this singerembed has no back end {file.backend!r}. Upgrade it, or build the engine again")


def needs_native(file: EngineFile) -> bool:
    """Return whether no other back end can run `file`, wherever it is: int8 is arithmetic of the native one alone."""
    return file.backend == "native" and file.spec.precision == "int8"


def devices_for(file: EngineFile) -> int:
    """Return how many CUDA devices `file` would use here; 0 if it would run on the CPU."""
    from singerembed.engine import onnxruntime_cuda
    from singerembed.engine.tensorrt import cuda_devices

    if needs_native(file):
        return 0
    return cuda_devices() if file.backend not in PORTABLE_BACKENDS or onnxruntime_cuda.is_usable() else 0


def load_engine(path: str | None = None, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> Engine:
    """Read the engine file `path` (default: the bundled one) and start its back end. Raises EngineError."""
    return open_engine(read_engine_file(path or bundled_engine_path()), silence_dbfs)
