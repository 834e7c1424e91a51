"""Our graph passes, on onnx-ir: from what torch exports to the canonical form every target takes.

Canonical linear: ``MatMul(x, W[K, N])`` then ``Add``; never Gemm, never a Transpose of a weight, one initializer per
consumer. Constants are initializers, sequences are gone, small shape arithmetic is folded. No pass drops the binding
of a parameter (the metadata `PARAMETER` and `TRANSFORM` of its value).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, Sequential, common

from intaglio.quantize.layers import PARAMETER
from intaglio.quantize.rewrite import TRANSFORM
from intaglio.quantize.tensors import WeightView, values_of

FOLD_LIMIT_BYTES = 4096


def canonicalize(model: ir.Model) -> None:
    """Run every pass in order, in place."""
    Sequential(
        common.InlinePass(),
        common.IdentityEliminationPass(),
        SplitSequencePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        FoldPass(),
        LinearPass(),
        OneConsumerPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )(model)


def is_parameter(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that came from the checkpoint."""
    return value is not None and PARAMETER in value.metadata_props


class SplitSequencePass(InPlacePass):
    """``SplitToSequence`` with ``SequenceAt`` (torch's chunk, split) as a ``Split``, or ``Slice`` at symbolic sizes."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        changed = False
        for node in list(model.graph):
            if node.op_type != "SplitToSequence":
                continue
            uses = [use.node for use in node.outputs[0].uses()]
            indices = [int(_constant(use.inputs[1])) for use in uses]
            constant = ir.convenience.get_const_tensor(node.inputs[1]) is not None
            parts = self._split(model, node, indices) if constant else self._slices(model, node, indices)
            for use, index in zip(uses, indices, strict=True):
                parts[index].shape, parts[index].type = use.outputs[0].shape, use.outputs[0].type
                _replace(model, use.outputs[0], parts[index])
                model.graph.remove(use, safe=True)
            model.graph.remove(node, safe=True)
            changed = True
        return PassResult(model, modified=changed)

    @staticmethod
    def _split(model: ir.Model, node: ir.Node, indices: Sequence[int]) -> list[ir.Value]:
        sizes = _constant(node.inputs[1])
        axis = node.attributes["axis"].as_int()
        outputs = _parts(node.inputs[0], axis, sizes) or max(indices) + 1
        inputs = [node.inputs[0]] if sizes.ndim == 0 else list(node.inputs)
        attributes = {"axis": axis, **({"num_outputs": outputs} if sizes.ndim == 0 else {})}
        split = ir.node("Split", inputs, attributes, num_outputs=outputs)
        model.graph.insert_before(node, split)
        return list(split.outputs)

    @staticmethod
    def _slices(model: ir.Model, node: ir.Node, indices: Sequence[int]) -> dict[int, ir.Value]:
        """The parts that are used; TensorRT's Split wants constant sizes, its Slice does not."""

        def add(operator: str, *inputs: ir.Value | None) -> ir.Value:
            new = ir.node(operator, inputs)
            model.graph.insert_before(node, new)
            return new.outputs[0]

        def constant(number: int) -> ir.Value:
            new = ir.node("Constant", [], {"value": ir.tensor(np.array([number]))})
            model.graph.insert_before(node, new)
            return new.outputs[0]

        parts, start, axis = {}, constant(0), constant(node.attributes["axis"].as_int())
        for index in range(max(indices) + 1):
            size = add("Slice", node.inputs[1], constant(index), constant(index + 1))
            end = add("Add", start, size)
            if index in indices:
                parts[index] = add("Slice", node.inputs[0], start, end, axis)
            start = end
        return parts


class FoldPass(InPlacePass):
    """Fold arithmetic on constants; parameters are left alone, so that their bindings survive."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        from onnxscript.optimizer import fold_constants

        result = fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=FOLD_LIMIT_BYTES,
            output_size_limit=FOLD_LIMIT_BYTES,
            should_fold=lambda node: False if any(is_parameter(i) for i in node.inputs) else None,
        )
        return PassResult(model, modified=bool(result.modified))


class LinearPass(InPlacePass):
    """``Gemm`` and ``MatMul(x, Transpose(W))`` as ``MatMul(x, W')`` (and ``Add``), W' = W transposed at reading."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        changed = False
        for node in list(model.graph):
            if node.op_type == "Gemm" and is_parameter(node.inputs[1]):
                self._split_gemm(model, node)
                changed = True
            elif node.op_type == "MatMul" and self._transposes_parameter(node.inputs[1]):
                producer = node.inputs[1].producer()
                node.replace_input_with(1, transposed(model, producer.inputs[0]))
                changed = True
        return PassResult(model, modified=changed)

    @staticmethod
    def _transposes_parameter(value: ir.Value | None) -> bool:
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != "Transpose" or not is_parameter(producer.inputs[0]):
            return False
        return list(producer.attributes["perm"].as_ints()) == [1, 0]

    @staticmethod
    def _split_gemm(model: ir.Model, node: ir.Node) -> None:
        flags = {name: attribute.value for name, attribute in node.attributes.items()}
        if flags.get("alpha", 1.0) != 1.0 or flags.get("beta", 1.0) != 1.0 or flags.get("transA", 0):
            message = f"Gemm {node.name} with {flags} is not a linear layer"
            raise NotImplementedError(message)
        weight = transposed(model, node.inputs[1]) if flags.get("transB", 0) else node.inputs[1]
        matmul = ir.node("MatMul", [node.inputs[0], weight])
        nodes = [matmul]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(ir.node("Add", [matmul.outputs[0], node.inputs[2]]))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


class OneConsumerPass(InPlacePass):
    """Give each consumer of a shared (tied) weight matrix its own initializer: a DQ must never have two consumers."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        changed = False
        for value in list(model.graph.initializers.values()):
            uses = list(value.uses())
            if not is_parameter(value) or len(uses) < 2 or len(value.shape) < 2:
                continue
            for number, use in enumerate(uses[1:], start=1):
                use.node.replace_input_with(use.idx, _copy_initializer(model, value, f"{value.name}.{number}"))
                changed = True
        return PassResult(model, modified=changed)


def transposed(model: ir.Model, value: ir.Value) -> ir.Value:
    """The initializer of a [N, K] parameter as [K, N]; made once per parameter."""
    name = f"{value.name}.T"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    source = value.const_value

    shape = ir.Shape(tuple(int(d) for d in reversed(list(source.shape))))
    tensor = WeightView(lambda: values_of(source).T, dtype=source.dtype, shape=shape.numpy(), name=name)
    tensor.metadata_props.update(source.metadata_props)
    result = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(source.dtype))
    result.metadata_props.update(value.metadata_props)
    result.metadata_props[TRANSFORM] = "transpose"
    model.graph.register_initializer(result)
    return result


def _copy_initializer(model: ir.Model, value: ir.Value, name: str) -> ir.Value:
    copy = ir.Value(name=name, const_value=value.const_value, shape=value.shape, type=value.type)
    copy.metadata_props.update(value.metadata_props)
    model.graph.register_initializer(copy)
    return copy


def _parts(value: ir.Value | None, axis: int, sizes: np.ndarray) -> int:
    """Into how many parts a value is split; 0 where that is not known. A scalar is the size of each part."""
    if sizes.ndim:
        return len(sizes)
    length = value.shape[axis] if value is not None and value.shape is not None else None
    return -(-length // int(sizes)) if isinstance(length, int) else 0


def _constant(value: ir.Value | None) -> np.ndarray:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        message = f"{value} is not a constant"
        raise NotImplementedError(message)
    return np.asarray(tensor.numpy())


def _replace(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
