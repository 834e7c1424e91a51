"""What a component will take in a format, from the checkpoint's headers: bytes of its graph, memory when it runs.

Bytes follow from the same table that the writer uses, so they are right but for tables of embeddings that are told by
their names here. Memory is a line through what was measured on a transformer of 330 million parameters (``make evidence
mmdit``): a part of its own and so many bytes for each stored one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from intaglio.exporters.component import Component
from intaglio.exporters.recipes import rules_of
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.quantize.formats import FORMATS, codec
from intaglio.quantize.layers import Layer, assign

if TYPE_CHECKING:
    from intaglio.exporters.plan import Plan

MIB = 2**20
TABLES = re.compile(r"(token_embedding|position_embedding|embed_tokens|shared|relative_attention_bias)\.weight$")
BITS = {"FLOAT": 32, "FLOAT16": 16, "INT8": 8, "UINT8": 8, "INT4": 4, "FLOAT8E4M3FN": 8}
STORED = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Line:
    """Memory at run in bytes: `own` and `each` for a stored byte; halves are computed in float32: they count twice."""

    own: int
    each: float

    def of(self, stored: int, halves: int) -> int:
        """Bytes, `halves` of `stored` being weights in half precision."""
        return self.own + round(self.each * (stored + halves))


# Measured over predicted in `make evidence mmdit`: 0.95 to 1.05 (tests/test_estimates.py).
RUN = {"onnxruntime": Line(520 * MIB, 0.95), "openvino": Line(320 * MIB, 2.15)}
TARGET = {"onnxruntime": "onnx", "openvino": "openvino"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One component in one format, bytes.

    Attributes:
        stored: of ``model.onnx.data``; each target beside ONNX holds as many again.
        halves: of those, weights that stay in half precision.
        run: private and mapped memory while it runs, by backend.
    """

    stored: int
    halves: int
    run: dict[str, int]

    def fits(self, memory: int) -> list[str]:
        """Targets whose backend runs the component in `memory` bytes."""
        return [TARGET[backend] for backend, size in self.run.items() if size <= memory]


def estimates(plan: Plan, component: Component) -> dict[str, Estimate]:
    """Format to what the component takes in it; a component's own recipe decides all but its nominal format."""
    recipe = plan.recipe[component.name]
    return {name: estimated(plan, component, replace(recipe, format=name, layers={})) for name in FORMATS}


def estimated(plan: Plan, component: Component, recipe: ComponentRecipe) -> Estimate:
    """What the component takes with this recipe."""
    sizes = dict(weights(plan, component))
    layers = [layer for name, (shape, _) in sizes.items() if (layer := layer_of(name, shape))]
    choices = assign(layers, recipe, rules_of(plan.contract(component.name)))
    coded = {layer.parameter: layer for layer in layers if choices[layer.parameter].format != "none"}
    stored = halves = 0
    for name, (shape, width) in sizes.items():
        if name in coded:
            stored += coded_bytes(coded[name], choices[name].format)
            continue
        stored += width * math.prod(shape)
        halves += width * math.prod(shape) if width == STORED["F16"] else 0
    return Estimate(stored=stored, halves=halves, run={b: line.of(stored, halves) for b, line in RUN.items()})


def weights(plan: Plan, component: Component) -> Iterator[tuple[str, tuple[tuple[int, ...], int]]]:
    """Parameter to the shape its graph has and the bytes of an element in the checkpoint."""
    found = plan.checkpoint.weights(component.source).renamed(component.rename)
    for name, parameter in found.items():
        if re.search(component.ignore, name):
            continue
        shape = tuple(parameter.shape)
        if len(shape) == 5:  # of a causal 3D convolution only the last frame is kept
            shape = (*shape[:2], *shape[3:])
        yield name, (shape, STORED.get(parameter.dtype, 4))


def layer_of(name: str, shape: tuple[int, ...]) -> Layer | None:
    """A weight as the graph will have it: linear ones [N, K] turned, tables and convolutions as they are."""
    if not name.endswith("weight") or len(shape) not in (2, 4):
        return None
    table, pointwise = bool(TABLES.search(name)), len(shape) == 4 and shape[2:] == (1, 1)
    kind = "Gather" if table else "MatMul" if len(shape) == 2 else "Conv"
    value = ir.Value(name=name)
    return Layer(
        node=ir.node(kind, [value]),
        op="MatMul" if pointwise else kind,
        weight=value,
        source=value,
        parameter=name,
        shape=shape[::-1] if kind == "MatMul" else shape,
        pointwise=pointwise,
    )


def coded_bytes(layer: Layer, name: str) -> int:
    """Codes and scales of one weight."""
    shape = layer.shape[1::-1] if layer.pointwise else layer.shape
    axis = 1 if layer.op == "MatMul" else 0
    rows = codec(name, "mse").layout(shape, axis).values()
    return sum(math.ceil(math.prod(dims) * BITS[dtype] / 8) for dtype, dims in rows)
