"""Opens an engine file with the back end that it was built for."""

from __future__ import annotations

from importlib import resources

from singerembed.engine.base import Engine
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.errors import EngineError
from singerembed.model.mel import DEFAULT_SILENCE_DBFS


def bundled_engine_path() -> str:
    """Return the path of the engine that ships with the package."""
    return str(resources.files("singerembed") / "data" / "default.engine")


def open_engine(file: EngineFile, silence_dbfs: float = DEFAULT_SILENCE_DBFS, device: int = 0) -> Engine:
    """Start the back end of `file`, on CUDA device `device` if it uses a GPU. Raises EngineError if it cannot run here.

    An ONNX Runtime engine uses a GPU if there is one, with onnxruntime-gpu, the extra gpu and the CUDA kernels.
    """
    if file.backend == "onnxruntime":
        from singerembed.engine import onnxruntime, onnxruntime_cuda

        if onnxruntime_cuda.is_usable():
            return onnxruntime_cuda.open_onnxruntime_cuda(file, silence_dbfs, device)
        return onnxruntime.OnnxRuntimeEngine(file, silence_dbfs)
    if file.backend in {"tensorrt", "tensorrt-rtx"}:
        from singerembed.engine.tensorrt import open_tensorrt

        return open_tensorrt(file, silence_dbfs, device)
    raise EngineError(f"this singerembed has no back end {file.backend!r}. Upgrade it, or build the engine again")


def devices_for(backend: str) -> int:
    """Return how many CUDA devices an engine of `backend` would use here; 0 if it would run on the CPU."""
    from singerembed.engine import onnxruntime_cuda
    from singerembed.engine.tensorrt import cuda_devices

    return cuda_devices() if backend != "onnxruntime" or onnxruntime_cuda.is_usable() else 0


def load_engine(path: str | None = None, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> Engine:
    """Read the engine file `path` (default: the bundled one) and start its back end. Raises EngineError."""
    return open_engine(read_engine_file(path or bundled_engine_path()), silence_dbfs)
