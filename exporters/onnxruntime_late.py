"""Weights that ONNX Runtime's CPU provider decodes on every call: late, one at a time, and as fast as it can.

ONNX Runtime runs first whatever needs no input, which is every DequantizeLinear of a weight: all weights then lie in
float32 at the same time. Here each of them waits for the input it meets (24 convolutions of 320 channels: peak 224 MB,
67 so, 201 in fp32). Figures are of ONNX Runtime 1.31.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from intaglio.exporters.graph_edit import Adder, only_user
from intaglio.quantize.rewrite import insert, replace_uses

FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def late_conv_and_fp8(model: ir.Model) -> int:
    """int8 weights of float convolutions, and fp8 weights: their scales are multiplied with 1.0, no value changes."""
    ones, count = Ones(), 0
    for node, value in _decoded(model, lambda node, dtype: dtype in FP8 or node.op_type == "Conv"):
        one = ones.behind(model, node, value)
        scale = insert(model, node, ir.node("Mul", [node.inputs[1], one]), ir.DataType.FLOAT)
        node.replace_input_with(1, scale)
        count += 1
    model.graph.sort()
    return count


def late_int8_products(model: ir.Model) -> int:
    """int8 weights of matrix products with exact activations: ``(x @ codes) * scale``.

    With a scale for each column ONNX Runtime decodes value by value; with 1.0 for all and the columns' scales behind
    the product, as fast as it reads: [1, 1536] x [1536, 9216] takes 12 ms instead of 29, [77, 768] x [768, 3072] 6.5
    instead of 9.4 (fp32: 4.1 and 3.2). MatMulNBits has no kernel of eight bits in exact arithmetic: it decodes on every
    call too and keeps a transposed copy.
    """
    ones, count = Ones(), 0
    for node, value in _decoded(model, lambda node, dtype: dtype == ir.DataType.INT8 and node.op_type == "MatMul"):
        codes, scale = node.inputs[:2]
        matmul, one = node.outputs[0].uses()[0].node, ones.behind(model, node, value, scalar=True)
        made = insert(model, node, ir.node("DequantizeLinear", [codes, one]), ir.DataType.FLOAT, node.outputs[0].shape)
        matmul.replace_input_with(1, made)
        model.graph.remove(node, safe=True)
        out, product = matmul.outputs[0], ir.node("Mul", [matmul.outputs[0], scale])
        model.graph.insert_after(matmul, product)
        product.outputs[0].type, product.outputs[0].shape = out.type, out.shape
        replace_uses(model, out, product.outputs[0], but=product)
        count += 1
    model.graph.sort()
    return count


def _decoded(
    model: ir.Model, chosen: Callable[[ir.Node, ir.DataType | None], bool]
) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every DequantizeLinear of a weight that one chosen node reads, with the value the weight has to wait for."""
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear"]:
        codes, user = node.inputs[0], only_user(node.outputs[0])
        if user is None or codes is None or codes.const_value is None or "block_size" in node.attributes:
            continue
        value = user.inputs[0]
        if value is None or node.outputs[0] is value or not chosen(user, codes.dtype):
            continue
        source = value.producer()
        if source is not None and source.op_type == "DequantizeLinear":  # ONNX Runtime copies those of two readers
            value = source.inputs[0]
        assert value is not None
        yield node, value


class Ones:
    """1.0 behind values, made once for each: the sign of the batch size."""

    def __init__(self) -> None:
        self.made: dict[tuple[ir.Value, bool], ir.Value] = {}

    def behind(self, model: ir.Model, place: ir.Node, value: ir.Value, *, scalar: bool = False) -> ir.Value:
        """float32 [1], or [] where `scalar`: 1.0, known once `value` is."""
        if (value, scalar) not in self.made:
            add = Adder(model, place)
            sign = add("Sign", add("Shape", value, start=0, end=1))
            one = add("Cast", sign, to=ir.DataType.FLOAT.value)
            if scalar:
                one = add("Squeeze", one)
                one.dtype, one.shape = ir.DataType.FLOAT, ir.Shape(())
            self.made[value, scalar] = one
        return self.made[value, scalar]
