"""Replace weights of an ONNX graph by codes and DequantizeLinear: the one quantized graph every target lowers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.quantize.formats import codec

FORMAT, SCALE, AXIS = "intaglio.format", "intaglio.scale", "intaglio.axis"
PARAMETER = "intaglio.parameter"  # metadata of a graph value: the checkpoint parameter it came from
SMALLEST = 4096  # elements; below, scales and nodes cost more than the codes save
CHANNEL_AXIS = {"MatMul": 1, "Conv": 0}  # output channels: MatMul weights are [K, N], Conv weights [M, C, kH, kW]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Weight elements in MatMul and Conv, and how many of them are quantized."""

    eligible: int
    quantized: int

    @property
    def share(self) -> float:
        """Quantized share, 0 to 1."""
        return self.quantized / self.eligible if self.eligible else 0.0


def quantize_graph(model: ir.Model, name: str, keep: Iterable[str] = ()) -> Coverage:
    """Quantize every MatMul and Conv weight of a graph in place to the format `name`.

    Each weight initializer becomes codes, float32 scales and one DequantizeLinear with one consumer. Values stay lazy:
    codes are computed when the graph is written. `keep` are glob patterns of parameter names that stay as they are.
    """
    eligible = quantized = 0
    for node in list(model.graph):
        value = node.inputs[1] if node.op_type in CHANNEL_AXIS and len(node.inputs) > 1 else None
        if value is None or PARAMETER not in value.metadata_props or value.const_value is None:
            continue
        count = int(np.prod(value.const_value.shape.numpy()))
        eligible += count
        parameter = value.metadata_props[PARAMETER]
        if count < SMALLEST or any(fnmatch.fnmatch(parameter, pattern) for pattern in keep):
            continue
        _replace_weight(model, node, value, name)
        quantized += count
    if quantized:
        model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), 21)
    return Coverage(eligible=eligible, quantized=quantized)


def _replace_weight(model: ir.Model, node: ir.Node, value: ir.Value, name: str) -> None:
    axis, source, pair = CHANNEL_AXIS[node.op_type], value.const_value, codec(name)
    channels = int(source.shape[axis])

    def encode(part: int) -> Any:
        return lambda: ir.tensor(np.ascontiguousarray(pair.encode(source.numpy(), axis)[part]))

    codes = _initializer(model, f"{value.name}.{name}", encode(0), ir.DataType.INT8, tuple(source.shape.numpy()))
    scale = _initializer(model, f"{value.name}.{name}.scale", encode(1), ir.DataType.FLOAT, (channels,))
    codes.metadata_props.update(value.metadata_props)
    codes.metadata_props.update({FORMAT: name, SCALE: str(scale.name), AXIS: str(axis)})
    dequantize = ir.node("DequantizeLinear", [codes, scale], {"axis": axis})
    dequantize.outputs[0].dtype, dequantize.outputs[0].shape = ir.DataType.FLOAT, source.shape
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(1, dequantize.outputs[0])
    if not value.uses():
        del model.graph.initializers[value.name]


def _initializer(model: ir.Model, name: str, read: Any, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    tensor = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    model.graph.register_initializer(value)
    return value
