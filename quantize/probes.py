"""Small sub-graphs beside the layers of a graph that reduce what a layer meets to a few figures and sampled rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.quantize.layers import PARAMETER
from intaglio.quantize.rewrite import NHWC
from intaglio.quantize.segments import Segment

FRACTIONS = "intaglio.fractions"  # graph input: which rows are sampled, as float32 in [0, 1)
ROWS, SEED = 16, 0  # sampled of each call


@dataclass(frozen=True, slots=True)
class Watched:
    """A layer whose input is watched.

    Attributes:
        reader: what reads `value`: the MatMul or Conv, or the Transpose in front of a MatMul that was a convolution.
        value: the layer's input.
        channels_first: whether the channels of `value` are its second dimension instead of its last.
        elements: number of weights.
    """

    reader: ir.Node
    parameter: str
    value: ir.Value
    channels_first: bool
    elements: int


def fractions(call: int) -> np.ndarray:
    """Which rows of a call are sampled, float32 [ROWS] in [0, 1): the same of every tensor, others in every call."""
    return np.random.default_rng((SEED, call)).random(ROWS, dtype=np.float32)


def find_watched(model: ir.Model) -> list[Watched]:
    """Every MatMul and Conv of a parameter, in graph order; its weight may be behind a Cast or a DequantizeLinear."""
    found = []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Conv") else None
        maker = weight.producer() if weight is not None else None
        source = maker.inputs[0] if maker is not None and maker.op_type in ("Cast", "DequantizeLinear") else weight
        if source is None or source.const_value is None or PARAMETER not in source.metadata_props:
            continue
        shape = tuple(int(d) for d in source.const_value.shape)
        turned = node.inputs[0].producer() if node.inputs[0] is not None else None
        # Quantization puts such a Transpose in front of a 1x1 convolution; behind it one tensor has several names.
        split = (
            turned is not None
            and turned.op_type == "Transpose"
            and list(turned.attributes.get_ints("perm", ())) == NHWC
        )
        reader = turned if split and turned is not None else node
        if len(shape) > 1 and reader.inputs[0] is not None:
            first = split or node.op_type == "Conv"
            found.append(Watched(reader, source.metadata_props[PARAMETER], reader.inputs[0], first, math.prod(shape)))
    return found


class Probes:
    """The small sub-graphs that watch the inputs of some layers; a tensor that is `known` is not watched again."""

    def __init__(self, layers: Sequence[Watched], known: Iterable[str] = ()) -> None:
        self.inputs: dict[str, str] = {}  # key of the outputs to tensor
        self.products: dict[str, str] = {}  # parameter of a convolution to the output that counts its rows
        self.before: dict[ir.Node, list[ir.Node]] = {}  # nodes to run in front of a layer
        self.after: dict[ir.Node, list[ir.Node]] = {}
        self.outputs: list[ir.Value] = []
        self.constants: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.fractions = ir.Value(name=FRACTIONS, shape=ir.Shape([ROWS]), type=ir.TensorType(ir.DataType.FLOAT))
        seen = set(known)
        for number, layer in enumerate(layers):
            key, name = f"intaglio.{number}", str(layer.value.name)
            if name not in seen:
                seen.add(name)
                self.inputs[key] = name
                self.watch(layer.value, key, channels_first=layer.channels_first)
                self.before[layer.reader], self.nodes = self.nodes, []
            if layer.reader.op_type == "Conv":
                self.products[layer.parameter] = f"{key}.products"
                self.count(layer.reader.outputs[0], f"{key}.products")
                self.after[layer.reader], self.nodes = self.nodes, []

    def instrumented(self, part: Segment) -> Segment:
        """The segment with the probes, each beside its layer, so that no tensor is kept until the end."""
        nodes = (n for node in part.nodes for n in (*self.before.get(node, ()), node, *self.after.get(node, ())))
        return dataclasses.replace(
            part,
            nodes=tuple(nodes),
            inputs=(*part.inputs, self.fractions) if self.inputs else part.inputs,
            outputs=(*part.outputs, *self.outputs),
        )

    def constant(self, name: str, values: Any) -> ir.Value:
        """An int64 initializer, made once."""
        if name not in self.constants:
            array = np.array(values, np.int64)
            value = ir.Value(name=f"intaglio.constant.{name}", type=ir.TensorType(ir.DataType.INT64))
            value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
            self.constants[name] = value
        return self.constants[name]

    def op(self, key: str, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """A further node of the probe `key`."""
        node = ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"{key}.value.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def output(self, value: ir.Value, name: str, dtype: ir.DataType) -> None:
        """Make a value an output."""
        value.name, value.dtype = name, dtype
        self.outputs.append(value)

    def watch(self, value: ir.Value, key: str, *, channels_first: bool) -> None:
        """Peak, sum of squares, number of rows and sampled rows of a tensor."""
        last = self.op(key, "Transpose", value, perm=NHWC) if channels_first else value
        channels = self.op(key, "Shape", last, start=-1)
        flat = self.op(key, "Reshape", last, self.op(key, "Concat", self.constant("rest", [-1]), channels, axis=0))
        axis = self.constant("axis", [0])
        peak = self.op(key, "ReduceMax", self.op(key, "Abs", flat), axis, keepdims=0)
        self.output(peak, f"{key}.peak", ir.DataType.FLOAT)
        square = self.op(key, "ReduceSumSquare", flat, axis, keepdims=0)
        self.output(square, f"{key}.square", ir.DataType.FLOAT)
        length = self.op(key, "Shape", flat, end=1)
        self.output(self.op(key, "Squeeze", length), f"{key}.rows", ir.DataType.INT64)
        real = self.op(key, "Mul", self.fractions, self.op(key, "Cast", length, to=ir.DataType.FLOAT.value))
        picks = self.op(key, "Cast", self.op(key, "Floor", real), to=ir.DataType.INT64.value)
        self.output(self.op(key, "Gather", flat, picks, axis=0), f"{key}.samples", ir.DataType.FLOAT)

    def count(self, value: ir.Value, key: str) -> None:
        """Rows of a convolution's output [B, M, H, W]: B H W."""
        shape = self.op(key, "Shape", value)
        sides = self.op(key, "Gather", shape, self.constant("sides", [0, 2, 3]), axis=0)
        self.output(self.op(key, "ReduceProd", sides, keepdims=0), key, ir.DataType.INT64)
