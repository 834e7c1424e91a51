"""Rewrites of the waist for ONNX Runtime's CPU provider: the same codes and scales behind operators it executes well.

Codes are read where they lie; only absmax values of double quantization are written anew. Figures are of ONNX Runtime
1.31 on a processor with VNNI and AMX, fp32 = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.exporters.graph_edit import Adder, dequantized_int8, only_user, swap
from intaglio.exporters.onnxruntime_late import FP8, late_conv_and_fp8, late_int8_products
from intaglio.quantize.nf4 import GROUP, dynamic_map
from intaglio.quantize.rewrite import DOMAIN, NF4_NODE, drop_unused, insert, register

MICROSOFT = "com.microsoft"
NF4 = 1  # quant_type of MatMulBnb4; 0 is fp4
MIDDLE = np.uint8(128)  # zero point of activations: s8 code q is u8 code q + 128
FAR = np.iinfo(np.int64).max  # a Slice's "to the end"


def lower_graph(model: ir.Model, activations: str) -> dict[str, int]:
    """Apply every pass that the graph needs, in place; how many nodes each rewrote, without those that rewrote none.

    Args:
        model: the waist.
        activations: the component's activation arithmetic, a row of the recipe.
    """
    passes = dict(PASSES)
    if activations == "dynamic-per-token":  # MatMulNBits then computes in int8 and is fast
        del passes[INT8_PRODUCTS]
    counts = {name: apply(model) for name, apply in passes.items()}
    drop_unused(model)
    if activations == "static":
        state_zero_points(model)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.graph.opset_imports[MICROSOFT] = 1
    if not any(node.domain == DOMAIN for node in model.graph):
        model.graph.opset_imports.pop(DOMAIN, None)
    return {name: count for name, count in counts.items() if count}


def nf4_products(model: ir.Model) -> int:
    """``DequantizeNF4 -> MatMul`` as MatMulBnb4, which has bitsandbytes' order and the same 16 values: 0.85 to 1.04."""
    count = 0
    for node in [n for n in model.graph if n.op_type == NF4_NODE and n.domain == DOMAIN]:
        codes, *rest = node.inputs
        attributes = {name: node.attributes[name].as_int() for name in ("K", "N", "block_size")}
        absmax = rest[0] if len(rest) == 1 else _absmax(model, codes, rest)
        for use in list(node.outputs[0].uses()):
            matmul = use.node
            inputs, options = [matmul.inputs[0], codes, absmax], {**attributes, "quant_type": NF4}
            made = ir.node("MatMulBnb4", inputs, options, domain=MICROSOFT)
            swap(model, matmul, made)
            count += 1
    return count


def _absmax(model: ir.Model, codes: ir.Value, parts: list[Any]) -> ir.Value:
    """The initializer [blocks] that double quantization's codes, scales and offset stand for."""
    stored, scale, offset = (value.const_value for value in parts)

    def read() -> ir.Tensor:
        index = stored.numpy()
        return ir.tensor(dynamic_map()[index] * np.repeat(scale.numpy(), GROUP)[: index.size] + offset.numpy())

    name = f"{codes.name}.absmax"
    return register(
        model, name, ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=stored.shape, cache=False, name=name)
    )


def int8_activations(model: ir.Model) -> int:
    """Static int8: codes + 128 with zero point 128, and MatMulIntegerToFloat, 4 to 6 times as fast as fp32.

    ONNX Runtime makes that operator itself from the waist's form, but not of 2-D inputs, and with s8 activations it
    takes 4.5 times as long as fp32. u8 = s8 + 128 holds for every value, the ends of the range included.
    """
    middle, count = None, 0
    for node in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        zero, users = node.inputs[2], [u.node for u in node.outputs[0].uses()]
        if not _is_zero_int8(zero) or not users or any(u.op_type != "DequantizeLinear" for u in users):
            continue
        if middle is None:
            middle = register(model, "onnxruntime.middle", ir.tensor(MIDDLE, name="onnxruntime.middle"))
        node.replace_input_with(2, middle)
        node.outputs[0].dtype = ir.DataType.UINT8
        for dequantize in users:
            dequantize.replace_input_with(2, middle)
            for use in list(dequantize.outputs[0].uses()):
                build = INTEGER.get(use.node.op_type) if use.idx == 0 else None
                count += bool(build and build(model, use.node, node, middle))
    return count


