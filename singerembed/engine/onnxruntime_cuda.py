"""The GPU back end without TensorRT: ONNX Runtime's CUDA provider, bound to the device buffers of gpu_worker.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

from singerembed.engine.cuda_driver import CudaDevice, device_count
from singerembed.engine.device import Device, OutOfDeviceMemory
from singerembed.engine.file import EngineFile
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.onnxruntime import INPUT_NAME, OUTPUT_NAME
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, require_cuda_kernels
from singerembed.model.spec import ModelSpec

logger = logging.getLogger(__name__)

_PROVIDER = "CUDAExecutionProvider"
_MAX_BATCH = 64  # crops; as PlanOptions.max_batch
_OUT_OF_MEMORY = ("failed to allocate memory", "out of memory", "cuda failure 2:")


def is_usable() -> bool:
    """Say whether the CUDA provider (package onnxruntime-gpu), the extra gpu, the CUDA kernels and a device are here.

    If only the provider is, log a warning, because the engine then runs on the CPU.
    """
    if _PROVIDER not in onnxruntime.get_available_providers():
        return False
    try:
        require_cuda_kernels()
        return device_count() > 0
    except SingerEmbedError as exc:
        logger.warning("onnxruntime-gpu is installed, but the engine runs on the CPU: %s", exc)
        return False


class OnnxRuntimeNetwork:
    """See `Network`. Runs on its own stream, ordered with the caller's stream by events in both directions."""

    description = f"ONNX Runtime {onnxruntime.__version__} (CUDA)"
    max_batch = _MAX_BATCH
    capturable = False  # the session allocates while it runs, which a graph would record

    def __init__(
        self,
        spec: ModelSpec,
        session: onnxruntime.InferenceSession,
        device: Device,
        stream: int,
        device_type: str = "cuda",
        index: int = 0,
    ) -> None:
        """`session` runs on `stream`; addresses are of `device_type` ("cuda", or "cpu" in tests) and device `index`."""
        self._spec, self._session, self._device, self._stream = spec, session, device, stream
        self._place = (device_type, index)
        self.half_input = session.get_inputs()[0].type == "tensor(float16)"
        self._options = onnxruntime.RunOptions()
        # An event orders the streams instead.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        """See `Network.prepare`. Does nothing: the session allocates when it first runs a batch."""

    def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        """See `Network.enqueue`."""
        self._device.wait(self._stream, self._device.record(stream))
        binding = self._session.io_binding()
        input_type = np.float16 if self.half_input else np.float32
        binding.bind_input(
            INPUT_NAME, *self._place, input_type, (batch, self._spec.n_mels, self._spec.n_frames), log_mel
        )
        binding.bind_output(OUTPUT_NAME, *self._place, np.float32, (batch, self._spec.embedding_dim), embedding)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as exc:  # ONNX Runtime's exceptions have no common base class
            if any(sign in str(exc).lower() for sign in _OUT_OF_MEMORY):
                raise OutOfDeviceMemory(str(exc)) from exc
            raise EngineError(f"ONNX Runtime failed: {exc}") from exc
        self._device.wait(stream, self._device.record(self._stream))

    def close(self) -> None:
        """See `Network.close`."""
        del self._session


def open_onnxruntime_cuda(file: EngineFile, silence_dbfs: float = DEFAULT_SILENCE_DBFS, device: int = 0) -> GpuEngine:
    """Start the engine of `file`, an ONNX model, on CUDA device `device`.

    Raises EngineError or MissingDependencyError.
    """

    def open_network(cuda: CudaDevice) -> OnnxRuntimeNetwork:
        stream = cuda.stream()
        session = open_session(file.payload, cuda.index, stream)
        return OnnxRuntimeNetwork(file.spec, session, cuda, stream, index=cuda.index)

    return GpuEngine(file.spec, lambda: CudaDevice(device), open_network, silence_dbfs)


def open_session(model: bytes, index: int, stream: int | None = None) -> Any:
    """Return a session of `model` on CUDA device `index`, whose work goes to `stream`, or to one of its own.

    Raises EngineError.
    """
    provider = {
        "device_id": str(index),
        "use_tf32": "0",  # TF32 has no more mantissa bits than FP16
        # The default, EXHAUSTIVE, times every algorithm again for each size of batch.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if stream is not None:
        provider["user_compute_stream"] = str(stream)
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21: finds cuDNN and the CUDA libraries that pip installed
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[(_PROVIDER, provider)])
    except Exception as exc:
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load this engine: {exc}") from exc
    if _PROVIDER not in session.get_providers():  # ONNX Runtime falls back to the CPU and only logs the reason
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its CUDA provider: cuDNN and the CUDA "
            "libraries that it was built for must be installed (pip install 'onnxruntime-gpu[cuda,cudnn]')"
        )
    return session
