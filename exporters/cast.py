"""The compute dtype of a strongly typed target: a float32 graph as float16 or bfloat16, with float32 islands.

Inputs and outputs stay float32, integers and shape arithmetic are untouched, codes of quantized weights are untouched.
In float32 are computed, besides the operators a contract names:

* the arguments of ``Sin`` and ``Cos`` and everything that becomes an integer: 999.5 radians have an ulp of 0.5 in
  float16, and diffusers computes time and position embeddings in float32 (``get_timestep_embedding``);
* operators that ONNX does not define for the narrow type, found in ONNX's own schemas;
* operators with a constant the narrow type cannot hold: 70000 overflows, 1e-12 becomes zero;
* quantizers whose scales lose digits in the narrow type. Where an engine takes them, all scales of whole channels and
  tensors stay float32, and DequantizeLinear gives the narrow type itself (``output_dtype``).
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from intaglio.exporters.passes import is_parameter
from intaglio.profiles.errors import Unsupported
from intaglio.profiles.family import Contract
from intaglio.profiles.registry import pick
from intaglio.quantize.layers import PARAMETER
from intaglio.quantize.tensors import values_of

DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # dtypes a checkpoint's weights may be stored in, besides float32
SMALL = 4096  # elements; constants up to here are looked at, larger ones are weights
# A finite constant this large stands for infinity (masks hold -3.4e38 or -1e9). It is clamped to the narrow type's
# largest value rather than kept: kept, the cast behind it would make it -inf, and a fully masked row NaN.
STANDS_FOR_INFINITY = 1e9
SCALE_ERROR = 2.0**-11  # float16's own rounding; a scale that loses more (subnormal, or bfloat16) stays float32
MIXED_OPSET = 23  # from here on a quantizer's scale may have another type than its values
SOURCES = ("Cast", "DequantizeLinear")  # what may stand between a parameter and the operator that reads it
QUANTIZERS = ("DequantizeLinear", "QuantizeLinear")
ANGLES = ("Sin", "Cos")
# A walk up from an angle ends here: beyond are activations, not positions.
HEAVY = ("Conv", "ConvTranspose", "Gemm", "Attention", "DequantizeLinear", "Gather")


@dataclass(slots=True, kw_only=True)
class CastReport:
    """What a cast did; counts of nodes by operator, names of constants and of the values that became narrow."""

    dtype: str
    narrow: Counter[str] = field(default_factory=Counter)
    float32: Counter[str] = field(default_factory=Counter)
    casts: int = 0
    clamped: set[str] = field(default_factory=set)
    float32_scales: int = 0
    narrow_values: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``build.json``."""
        return {
            "dtype": self.dtype,
            "narrow_nodes": sum(self.narrow.values()),
            "float32_nodes": dict(sorted(self.float32.items())),
            "casts": self.casts,
            "clamped_constants": len(self.clamped),
            "float32_scales": self.float32_scales,
        }


def cast_graph(
    model: ir.Model,
    dtype: str,
    float32_ops: Iterable[str],
    *,
    float32_parameters: Iterable[str] = (),
    softmax_attribute: bool = True,
    float32_scales: bool = False,
) -> CastReport:
    """Cast a float32 graph in place; weights stay lazy and are converted when the graph is written.

    Args:
        model: a graph without subgraphs, sorted topologically.
        dtype: ``float16`` or ``bfloat16``.
        float32_ops: operator types that keep computing in float32.
        float32_parameters: glob patterns; operators that read such a parameter keep computing in float32.
        softmax_attribute: where ``Softmax`` is among them, ask the same of ``Attention`` by ``softmax_precision``.
            TensorRT refuses that attribute.
        float32_scales: keep the scales of channels and tensors float32, DequantizeLinear states its ``output_dtype``.
            TensorRT takes it and wants one dtype for the scales of both sides of a product; ONNX Runtime 1.31 fails.

    Raises:
        UsageError: another dtype.
        Unsupported: a subgraph, an operator ONNX does not define, a value without a type, or float32 scales asked of
            a graph before opset 23.
    """
    from onnx_ir.passes import common

    narrow = pick(DTYPES, dtype, "dtype")
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    check_types(model)
    wanted, report = frozenset(float32_ops), CastReport(dtype=dtype)
    if float32_scales and model.graph.opset_imports[""] < MIXED_OPSET:
        raise Unsupported(f"float32 scales need opset {MIXED_OPSET}, not {model.graph.opset_imports['']}")
    _Caster(model, narrow, wanted, tuple(float32_parameters), report, float32_scales=float32_scales).run()
    for node in model.graph:
        if softmax_attribute and node.op_type == "Attention" and "Softmax" in wanted:
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)
    common.RemoveUnusedNodesPass()(model)
    return report


