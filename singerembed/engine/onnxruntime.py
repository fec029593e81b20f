"""The CPU back end: one ONNX Runtime session, shared by all worker threads.

Each call of the session runs one crop on the calling thread. A thread pool of the session's own would compete with the
worker threads, batches are no faster (the activations of one crop fill the cache), and with one crop per call its
embedding has the same bits whatever else is embedded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from singerembed.engine.base import EmbeddedCrops
from singerembed.engine.file import EngineFile
from singerembed.errors import EngineError
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, MelExtractor, Pcm

INPUT_NAME = "log_mel"
OUTPUT_NAME = "embedding"
_LOG_ERRORS_ONLY = 3


class OnnxRuntimeEngine:
    """An engine whose payload is an ONNX model, run on the CPU."""

    batch = 4  # crops: enough to hide the overhead of a call, few enough to stay in the cache
    waits = False

    def __init__(self, file: EngineFile, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> None:
        """Load `file`. Raises EngineError if ONNX Runtime cannot load the model."""
        self.spec = file.spec
        self.description = f"{file.spec.name}, {file.spec.precision}, ONNX Runtime {onnxruntime.__version__}"
        self._mel = MelExtractor(file.spec, silence_dbfs)
        self._session = new_session(file.payload)
        # Engines of version 0.1 take FP16 where they compute in it.
        self._input_type = np.float16 if self._session.get_inputs()[0].type == "tensor(float16)" else np.float32

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        """See `Engine.embed`."""
        mel = self._mel.log_mel(crops)
        embedding = np.empty((len(mel.mel), self.spec.embedding_dim), np.float32)
        try:
            for i, log_mel in enumerate(mel.mel):
                batch = log_mel[np.newaxis].astype(self._input_type, copy=False)
                (embedding[i],) = self._session.run([OUTPUT_NAME], {INPUT_NAME: batch})[0]
        except Exception as exc:
            raise EngineError(f"ONNX Runtime failed: {exc}") from exc
        return EmbeddedCrops(embedding, mel.peak, mel.rms, mel.state)

    def close(self) -> None:
        """Do nothing: the session is freed with its last reference."""


def new_session(model: bytes) -> Any:
    """Return a session of `model` that runs on the calling thread alone. Raises EngineError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's exceptions have no common base class
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load this engine: {exc}") from exc
