"""Replace weights of an ONNX graph by codes and DequantizeLinear: the one quantized graph every target lowers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.quantize.arrays import packed_nibbles
from intaglio.quantize.formats import FORMATS
from intaglio.quantize.layers import PARAMETER, Choice, Layer, find_layers
from intaglio.quantize.weight import LOW_RANK, InputScales, Weight, along_inputs

FORMAT, PARTS, SMOOTH, ACTIVATION = "intaglio.format", "intaglio.parts", "intaglio.smooth", "intaglio.activation"
TRANSFORM = "intaglio.transform"
DOMAIN, NF4_NODE = "intaglio", "DequantizeNF4"  # the one node ONNX has no operator for; every lowering replaces it
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(slots=True)
class Rewriter:
    """One pass over the layers of a graph; remembers what layers with the same input share."""

    model: ir.Model
    method: str
    rank: int
    shared: dict[tuple[int, str, bytes], ir.Value] = field(default_factory=dict)
    weights: list[Weight] = field(default_factory=list)

    def quantize(self, layer: Layer, name: str, scales: InputScales) -> None:
        """Put codes in the place of one weight."""
        rank = self.rank if layer.op == "MatMul" and FORMATS[name].low_rank else 0
        weight = Weight(layer, name, self.method, scales, min(rank, *layer.shape[:2]) if rank else 0)
        self.weights.append(weight)
        node = pointwise_to_matmul(self.model, layer) if layer.pointwise else layer.node
        initializers = self._initializers(weight)
        codes = initializers["codes"]
        codes.metadata_props[PARAMETER] = layer.parameter
        dequantized = self._dequantize(node, weight, initializers)
        if layer.op == "Gather":
            node.replace_input_with(0, dequantized)
        else:
            node.replace_input_with(1, dequantized)
            smoothed = self._smooth(node, scales, codes)
            if weight.rank:
                self._low_rank(node, smoothed, initializers)
            node.replace_input_with(0, self._activation(node, smoothed, name, scales, codes))
        parts = {role: str(v.name) for role, v in initializers.items() if role != "codes"}
        codes.metadata_props.update({FORMAT: name, PARTS: json.dumps(parts)})
        transform = "transpose" if layer.pointwise else layer.source.metadata_props.get(TRANSFORM)
        if transform:
            codes.metadata_props[TRANSFORM] = transform

    def _initializers(self, weight: Weight) -> dict[str, ir.Value]:
        base, made = f"{weight.layer.parameter}.{weight.format}", {}
        while f"{base}.codes" in self.model.graph.initializers:  # a weight of two consumers
            base += "_"
        for role, (dtype, shape) in weight.layout().items():
            made[role] = self._lazy(f"{base}.{role}", weight, role, ir.DataType[dtype], shape)
        return made

    def _lazy(self, name: str, weight: Weight, role: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        def read() -> ir.TensorProtocol:
            array = weight.tensor(role)
            if dtype == ir.DataType.INT4 and array.size % 2 == 0:
                return ir.PackedTensor(packed_nibbles(array), dtype, shape=ir.Shape(shape), name=name)
            return ir.tensor(np.ascontiguousarray(array).astype(dtype.numpy()).reshape(shape), name=name)

        tensor = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
        return register(self.model, name, tensor)

    def _dequantize(self, node: ir.Node, weight: Weight, parts: Mapping[str, ir.Value]) -> ir.Value:
        row = FORMATS[weight.format]
        stored = [v for role, v in parts.items() if role not in LOW_RANK]
        if row.storage == "UINT8":
            k, n = weight.shape
            made = ir.node(NF4_NODE, stored, {"block_size": row.block, "K": k, "N": n}, domain=DOMAIN)
            self.model.graph.opset_imports[DOMAIN] = 1
        elif row.block:
            made = ir.node("DequantizeLinear", stored, {"axis": 0, "block_size": row.block})
        else:
            made = ir.node("DequantizeLinear", stored, {"axis": weight.axis})
        return insert(self.model, node, made, ir.DataType.FLOAT, weight.shape)

    def _smooth(self, node: ir.Node, scales: InputScales, codes: ir.Value) -> ir.Value:
        value, parameter = node.inputs[0], codes.metadata_props[PARAMETER]
        if scales.smooth is None:
            return value
        factor = (1 / scales.smooth).astype(np.float32)
        if node.op_type == "Conv":
            factor = along_inputs(factor, node.inputs[1].shape.rank())[0]
        key = (id(value), "smooth", factor.tobytes())
        if key not in self.shared:
            constant = self._constant(f"{parameter}.smooth", factor)
            self.shared[key] = insert(self.model, node, ir.node("Mul", [value, constant]), value.dtype, value.shape)
        found = self.shared[key]
        codes.metadata_props[SMOOTH] = str(found.producer().inputs[1].name)
        return found

    def _activation(self, node: ir.Node, value: ir.Value, name: str, scales: InputScales, codes: ir.Value) -> ir.Value:
        row, parameter = FORMATS[name], codes.metadata_props[PARAMETER]
        if not row.static:
            return value
        assert scales.activation is not None, f"{name} was not calibrated"
        step = np.array(scales.activation, np.float32)
        key = (id(value), row.activations, step.tobytes())
        if key not in self.shared:
            dtype = ir.DataType[row.activations]
            scale = self._constant(f"{parameter}.input_scale", step)
            zero = self._constant(f"{parameter}.input_zero", np.zeros((), dtype.numpy()))
            quantized = insert(self.model, node, ir.node("QuantizeLinear", [value, scale, zero]), dtype, value.shape)
            self.shared[key] = insert(
                self.model, node, ir.node("DequantizeLinear", [quantized, scale, zero]), value.dtype, value.shape
            )
        found = self.shared[key]
        codes.metadata_props[ACTIVATION] = str(found.producer().inputs[1].name)
        return found

    def _low_rank(self, node: ir.Node, value: ir.Value, parts: Mapping[str, ir.Value]) -> None:
        """Add ``(x A) B`` to the node's output."""
        out = node.outputs[0]
        down, up = (
            insert(self.model, node, ir.node("Cast", [parts[r]], {"to": ir.DataType.FLOAT.value}), ir.DataType.FLOAT)
            for r in LOW_RANK
        )
        inner = insert(self.model, node, ir.node("MatMul", [value, down]), ir.DataType.FLOAT)
        outer = insert(self.model, node, ir.node("MatMul", [inner, up]), ir.DataType.FLOAT, out.shape)
        total = ir.node("Add", [out, outer])
        total.outputs[0].dtype, total.outputs[0].shape = ir.DataType.FLOAT, out.shape
        self.model.graph.insert_after(node, total)
        replace_uses(self.model, out, total.outputs[0], but=total)

    def _constant(self, name: str, values: np.ndarray) -> ir.Value:
        while name in self.model.graph.initializers:
            name += "_"
        return register(self.model, name, ir.tensor(values, name=name))