def cast_to_contract(
    model: ir.Model, dtype: str, contract: Contract, *, softmax_attribute: bool = True, float32_scales: bool = False
) -> CastReport:
    """`cast_graph` with the float32 islands of a contract."""
    return cast_graph(
        model,
        dtype,
        contract.float32_ops,
        float32_parameters=contract.float32_parameters,
        softmax_attribute=softmax_attribute,
        float32_scales=float32_scales,
    )


def check_types(model: ir.Model) -> None:
    """Infer types; raise Unsupported with the node the cast cannot see through."""
    from onnx_ir.passes import common

    for node in model.graph:
        subgraph = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if node.domain or subgraph:
            raise Unsupported(f"{node.domain or 'ai.onnx'}::{node.op_type} ({node.name}) cannot be cast")
    common.ShapeInferencePass(data_prop=False)(model)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None:
                raise Unsupported(f"{node.op_type} ({node.name}) cannot be cast: the type of {value.name} is not known")


class _Caster:
    """One pass over the nodes; remembers each value in both types."""

    def __init__(
        self,
        model: ir.Model,
        narrow: ir.DataType,
        wanted: frozenset[str],
        patterns: tuple[str, ...],
        report: CastReport,
        *,
        float32_scales: bool,
    ) -> None:
        self.model, self.narrow, self.wanted, self.patterns, self.report = model, narrow, wanted, patterns, report
        self.float32_scales = float32_scales
        self.largest = float(np.finfo(np.float16).max) if narrow == DTYPES["float16"] else float(2.0**128 - 2.0**120)
        self.versions: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.stored: dict[ir.Value, ir.Value] = {}  # output of a Cast to float32 -> the narrow initializer behind it
        used = (v for n in model.graph for v in (*n.inputs, *n.outputs))
        self.floats = {v for v in used if v is not None and v.dtype == ir.DataType.FLOAT}  # as the graph was given

    def run(self) -> None:
        graph = self.model.graph
        nodes = list(graph)
        exact = exact_nodes(nodes)
        for node in nodes:
            if _is_stored_weight(node):
                self.stored[node.outputs[0]] = node.inputs[0]
                continue
            if self.floats.intersection((*node.inputs, *node.outputs)):
                island = node in exact or node.op_type in self.wanted or self._makes_floats(node) or self._unfit(node)
                island = island or self._owns_float32_parameter(node)
                dtype = ir.DataType.FLOAT if island else self.narrow
                if self._mixed(node):
                    self._quantizer(node, dtype)
                else:
                    self._retype(node, dtype)
        for index, value in enumerate(graph.outputs):
            if value.dtype == self.narrow:
                graph.outputs[index] = self._output(value)

    def _makes_floats(self, node: ir.Node) -> bool:
        """Floats made of integers by anything but a Cast, a fill or a dequantization carry their own dtype."""
        if node.op_type in ("Cast", "ConstantOfShape", "DequantizeLinear"):
            return False
        return not self.floats.intersection(node.inputs)

    def _owns_float32_parameter(self, node: ir.Node) -> bool:
        """Whether the node reads a parameter the contract names, as it is, stored narrow, or dequantized."""
        if not self.patterns:
            return False
        names = []
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            source = producer.inputs[0] if producer is not None and producer.op_type in SOURCES else value
            names += [source.metadata_props[PARAMETER]] if source is not None and is_parameter(source) else []
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in self.patterns)

    def _unfit(self, node: ir.Node) -> bool:
        """Whether a small constant of the node, or a quantizer's scale, does not survive in the narrow type."""
        if self._mixed(node):
            return False
        if node.op_type in QUANTIZERS:
            scale = node.inputs[1]
            unfit = scale.const_value is not None and self._loses(scale.const_value.numpy(), blocked=_is_blocked(node))
            self.report.float32_scales += unfit
            return unfit
        return any(
            self._overflows_or_vanishes(v.const_value.numpy())
            for v in self.floats.intersection(node.inputs)
            if v.is_initializer() and (v.const_value.size <= SMALL or len(v.const_value.shape) < 2)
        )

    def _loses(self, scale: np.ndarray, *, blocked: bool) -> bool:
        """Whether scales change by more than float16 rounds; those of blocks, by more than the type itself rounds.

        Blocks [K / block, N] add up along a column, so that its largest scale says what an error is worth, and four-bit
        codes are far coarser than bfloat16. A scale must not become zero: TensorRT refuses it.
        """
        exact = np.abs(scale.astype(np.float64))
        with np.errstate(over="ignore"):
            rounded = exact.astype(self.narrow.numpy()).astype(np.float64)
        unit, allowed = exact, SCALE_ERROR
        if blocked:
            unit, allowed = exact.max(axis=0, keepdims=True), float(ml_dtypes.finfo(self.narrow.numpy()).eps) / 2
        return bool(((np.abs(rounded - exact) > allowed * unit) | (rounded == 0)).any())

    def _mixed(self, node: ir.Node) -> bool:
        """Whether the node is a quantizer with float32 scales and narrow values; TensorRT has none with blocks."""
        return self.float32_scales and node.op_type in QUANTIZERS and not _is_blocked(node)

    def _quantizer(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Leave a quantizer its float32 scale; QuantizeLinear reads what there is, DequantizeLinear gives `dtype`."""
        self.report.float32_scales += 1
        counts = self.report.float32 if dtype == ir.DataType.FLOAT else self.report.narrow
        counts[node.op_type] += 1
        if node.op_type == "QuantizeLinear":
            return
        node.outputs[0].dtype = dtype
        if dtype == self.narrow:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", dtype.value)
            self.report.narrow_values.add(str(node.outputs[0].name))
        if len(node.inputs) > 2 and node.inputs[2] is not None and _is_zero(node.inputs[2]):
            node.resize_inputs(2)  # the codes' dtype says the same; parsers hold a zero point against `output_dtype`

    def _overflows_or_vanishes(self, array: np.ndarray) -> bool:
        # Tiny elements beside larger ones are rounding; a constant that becomes zero as a whole (1e-12) is not.
        size = np.abs(array[np.isfinite(array)])
        if not size.any():
            return False
        with np.errstate(over="ignore"):
            vanishes = float(size.max().astype(self.narrow.numpy())) == 0
        return vanishes or bool(((size > self.largest) & (size < STANDS_FOR_INFINITY)).any())

    def _retype(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Give a node inputs and outputs of `dtype`, as far as its schema has that type."""
        inputs, outputs = formal_types(node, self.model.graph.opset_imports[""], self.narrow)
        for index, value in enumerate(node.inputs):
            if value in self.floats:
                node.replace_input_with(
                    index, self._version(value, dtype if inputs[index] else ir.DataType.FLOAT, node)
                )
        for index, value in enumerate(node.outputs):
            if value in self.floats:
                value.dtype = dtype if outputs[index] else ir.DataType.FLOAT
                if value.dtype == self.narrow and value.name:
                    self.report.narrow_values.add(value.name)
        self._attributes(node, dtype)
        counts = self.report.float32 if dtype == ir.DataType.FLOAT else self.report.narrow
        counts[node.op_type] += 1

    def _attributes(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Attributes that name a dtype."""
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype.value)
        elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
            value = node.attributes["value"].as_tensor()
            if value.dtype == ir.DataType.FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", self._convert(value, str(node.name), dtype))
        elif node.op_type == "ConstantOfShape":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, dtype.numpy())))

    def _version(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` in `dtype`: itself, a converted initializer, or a Cast that all later readers share."""
        source = self.stored.get(value, value)
        if source.dtype == dtype:
            return source
        if (value, dtype) not in self.versions:
            if source.is_initializer():
                self.versions[value, dtype] = self._initializer(source, dtype)
            else:
                cast = ir.node("Cast", [source], {"to": dtype.value})
                cast.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
                cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
                if dtype == self.narrow and value.name:
                    self.report.narrow_values.add(value.name)
                self.model.graph.insert_before(before, cast)
                self.report.casts += 1
                self.versions[value, dtype] = cast.outputs[0]
        return self.versions[value, dtype]

    def _initializer(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}.{dtype.name.lower()}"
        tensor = self._convert(value.const_value, name, dtype)
        new = ir.Value(name=name, const_value=tensor, shape=value.shape, type=ir.TensorType(dtype))
        self.model.graph.register_initializer(new)
        return new

    def _convert(self, source: Any, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
        """A tensor in `dtype`; small ones now, weights when they are written."""
        if source.size <= SMALL:
            return ir.tensor(self._narrow_array(source.numpy(), name, dtype), name=name)

        def read() -> ir.Tensor:
            return ir.tensor(self._narrow_array(values_of(source), name, dtype))

        return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(source.shape), cache=False, name=name)

    def _narrow_array(self, array: np.ndarray, name: str, dtype: ir.DataType) -> np.ndarray:
        array = array.astype(np.float32)
        if dtype == self.narrow:
            large = np.isfinite(array) & (np.abs(array) > self.largest)
            if large.any():
                if np.abs(array[large]).min() < STANDS_FOR_INFINITY:
                    worst = float(np.abs(array[large]).max())
                    raise Unsupported(
                        f"{name} holds {worst:g}, more than {self.report.dtype}'s {self.largest:g}; "
                        "build with another dtype, for example --dtype fp32"
                    )
                self.report.clamped.add(name)
                array = np.where(large, np.sign(array) * np.float32(self.largest), array)
        return np.asarray(array.astype(dtype.numpy(), order="C"))  # ascontiguousarray would make a scalar [1]

    def _output(self, value: ir.Value) -> ir.Value:
        """The graph output `value` as float32 under its old name."""
        graph = self.model.graph
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].name, value.name = value.name, f"{value.name}.{self.narrow.name.lower()}"
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        graph.append(cast)
        self.report.casts += 1
        return cast.outputs[0]


def exact_nodes(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Nodes that compute arguments of Sin and Cos, or floats that become integers; both ends included."""

    def starts(node: ir.Node) -> bool:
        if node.op_type in ANGLES:
            return True
        to_integer = node.op_type == "Cast" and node.outputs[0].dtype != ir.DataType.FLOAT
        return to_integer and bool(node.inputs[0].dtype == ir.DataType.FLOAT)

    todo = [node for node in nodes if starts(node)]
    found: set[ir.Node] = set()
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        for value in node.inputs:
            producer = value.producer() if value is not None and value.dtype == ir.DataType.FLOAT else None
            if producer is not None and not _is_heavy(producer):
                todo.append(producer)
    return found


def formal_types(node: ir.Node, opset: int, narrow: ir.DataType) -> tuple[list[bool], list[bool]]:
    """For each input and output of a node, whether ONNX's schema lets it have the narrow type."""
    import onnx

    schema = onnx.defs.get_schema(node.op_type, node.version or opset, "")
    tensor = f"tensor({narrow.name.lower()})"
    variables = {c.type_param_str: tensor in c.allowed_type_strs for c in schema.type_constraints}

    def allowed(formals: Any, count: int) -> list[bool]:
        # The last formal parameter of a variadic operator stands for all that follow.
        return [variables.get(formals[min(i, len(formals) - 1)].type_str, False) for i in range(count)]

    return allowed(schema.inputs, len(node.inputs)), allowed(schema.outputs, len(node.outputs))


def _is_stored_weight(node: ir.Node) -> bool:
    """A weight stored as in the checkpoint, with the Cast to float32 that the store put behind it."""
    to_float = node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT
    return bool(to_float and node.inputs[0].is_initializer() and node.inputs[0].dtype in HALVES)


def _is_blocked(quantizer: ir.Node) -> bool:
    block = quantizer.attributes.get("block_size")
    return block is not None and block.as_int() > 0


def _is_zero(value: ir.Value) -> bool:
    return value.const_value is not None and not value.const_value.numpy().astype(np.float32).any()


def _is_heavy(node: ir.Node) -> bool:
    right = node.inputs[1] if node.op_type == "MatMul" else None
    source = right.producer() if right is not None else None
    if source is not None and source.op_type in SOURCES:
        right = source.inputs[0]
    weights = right is not None and right.is_initializer() and right.const_value.size > SMALL
    return bool(weights or node.op_type in HEAVY or node.op_type.endswith("Normalization"))
