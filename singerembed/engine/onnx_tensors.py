"""Reads the weights of an ONNX model without the package onnx, which only building an engine may need.

An ONNX model is a protobuf message; of its schema (onnx.proto) a handful of fields are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import EngineError
from singerembed.model.protobuf import fields, varint

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # of ModelProto, of GraphProto
_INPUT, _OUTPUT, _OPERATOR = 1, 2, 4  # of NodeProto
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9  # of TensorProto
_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2")}
_LAYERS, _COPIES = {"Conv", "Gemm"}, {"Identity", "Cast"}
_Node = tuple[str, list[str], list[str]]  # operator, inputs, outputs
_HALVED = "_fp16"  # the suffix that precision.store_halved gives a weight


def read_layers(model: bytes) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return weights and bias of each convolution and dense layer of an ONNX model, in the order of its graph.

    By the graph and not by name: exporters store equal tensors once. Raises EngineError if the model is damaged, or a
    layer's weights are none of its constants.
    """
    tensors, nodes = _read(model)
    source = {outputs[0]: inputs[0] for kind, inputs, outputs in nodes if kind in _COPIES and inputs}

    def constant(name: str) -> NDArray[np.float32]:
        while name not in tensors and name in source:
            name = source[name]
        return tensors[name]

    try:
        return [(constant(inputs[1]), constant(inputs[2])) for kind, inputs, _ in nodes if kind in _LAYERS]
    except (KeyError, IndexError) as exc:
        raise EngineError(f"the engine's network has a layer without constant weights and bias: {exc}") from exc


def _read(model: bytes) -> tuple[dict[str, NDArray[np.float32]], list[_Node]]:
    """The floating-point weights of an ONNX model by name, as float32, and its nodes."""
    try:
        tensors: dict[str, NDArray[np.float32]] = {}
        nodes = []
        for graph in _messages(memoryview(model), _GRAPH):
            for encoded in _messages(graph, _INITIALIZER):
                _add_tensor(encoded, tensors)
            nodes += [_node(encoded) for encoded in _messages(graph, _NODE)]
        return tensors, nodes
    except (ValueError, IndexError, TypeError) as exc:
        raise EngineError(f"the engine's network cannot be read: {exc}") from exc


def _node(encoded: memoryview) -> _Node:
    texts: dict[int, list[str]] = {_INPUT: [], _OUTPUT: [], _OPERATOR: []}
    for field, value in fields(encoded):
        if field in texts and not isinstance(value, int):
            texts[field].append(bytes(value).decode())
    return "".join(texts[_OPERATOR]), texts[_INPUT], texts[_OUTPUT]


def _add_tensor(encoded: memoryview, tensors: dict[str, NDArray[np.float32]]) -> None:
    name, kind, shape, raw = "", 0, [], memoryview(b"")
    for field, value in fields(encoded):
        if field == _DIMS:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif field == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == _NAME and not isinstance(value, int):
            name = bytes(value).decode()
        elif field == _RAW_DATA and not isinstance(value, int):
            raw = value
    if kind not in _TYPES:
        return
    if len(raw) != math.prod(shape) * _TYPES[kind].itemsize:
        raise ValueError(f"{len(raw)} bytes in {name}, which is {shape}")
    values = np.frombuffer(raw, _TYPES[kind]).astype(np.float32)
    tensors[name.removesuffix(_HALVED)] = values.reshape(shape)


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in fields(message):
        if field == wanted and not isinstance(value, int):
            yield value


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = varint(packed, at)
        yield value
