"""The layers of a graph that can be quantized, and the format each of them takes by a recipe."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from intaglio.profiles.errors import UsageError
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.profiles.registry import pick, suggestion
from intaglio.profiles.spec import Coverage
from intaglio.quantize.arrays import float32
from intaglio.quantize.formats import FORMATS, format_for
from intaglio.quantize.tensors import values_of

PARAMETER = "intaglio.parameter"  # metadata of a graph value: the checkpoint parameter it came from
SMALLEST = 4096  # elements; below, scales and nodes cost more than the codes save
LEAST_SHARE = 0.05  # of a component's weights that a format must reach to be worth a build


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One operator with a weight of the checkpoint.

    Attributes:
        node: MatMul, Conv or Gather.
        op: as the formats see it: a convolution of one pixel (`pointwise`) is a MatMul.
        weight: the node's input: the initializer, or the Cast behind one stored in half precision.
        source: the initializer's value.
        shape: of the weight as its node has it.
    """

    node: ir.Node
    op: str
    weight: ir.Value
    source: ir.Value
    parameter: str
    shape: tuple[int, ...]
    pointwise: bool

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Input channels: K of a MatMul, C of a Conv (per group)."""
        return self.shape[1] if self.node.op_type == "Conv" else self.shape[0]

    @property
    def input(self) -> ir.Value:
        """What the weight is multiplied with (indices of a Gather)."""
        value: ir.Value = self.node.inputs[1 if self.op == "Gather" else 0]
        return value

    def read(self) -> np.ndarray:
        """The weight in float32; of a pointwise convolution as [K, N]."""
        return float32(self.view())

    def view(self) -> np.ndarray:
        """The same as it is stored: in any dtype and any order in memory."""
        value = values_of(self.source.const_value)
        return value.reshape(value.shape[:2]).T if self.pointwise else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The format of one layer; `reason` is why it is not the nominal one, `covered` whether it counts as such."""

    format: str
    reason: str = ""
    covered: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a family says about a component: patterns to keep, patterns of at least int8, static activations or not."""

    keep: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    static: bool = True


def find_layers(model: ir.Model) -> list[Layer]:
    """Every MatMul, Conv and Gather of a parameter, in graph order."""
    found = []
    for node in model.graph:
        index = {"MatMul": 1, "Conv": 1, "Gather": 0}.get(node.op_type)
        weight = node.inputs[index] if index is not None else None
        source = weight_source(weight)
        if weight is None or source is None or source.const_value is None:
            continue
        shape = tuple(int(d) for d in source.const_value.shape)
        if len(shape) < 2:
            continue
        pointwise = is_pointwise(node, shape)
        found.append(
            Layer(
                node=node,
                op="MatMul" if pointwise else node.op_type,
                weight=weight,
                source=source,
                parameter=source.metadata_props[PARAMETER],
                shape=shape,
                pointwise=pointwise,
            )
        )
    return found


def weight_source(value: ir.Value | None) -> ir.Value | None:
    """The parameter a value is, straight or by the Cast that the store puts behind half precision."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() and PARAMETER in value.metadata_props else None


def is_pointwise(node: ir.Node, shape: tuple[int, ...]) -> bool:
    """Whether a convolution is a matrix product per pixel: 1x1, stride 1, no padding, one group."""
    if node.op_type != "Conv" or len(shape) != 4 or shape[2:] != (1, 1):
        return False
    flags = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = all(s == 1 for s in flags.get("strides", ())) and not any(flags.get("pads", ()))
    return plain and flags.get("group", 1) == 1 and flags.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def nominal_format(recipe: ComponentRecipe, rules: Rules) -> str:
    """The recipe's format, without static activations where the family rules them out."""
    row = pick(FORMATS, recipe.format, "format")
    return row.weight_only if row.static and not rules.static else recipe.format