def _is_zero_int8(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.INT8
        and not value.const_value.numpy().any()
    )


def _integer_matmul(model: ir.Model, matmul: ir.Node, quantize: ir.Node, middle: ir.Value) -> bool:
    """A MatMul of a quantized input with int8 codes [K, N]; a bias that is added at once goes along."""
    weight = dequantized_int8(matmul, 1)
    if weight is None:
        return False
    codes, scale = weight
    follower = only_user(matmul.outputs[0])
    bias = _bias(follower, matmul.outputs[0], int(codes.shape[1])) if follower is not None else None
    made = _product(quantize.outputs[0], codes, (quantize.inputs[1], scale, middle), bias)
    if bias is not None and follower is not None:
        swap(model, follower, made)
        model.graph.remove(matmul, safe=True)
    else:
        swap(model, matmul, made)
    return True


def _integer_conv(model: ir.Model, conv: ir.Node, quantize: ir.Node, middle: ir.Value) -> bool:
    """A convolution as one integer product over its unfolded input, channels last.

    1.5 to 5 times as fast as fp32 from [2, 128, 8, 8] to [1, 256, 128, 128] with 3x3 kernels, and the integers are
    those of the waist. ConvInteger takes 5 times as long as fp32; Conv on the dequantized input 1.3 times; QLinearConv
    is as fast but rounds its output to eight bits, which the waist does not. The unfolded input takes one byte per tap.
    """
    weight, attributes = dequantized_int8(conv, 1), conv.attributes
    if weight is None or attributes.get_int("group", 1) != 1 or attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    codes, scale = weight
    outputs, _, *kernel = (int(d) for d in codes.shape)
    axes = len(kernel)
    last, first = [0, *range(2, axes + 2), 1], [0, axes + 1, *range(1, axes + 1)]
    add = Adder(model, conv)
    value = add("Transpose", quantize.outputs[0], perm=last)
    pads = list(attributes.get_ints("pads", [0] * 2 * axes))
    if any(pads):  # with the code of 0.0
        value = add("Pad", value, add.constant([0, *pads[:axes], 0, 0, *pads[axes:], 0]), middle)
    value = _unfold(add, value, kernel, attributes)
    turned = add("Transpose", codes, perm=[*range(2, axes + 2), 1, 0])  # ONNX Runtime does this once, at load
    rows = add("Reshape", turned, add.constant([-1, outputs]))
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    made = _product(value, rows, (quantize.inputs[1], scale, middle), bias)
    swap(model, conv, ir.node("Transpose", [insert(model, conv, made, ir.DataType.FLOAT)], {"perm": first}))
    return True


def _unfold(add: Adder, value: ir.Value, kernel: list[int], attributes: Any) -> ir.Value:
    """[B, H, W, C] to [B, H', W', taps * C]: what each output position sees, one Slice for each tap of the kernel."""
    axes = len(kernel)
    steps = list(attributes.get_ints("strides", [1] * axes))
    gaps = list(attributes.get_ints("dilations", [1] * axes))
    taps = []
    for tap in product(*(range(size) for size in kernel)):
        starts = [t * gap for t, gap in zip(tap, gaps, strict=True)]
        behind = [(size - 1 - t) * gap for size, t, gap in zip(kernel, tap, gaps, strict=True)]
        if any(starts) or any(behind) or any(s != 1 for s in steps):
            ends = [-count if count else FAR for count in behind]
            bounds = (add.constant(v) for v in (starts, ends, list(range(1, axes + 1)), steps))
            taps.append(add("Slice", value, *bounds))
        else:
            taps.append(value)
    return add("Concat", *taps, axis=-1) if len(taps) > 1 else taps[0]


