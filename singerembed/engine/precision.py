"""Halves the encoder's FP32 ONNX model: in arithmetic and storage, or in storage alone. Needs onnx."""

from __future__ import annotations

from typing import Any

import numpy as np

from singerembed.errors import EngineError, MissingDependencyError

_POOLING = "GlobalAveragePool"
_LARGE = 1024  # numbers: smaller tensors are not worth a node


def to_fp16(model: bytes) -> bytes:
    """The model with FP16 input, weights and activations; from the last pooling on, and in its output, FP32.

    The types say it all (strong typing): TensorRT 11 and TensorRT for RTX have no flags that would choose a precision.
    The tail is a few thousand numbers a crop, so that FP32 costs nothing there and the embedding is rounded once less.
    Raises EngineError for a weight beyond the range of FP16 and a model that is not the encoder's.
    """
    onnx = _require_onnx()
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(model)
    graph = proto.graph
    pools = [i for i, node in enumerate(graph.node) if node.op_type == _POOLING]
    if len(graph.input) != 1 or len(graph.output) != 1 or not pools:
        raise EngineError(f"this is not the encoder's network: it needs one input, one output and a {_POOLING}")
    head, tail = graph.node[: pools[-1]], graph.node[pools[-1] :]
    kept = {name for node in tail for name in node.input}

    for tensor in graph.initializer:
        if tensor.name not in kept:
            _halve(tensor)
    for node in head:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _halve(attribute.t)
    graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]  # of FP32
    pooled = tail[0].input[0]
    tail[0].input[0] = f"{pooled}_fp32"
    cast = helper.make_node("Cast", [pooled], [f"{pooled}_fp32"], to=TensorProto.FLOAT)
    graph.node.insert(pools[-1], cast)
    onnx.checker.check_model(proto, full_check=True)  # infers every type, so that a mixture is found here
    return bytes(proto.SerializeToString())


def store_halved(model: bytes) -> bytes:
    """The model with its weights rounded to FP16 in the file, and all arithmetic in FP32: half as many bytes.

    A back end widens them when it loads the model. Raises EngineError for a weight beyond the range of FP16.
    """
    onnx = _require_onnx()
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        name = tensor.name
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= _LARGE:
            _halve(tensor)
            tensor.name = f"{name}_fp16"
            proto.graph.node.insert(0, helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def _halve(tensor: Any) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise EngineError(
            f"weight {tensor.name} reaches {np.abs(values).max():g}, beyond FP16. Build with --precision fp32"
        )
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _require_onnx() -> Any:
    try:
        import onnx
    except ImportError as exc:
        raise MissingDependencyError("building an FP16 engine", "onnx", "build") from exc
    return onnx
