"""Turns the encoder's FP32 ONNX model into a strongly typed FP16 one. Needs onnx."""

from __future__ import annotations

from typing import Any

import numpy as np

from singerembed.errors import EngineError, MissingDependencyError

_POOLING = "GlobalAveragePool"


def to_fp16(model: bytes) -> bytes:
    """The model with FP16 input, weights and activations; from the last pooling on, and in its output, FP32.

    The types say it all (strong typing): TensorRT 11 and TensorRT for RTX have no flags that would choose a precision.
    The tail is a few thousand numbers a crop, so that FP32 costs nothing there and the embedding is rounded once less.
    Raises EngineError for a weight beyond the range of FP16 and a model that is not the encoder's.
    """
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as exc:
        raise MissingDependencyError("building an FP16 engine", "onnx", "build") from exc
    proto = onnx.load_from_string(model)
    graph = proto.graph
    pools = [i for i, node in enumerate(graph.node) if node.op_type == _POOLING]
    if len(graph.input) != 1 or len(graph.output) != 1 or not pools:
        raise EngineError(f"this is not the encoder's network: it needs one input, one output and a {_POOLING}")
    head, tail = graph.node[: pools[-1]], graph.node[pools[-1] :]
    kept = {name for node in tail for name in node.input}

    def halve(tensor: Any) -> None:
        if tensor.data_type != TensorProto.FLOAT:
            return
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise EngineError(
                f"weight {tensor.name} reaches {np.abs(values).max():g}, beyond FP16. Build with --precision fp32"
            )
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))

    for tensor in graph.initializer:
        if tensor.name not in kept:
            halve(tensor)
    for node in head:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                halve(attribute.t)
    graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]  # of FP32
    pooled = tail[0].input[0]
    tail[0].input[0] = f"{pooled}_fp32"
    cast = helper.make_node("Cast", [pooled], [f"{pooled}_fp32"], to=TensorProto.FLOAT)
    graph.node.insert(pools[-1], cast)
    onnx.checker.check_model(proto, full_check=True)  # infers every type, so that a mixture is found here
    return bytes(proto.SerializeToString())
