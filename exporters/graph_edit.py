"""Small edits of a graph that the lowerings for ONNX Runtime are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.quantize.rewrite import register, replace_uses


class Adder:
    """Inserts nodes in front of `place`."""

    def __init__(self, model: ir.Model, place: ir.Node) -> None:
        self.model, self.place = model, place

    def __call__(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Insert a node; its output."""
        node = ir.node(op, list(inputs), attributes)
        self.model.graph.insert_before(self.place, node)
        return node.outputs[0]

    def constant(self, numbers: list[int]) -> ir.Value:
        """An int64 initializer; equal ones are one."""
        name = "onnxruntime." + "_".join(str(n) for n in numbers)
        known = self.model.graph.initializers.get(name)
        return (
            known
            if known is not None
            else register(self.model, name, ir.tensor(np.array(numbers, np.int64), name=name))
        )


def dequantized_int8(node: ir.Node, index: int) -> tuple[ir.Value, ir.Value] | None:
    """Codes and scales of an input that is an int8 initializer dequantized per channel."""
    value = node.inputs[index]
    source = value.producer() if value is not None else None
    if source is None or source.op_type != "DequantizeLinear" or "block_size" in source.attributes:
        return None
    codes, scale = source.inputs[:2]
    if codes is None or scale is None or codes.const_value is None or codes.dtype != ir.DataType.INT8:
        return None
    return codes, scale


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value which is no output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def swap(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Put `new` where `old` was."""
    value, made = old.outputs[0], new.outputs[0]
    model.graph.insert_before(old, new)
    made.type, made.shape = value.type, value.shape
    replace_uses(model, value, made)
    model.graph.remove(old, safe=True)