def quantize_graph(
    model: ir.Model,
    choices: Mapping[str, Choice],
    scales: Mapping[str, InputScales] | None = None,
    *,
    method: str = "mse",
    rank: int = 0,
) -> list[Weight]:
    """Quantize the layers of a graph in place, each to its choice; returns what will be stored.

    Values stay lazy: codes are computed when the graph is written, a weight at a time. Layers that share an input share
    its smoothing and its static scale where those are equal.

    Args:
        model: the canonical graph; half-precision weights may be behind a Cast.
        choices: format by parameter, see `intaglio.quantize.layers.assign`.
        scales: by parameter; static formats need one.
        method: ``rtn``, ``mse`` or ``awq`` (whose factors are in `scales`).
        rank: of the low-rank branch beside 4-bit, nf4, fp8 and w8a8 weights; 0: none.
    """
    rewriter = Rewriter(model, method, rank)
    for layer in find_layers(model):
        name = choices[layer.parameter].format
        if name != "none":
            rewriter.quantize(layer, name, (scales or {}).get(layer.parameter, InputScales()))
    if rewriter.weights:
        cancel_transposes(model)
        drop_unused(model)
        model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), 21)
    return rewriter.weights


def pointwise_to_matmul(model: ir.Model, layer: Layer) -> ir.Node:
    """A 1x1 convolution as Transpose, MatMul (and Add), Transpose; returns the MatMul."""
    node, out = layer.node, layer.node.outputs[0]
    k, n = layer.shape[1::-1]
    turned = insert(model, node, ir.node("Transpose", [node.inputs[0]], {"perm": NHWC}), ir.DataType.FLOAT)
    weight = ir.Value(name=f"{layer.parameter}.pointwise", shape=ir.Shape((k, n)), type=out.type)
    matmul = ir.node("MatMul", [turned, weight])  # the caller puts the codes there
    value = insert(model, node, matmul, ir.DataType.FLOAT)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = insert(model, node, ir.node("Add", [value, node.inputs[2]]), ir.DataType.FLOAT)
    back = insert(model, node, ir.node("Transpose", [value], {"perm": NCHW}), ir.DataType.FLOAT, out.shape)
    replace_uses(model, out, back)
    model.graph.remove(node, safe=True)
    return matmul


def cancel_transposes(model: ir.Model) -> None:
    """Drop pairs of Transposes that undo each other; what `pointwise_to_matmul` puts beside those of attention."""
    for node in list(model.graph):
        before = node.inputs[0].producer() if node.op_type == "Transpose" else None
        if before is None or before.op_type != "Transpose":
            continue
        first, second = (list(n.attributes["perm"].as_ints()) for n in (before, node))
        if [first[i] for i in second] == list(range(len(first))):
            replace_uses(model, node.outputs[0], before.inputs[0])


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers nobody reads, such as weights that have codes now."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)


def insert(
    model: ir.Model, before: ir.Node, node: ir.Node, dtype: ir.DataType | None, shape: Iterable[Any] | None = None
) -> ir.Value:
    """Put a node in front of another; returns its output."""
    model.graph.insert_before(before, node)
    value = node.outputs[0]
    value.dtype = dtype
    if shape is not None:
        value.shape = shape if isinstance(shape, ir.Shape) else ir.Shape(tuple(shape))
    return value


def register(model: ir.Model, name: str, tensor: Any) -> ir.Value:
    """A new initializer."""
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(value)
    return value


def replace_uses(model: ir.Model, old: ir.Value, new: ir.Value, *, but: ir.Node | None = None) -> None:
    """Let every reader of `old` (except `but`) read `new`; a graph output keeps its name."""
    for use in list(old.uses()):
        if use.node is not but:
            use.node.replace_input_with(use.idx, new)
    outputs = model.graph.outputs
    for index, value in enumerate(outputs):
        if value is old:
            old.name, new.name = f"{old.name}.before", old.name
            outputs[index] = new
