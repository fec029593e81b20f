"""ONNX Runtime on the GPU runtime's buffers: the binding, with the CPU provider in the place of CUDA's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Golden

from singerembed.engine import cuda_driver, onnxruntime_cuda
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.engine.file import read_engine_file
from singerembed.engine.load import bundled_engine_path, open_engine
from singerembed.engine.onnxruntime import OnnxRuntimeEngine
from singerembed.engine.onnxruntime_cuda import OnnxRuntimeNetwork, is_usable
from singerembed.engine.precision import to_fp16
from singerembed.errors import EngineError
from singerembed.model import mel
from singerembed.model.spec import ModelSpec

CALLER, OWN = 1, 2


class Streams:
    """Notes who waits for whom."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def record(self, stream: int) -> object:
        self.told.append(("record", stream))
        return stream

    def wait(self, stream: int, event: object) -> None:
        self.told.append(("wait", stream, event))


class FailingSession:
    def __init__(self, session: Any, message: str) -> None:
        self._session, self._message = session, message

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, *_: Any) -> None:
        raise RuntimeError(self._message)


def cpu_session(model: bytes) -> Any:
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def network(spec: ModelSpec, session: Any) -> tuple[OnnxRuntimeNetwork, Streams]:
    streams = Streams()
    device: Any = streams
    return OnnxRuntimeNetwork(spec, session, device, OWN, device_type="cpu"), streams


def half_input(model: bytes) -> bytes:
    """`model` as version 0.1 built it: its input is FP16."""
    proto = onnx.load_from_string(model)
    (name,) = (value.name for value in proto.graph.input)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for node in proto.graph.node:
        node.input[:] = [f"{one}_fp32" if one == name else one for one in node.input]
    cast = onnx.helper.make_node("Cast", [name], [f"{name}_fp32"], to=onnx.TensorProto.FLOAT)
    proto.graph.node.insert(0, cast)
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize("half", [False, True])
def test_reads_and_writes_the_addresses_it_is_given(
    golden: Golden, spec: ModelSpec, reference_engine: str, half: bool
) -> None:
    model = read_engine_file(reference_engine).payload
    session = cpu_session(half_input(to_fp16(model)) if half else model)
    log_mel = mel.MelExtractor(spec).log_mel(golden.pcm[:2]).mel.astype(np.float16 if half else np.float32)
    embedding = np.zeros((2, spec.embedding_dim), np.float32)
    running, streams = network(spec, session)
    assert running.half_input == half
    running.prepare(1, [2])
    running.enqueue(0, 2, log_mel.ctypes.data, embedding.ctypes.data, CALLER)
    np.testing.assert_array_equal(embedding, session.run(None, {"log_mel": log_mel})[0])
    assert streams.told == [("record", CALLER), ("wait", OWN, CALLER), ("record", OWN), ("wait", CALLER, OWN)]
    running.close()


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Failed to allocate memory for requested buffer of size 134217728", OutOfDeviceMemory),
        ("CUDA failure 2: out of memory ; GPU=0", OutOfDeviceMemory),
        ("CUDA failure 700: an illegal memory access was encountered", EngineError),
    ],
)
def test_failures_are_told_apart(spec: ModelSpec, message: str, error: type[Exception]) -> None:
    session = cpu_session(read_engine_file(bundled_engine_path()).payload)
    running, _ = network(spec, FailingSession(session, message))
    memory = np.zeros(spec.n_mels * spec.n_frames, np.float32)
    with pytest.raises(error, match=message.split(";", maxsplit=1)[0]):
        running.enqueue(0, 1, memory.ctypes.data, memory.ctypes.data, CALLER)


def test_the_provider_searches_no_algorithms_and_finds_pips_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Session:
        def __init__(self, _model: bytes, _options: Any, providers: Any) -> None:
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: asked.append("preloaded"), raising=False)
    onnxruntime_cuda.open_session(b"", 0, OWN)
    assert asked[0] == "preloaded"
    ((_, options),) = asked[1]
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["user_compute_stream"] == str(OWN)
    onnxruntime_cuda.open_session(b"", 1)
    ((_, options),) = asked[-1]
    assert options["device_id"] == "1"
    assert "user_compute_stream" not in options


def test_the_cpu_serves_where_the_provider_is_missing() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here; tests/gpu covers it")
    assert not is_usable()
    bundled = replace(read_engine_file(bundled_engine_path()), backend="onnxruntime")
    assert isinstance(open_engine(bundled), OnnxRuntimeEngine)


def test_a_provider_without_the_rest_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_cuda, "require_cuda_kernels", lambda: None)
    monkeypatch.setattr(cuda_driver, "_is_there", lambda _module: False)
    cuda_driver._load.cache_clear()
    assert not is_usable()
    assert (
        "onnxruntime-gpu is installed, but the engine runs on the CPU: the GPU path needs the package cuda-bindings"
        in caplog.text
    )
