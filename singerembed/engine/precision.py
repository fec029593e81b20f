"""Converts the encoder's FP32 ONNX model to FP16, in arithmetic and storage or in storage alone. Needs onnx."""

from __future__ import annotations

from typing import Any

import numpy as np

from singerembed.errors import EngineError, MissingDependencyError

_CONVOLUTION, _POOLING = "Conv", "GlobalAveragePool"
_MIN_ELEMENTS = 1024  # smaller tensors are not worth a Cast node


def to_fp16(model: bytes) -> bytes:
    """Return the model in FP16 from the first convolution to the last pooling, weights and activations, else in FP32.

    TensorRT 11 and TensorRT for RTX are strongly typed: precision comes from the tensor types, not from builder flags.
    The normalisation before the first convolution is FP32, because it can leave the range of FP16; what is cast is
    clamped to that range. The part after the pooling handles a few thousand numbers per crop, so FP32 costs nothing
    there and the embedding is rounded once less. Raises EngineError for a weight beyond the range of FP16, and for
    another network.
    """
    onnx = _require_onnx()
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.load_from_string(model)
    graph = proto.graph
    pools = [i for i, node in enumerate(graph.node) if node.op_type == _POOLING]
    convolutions = [i for i, node in enumerate(graph.node) if node.op_type == _CONVOLUTION]
    if len(graph.input) != 1 or len(graph.output) != 1 or not pools or not convolutions:
        raise EngineError(f"this is not the encoder's network: it needs one input, one output and a {_POOLING}")
    first, last = convolutions[0], pools[-1]
    before, halved, after = graph.node[:first], graph.node[first:last], graph.node[last:]
    kept = {name for node in (*before, *after) for name in node.input}

    for tensor in graph.initializer:
        if tensor.name not in kept:
            _halve(tensor)
    for node in halved:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _halve(attribute.t)
    del graph.value_info[:]  # they name FP32 types
    pooled = after[0].input[0]
    after[0].input[0] = f"{pooled}_fp32"
    graph.node.insert(last, helper.make_node("Cast", [pooled], [f"{pooled}_fp32"], to=TensorProto.FLOAT))
    normalised = halved[0].input[0]
    halved[0].input[0] = f"{normalised}_fp16"
    largest = float(np.finfo(np.float16).max)
    for name, value in (("fp16_lowest", -largest), ("fp16_largest", largest)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    clamped = f"{normalised}_clamped"
    clip = helper.make_node("Clip", [normalised, "fp16_lowest", "fp16_largest"], [clamped])
    graph.node.insert(first, helper.make_node("Cast", [clamped], [f"{normalised}_fp16"], to=TensorProto.FLOAT16))
    graph.node.insert(first, clip)
    onnx.checker.check_model(proto, full_check=True)  # infers all types, and so finds operators of mixed types
    return bytes(proto.SerializeToString())


def store_halved(model: bytes) -> bytes:
    """Return the model with its weights stored as FP16 and cast to FP32: half as many bytes, arithmetic in FP32.

    A back end folds the casts when it loads the model. Raises EngineError for a weight beyond the range of FP16.
    """
    onnx = _require_onnx()
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        name = tensor.name
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= _MIN_ELEMENTS:
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
