"""Opens an engine file with the back end that it was built for."""

from __future__ import annotations

from importlib import resources

from singerembed.engine.base import Engine
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.errors import EngineError
from singerembed.mel import DEFAULT_SILENCE_DBFS


def bundled_engine_path() -> str:
    """Path of the engine that ships with the package."""
    return str(resources.files("singerembed") / "data" / "default.engine")


def open_engine(file: EngineFile, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> Engine:
    """Start the back end of `file`. Raises EngineError when this machine cannot run it."""
    if file.backend == "onnxruntime":
        from singerembed.engine.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(file, silence_dbfs)
    raise EngineError(f"this singerembed has no back end {file.backend!r}. Upgrade it, or build the engine again")


def load_engine(path: str | None = None, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> Engine:
    """Read the engine file `path` (default: the bundled one) and start its back end. Raises EngineError."""
    return open_engine(read_engine_file(path or bundled_engine_path()), silence_dbfs)