def assign(layers: Sequence[Layer], recipe: ComponentRecipe, rules: Rules) -> dict[str, Choice]:
    """Parameter to format: the recipe's patterns over the family's rules over the nominal format.

    Raises:
        UsageError: a pattern matches nothing; a format is unknown.
    """
    nominal = nominal_format(recipe, rules)
    names = [layer.parameter for layer in layers]
    for pattern, name in recipe.layers.items():
        pick(FORMATS, name, "format")
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"the layer pattern {pattern!r} matches none of {len(names)} weights; they are named like "
                f"{names[len(names) // 2] if names else 'nothing'}.{suggestion(pattern, names)}"
            )
    choices: dict[str, Choice] = {}
    for layer in layers:
        if layer.op == "Gather" or layer.parameter not in choices:  # of a weight that is a table too, the table decides
            choices[layer.parameter] = _choose(layer, nominal, recipe, rules)
    return choices


def _choose(layer: Layer, nominal: str, recipe: ComponentRecipe, rules: Rules) -> Choice:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(layer.parameter, pattern) for pattern in patterns)

    wanted = format_for(nominal, layer.op, layer.channels)
    row, fitted = FORMATS[wanted], wanted == dict(FORMATS[nominal].others).get(layer.op, nominal)
    explicit = [f for pattern, f in recipe.layers.items() if fnmatch.fnmatch(layer.parameter, pattern)]
    if explicit:
        name = format_for(explicit[-1], layer.op, layer.channels)
        return Choice(format=name) if name == wanted else Choice(format=name, reason="the recipe", covered=False)
    if nominal == "none":
        return Choice(format="none")
    if layer.op == "Gather":
        return Choice(format="none", reason="embeddings stay high", covered=False)
    if layer.elements < SMALLEST:
        return Choice(format="none", reason="too small", covered=False)
    if matches(rules.keep):
        return Choice(format="none", reason="the family keeps it high", covered=False)
    if matches(rules.int8) and (row.bits < FORMATS["int8"].bits or row.static):
        return Choice(format="int8", reason="the family's floor")
    if not fitted:
        return Choice(format=wanted, reason=f"{layer.channels} input channels", covered=FORMATS[wanted].bits < 8)
    return Choice(format=wanted)


def check_share(component: str, model: ir.Model, layers: Sequence[Layer], choices: Mapping[str, Choice]) -> None:
    """Refuse a recipe that reaches next to nothing.

    Raises:
        UsageError: under 5 % of the component's weights would be quantized.
    """
    values = [v for v in model.graph.initializers.values() if PARAMETER in v.metadata_props and v.const_value]
    total = sum(int(np.prod(v.const_value.shape.numpy())) for v in values)
    reached = sum(layer.elements for layer in layers if choices[layer.parameter].format != "none")
    if reached < LEAST_SHARE * total:
        raise UsageError(
            f"{component}: the format would apply to {reached / max(total, 1):.1%} of its weights, under "
            f"{LEAST_SHARE:.0%}; use {component}=none, or name layers in a recipe (--profile)"
        )


def coverage(layers: Sequence[Layer], choices: Mapping[str, Choice], macs: Mapping[str, int] | None = None) -> Coverage:
    """Shares at the nominal format; embeddings and small weights are not eligible."""
    eligible = [layer for layer in layers if layer.op != "Gather" and layer.elements >= SMALLEST]

    def share(sizes: Mapping[str, int], ops: tuple[str, ...]) -> float:
        rows = [layer for layer in eligible if layer.op in ops]
        whole = sum(sizes[layer.parameter] for layer in rows)
        covered = sum(sizes[layer.parameter] for layer in rows if choices[layer.parameter].covered)
        return round(covered / whole, 6) if whole else 1.0

    elements = {layer.parameter: layer.elements for layer in layers}
    exceptions = {p: f"{c.format}: {c.reason}" for p, c in choices.items() if c.reason and c.reason != "too small"}
    return Coverage(
        weights=share(elements, ("MatMul",)),
        all_weights=share(elements, ("MatMul", "Conv")),
        macs=share(macs, ("MatMul", "Conv")) if macs else None,
        exceptions=exceptions,
    )