def _product(
    value: ir.Value, codes: ir.Value, numbers: tuple[ir.Value | None, ir.Value, ir.Value], bias: ir.Value | None
) -> ir.Node:
    """MatMulIntegerToFloat of u8 `value` and s8 `codes`; `numbers` are both scales and the zero point of `value`."""
    return ir.node("MatMulIntegerToFloat", [value, codes, *numbers, None, bias], domain=MICROSOFT)


INTEGER: Mapping[str, Callable[[ir.Model, ir.Node, ir.Node, ir.Value], bool]] = {
    "MatMul": _integer_matmul,
    "Conv": _integer_conv,
}


def fp8_activations(model: ir.Model) -> int:
    """Static fp8: DequantizeLinear of an input as Cast and Mul, bit for bit the same.

    ONNX Runtime 1.31 fuses the waist's form to MatMulIntegerToFloat, finds that it has no such kernel and refuses.
    """
    count = 0
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear"]:
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or source.op_type != "QuantizeLinear" or zero is None or zero.dtype not in FP8:
            continue
        value = insert(
            model, node, ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT.value}), ir.DataType.FLOAT
        )
        swap(model, node, ir.node("Mul", [value, node.inputs[1]]))
        count += 1
    return count


def table_lookups(model: ir.Model) -> int:
    """``Gather(DequantizeLinear(codes, scale), ids)``: look up codes and scales, then multiply; bit for bit the same.

    ONNX Runtime would decode the whole table on every call.
    """
    count = 0
    for node in [n for n in model.graph if n.op_type == "Gather"]:
        weight = dequantized_int8(node, 0)
        if weight is None or node.attributes.get_int("axis", 0) != 0:
            continue
        (codes, scale), ids, add = weight, node.inputs[1], Adder(model, node)
        value = add("Cast", add("Gather", codes, ids, axis=0), to=ir.DataType.FLOAT.value)
        scales = add("Unsqueeze", add("Gather", scale, ids, axis=0), add.constant([-1]))
        swap(model, node, ir.node("Mul", [value, scales]))
        count += 1
    return count


def state_zero_points(model: ir.Model) -> None:
    """Give int8 weights that are decoded the zero point 0 of each channel.

    The setting that keeps products exact on processors without VNNI moves all int8 weights to uint8, and ONNX Runtime
    1.31 invents a scalar zero point for those that have none, which it then refuses. It writes each one anew under a
    name made of the old one and refuses a second of that name, so that no two weights share theirs.
    """
    for index, node in enumerate([n for n in model.graph if n.op_type == "DequantizeLinear"]):
        codes = node.inputs[0]
        if len(node.inputs) > 2 or codes is None or codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        if node.inputs[1].shape == ():  # one scale: the scalar it invents is right
            continue
        channels = int(codes.const_value.shape[node.attributes.get_int("axis", 1)])
        name = f"onnxruntime.zeros_{index}"
        node.resize_inputs(3)
        node.replace_input_with(2, register(model, name, ir.tensor(np.zeros(channels, np.int8), name=name)))


def _bias(node: ir.Node, value: ir.Value, channels: int) -> ir.Value | None:
    """What an Add adds to `value`, where that is a stored vector [channels]."""
    if node.op_type != "Add":
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if other is None or other.shape is None or tuple(other.shape) != (channels,):
        return None
    cast = other.producer()
    stored = other if cast is None else cast.inputs[0] if cast.op_type == "Cast" else None
    return other if stored is not None and stored.const_value is not None else None


INT8_PRODUCTS = "int8 weights decoded just before use"
PASSES: dict[str, Callable[[ir.Model], int]] = {
    "nf4 to MatMulBnb4": nf4_products,
    "static int8 to MatMulIntegerToFloat": int8_activations,
    "static fp8 to Cast and Mul": fp8_activations,
    "table look-ups of codes": table_lookups,
    "fp8 and convolution weights decoded just before use": late_conv_and_fp8,
    INT8_PRODUCTS: late_int8_products,
}
