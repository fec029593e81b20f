"""The FP16 network: types, range, and its error against the official pipeline, by two runtimes on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Golden
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tolerances import EMBEDDING_COSINE_FP16

from singerembed.engine.file import read_engine_file
from singerembed.engine.precision import store_halved, to_fp16
from singerembed.errors import EngineError
from singerembed.model.spec import ModelSpec


@pytest.fixture(scope="module")
def fp32(reference_engine: str) -> bytes:
    return read_engine_file(reference_engine).payload


@pytest.fixture(scope="module")
def log_mel(golden: Golden, spec: ModelSpec) -> NDArray[np.float32]:
    log_mel: NDArray[np.float32] = np.log(golden.mel + np.float32(spec.log_offset))
    normalised: NDArray[np.float32] = log_mel / log_mel.max(axis=(1, 2), keepdims=True)
    return normalised


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def test_embeddings_in_onnxruntime(fp32: bytes, log_mel: NDArray[np.float32], golden: Golden) -> None:
    """Values are rounded to FP16 between operations, sums are FP32: what tensor cores do."""
    session = onnxruntime.InferenceSession(to_fp16(fp32), providers=["CPUExecutionProvider"])
    (embedding,) = session.run(["embedding"], {"log_mel": log_mel})
    assert embedding.dtype == np.float32
    assert cosine(embedding, golden.embedding) >= EMBEDDING_COSINE_FP16


def test_embeddings_in_torch(reference_tensors: dict[str, Any], log_mel: NDArray[np.float32], golden: Golden) -> None:
    """The same encoder with every operation in FP16, the pooling and the tail too."""
    import torch

    from singerembed.engine.build import fold_batch_norm
    from singerembed.engine.torch import EncoderNet

    encoder = EncoderNet(ModelSpec(name="reference", method="untrained"))
    encoder.net.load_state_dict(reference_tensors)
    half = fold_batch_norm(encoder.eval()).half()
    with torch.inference_mode():
        embedding = half(torch.from_numpy(log_mel).half()).float().numpy()
    assert cosine(embedding, golden.embedding) >= EMBEDDING_COSINE_FP16


def test_types_are_strong(fp32: bytes) -> None:
    """FP16 from the first convolution to the last pooling, FP32 before and after, and a cast at either end."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(to_fp16(fp32)), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    of_operation: dict[str, set[int]] = {}
    for node in model.graph.node:
        of_operation.setdefault(node.op_type, set()).update(types[name] for name in node.output)
    assert of_operation["Conv"] == of_operation["Sigmoid"] == of_operation["Mul"] == {TensorProto.FLOAT16}
    assert of_operation["GlobalAveragePool"] == {TensorProto.FLOAT16, TensorProto.FLOAT}
    assert of_operation["Gemm"] == {TensorProto.FLOAT}
    assert [node.op_type for node in model.graph.node].count("Cast") == 2
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize("value", [20_000.0, 60_000.0, 1e6, -1e6])
def test_log_mels_beyond_fp16_give_numbers(fp32: bytes, log_mel: NDArray[np.float32], value: float) -> None:
    """A crop whose maximum is nearly 0 is divided by it; then the mean is taken off, and the deviation divides it."""
    session = onnxruntime.InferenceSession(to_fp16(fp32), providers=["CPUExecutionProvider"])
    extreme = log_mel[:1].copy()
    extreme[:, ::3] = value
    (embedding,) = session.run(["embedding"], {"log_mel": extreme})
    assert np.isfinite(embedding).all()


def test_stored_in_half_the_size_and_run_in_fp32(fp32: bytes, log_mel: NDArray[np.float32], golden: Golden) -> None:
    stored = store_halved(fp32)
    assert len(stored) < 0.52 * len(fp32)
    session = onnxruntime.InferenceSession(stored, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(["embedding"], {"log_mel": log_mel})
    assert cosine(embedding, golden.embedding) >= EMBEDDING_COSINE_FP16


def test_a_weight_beyond_fp16_is_refused(fp32: bytes) -> None:
    model = onnx.load_from_string(fp32)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("0.0.weight"))
    values = numpy_helper.to_array(weight).copy()
    values.flat[3] = 70_000
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(EngineError, match=r"weight .*0\.0\.weight reaches 70000, beyond FP16"):
        to_fp16(model.SerializeToString())


def test_another_network_is_refused() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [value], [value])
    with pytest.raises(EngineError, match="not the encoder's network"):
        to_fp16(helper.make_model(graph).SerializeToString())
