"""What each layer's quantization does to its component's output, without a graph or a session per candidate.

One ONNX Runtime session of the unquantized graph takes the weights of its layers as inputs, so that one can be swapped
for what its codes decode to. Before layers that a static format reaches stands an ``If``: where its scale is above
zero the input is divided by the smoothing factor, quantized, dequantized and multiplied back; otherwise it passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.exporters.store import DATA, GRAPH
from intaglio.profiles.registry import need
from intaglio.quantize.formats import codec
from intaglio.quantize.layers import Layer, find_layers
from intaglio.quantize.rewrite import drop_unused, insert
from intaglio.quantize.scales import smoothed
from intaglio.quantize.weight import InputScales, along_inputs

PROBE = "model.probe.onnx"
FLOAT = ir.TensorType(ir.DataType.FLOAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One layer as a format would make it.

    Attributes:
        layer: where.
        weight: float32 in the layer's shape, what the codes stand for with the input's smoothing undone.
        activations: ONNX dtype of static activations; empty: none.
        scales: of a static input.
    """

    layer: Layer
    weight: np.ndarray
    activations: str = ""
    scales: InputScales = field(default_factory=InputScales)


def effective_weight(
    layer: Layer, name: str, tensors: Mapping[str, np.ndarray], scales: InputScales, method: str
) -> np.ndarray:
    """The float32 weight of a layer's shape that these codes multiply the unsmoothed input with."""
    axis = 0 if layer.op == "Conv" else 1
    shape = layer.shape[1::-1] if layer.pointwise else layer.shape
    value = codec(name, method).decode(dict(tensors), shape, axis)
    if scales.smooth is not None:
        value = value / along_inputs(scales.smooth, value.ndim)
    return np.ascontiguousarray((value.T if layer.pointwise else value).reshape(layer.shape), np.float32)


def beside(source: Path, folder: Path) -> None:
    """A component's graph and its data in `folder`, where probes may be written: the source stays as it is.

    Copies, because neither onnx-ir nor ONNX Runtime reads data behind links.
    """
    folder.mkdir(parents=True)
    for name in (GRAPH, DATA):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


class Probe:
    """The session and the unquantized answers.

    Args:
        folder: of the component, see `beside`; written to and cleaned.
        parameters: whose weights become inputs.
        static: parameter to ONNX dtypes its input may be quantized to.
        feeds: calls to judge by.
        note: called with progress.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Iterable[str],
        static: Mapping[str, Sequence[str]],
        feeds: Sequence[Mapping[str, np.ndarray]],
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        ort = need("onnxruntime", extra="onnxruntime")

        model = ir.load(folder / GRAPH)
        wanted = set(parameters)
        layers = [layer for layer in find_layers(model) if layer.parameter in wanted and layer.op != "Gather"]
        self.value = ort.OrtValue.ortvalue_from_numpy
        self.base: dict[str, Any] = {}
        self.switches: dict[tuple[str, str], str] = {}
        known: dict[tuple[int, str, str], tuple[str, ir.Value]] = {}
        for layer in layers:
            self._weight(model, layer)
            for dtype in static.get(layer.parameter, ()):
                self._switch(model, layer, dtype, known)
        drop_unused(model)
        self.session = open_session(model, folder / PROBE)
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.feeds = [{name: self.value(array) for name, array in feed.items()} for feed in feeds]
        self.truth = []
        for number, feed in enumerate(self.feeds):
            note(f"unquantized call {number + 1} of {len(self.feeds)}")
            self.truth.append(self._run(feed, {}))

    def _weight(self, model: ir.Model, layer: Layer) -> None:
        name = f"intaglio.weight.{layer.parameter}"
        if name not in self.base:
            model.graph.inputs.append(ir.Value(name=name, shape=ir.Shape(layer.shape), type=FLOAT))
            raw = np.asarray(layer.source.const_value.numpy()).astype(np.float32)
            self.base[name] = self.value(np.ascontiguousarray(raw))
        value = next(v for v in model.graph.inputs if v.name == name)
        layer.node.replace_input_with(1, value)

    def _switch(
        self, model: ir.Model, layer: Layer, dtype: str, known: dict[tuple[int, str, str], tuple[str, ir.Value]]
    ) -> None:
        value = layer.node.inputs[0]
        assert value is not None
        key = (id(value), dtype, layer.op)
        if key not in known:
            name = f"intaglio.scale.{len(known)}"
            factor = factor_shape(layer) if smoothed(layer) else [1]
            inputs = [ir.Value(name=name, shape=ir.Shape([]), type=FLOAT)]
            inputs.append(ir.Value(name=f"{name}.factor", shape=ir.Shape(factor), type=FLOAT))
            model.graph.inputs.extend(inputs)
            self.base[name] = self.value(np.zeros((), np.float32))
            self.base[f"{name}.factor"] = self.value(np.ones(factor, np.float32))
            known[key] = (name, switched(model, layer.node, value, inputs, ir.DataType[dtype]))
        self.switches[layer.parameter, dtype], out = known[key]
        layer.node.replace_input_with(0, out)

    def _run(self, feed: Mapping[str, Any], changed: Mapping[str, Any]) -> list[np.ndarray]:
        values = self.session.run_with_ort_values(self.outputs, {**feed, **self.base, **changed})
        return [np.asarray(v.numpy(), np.float64) for v in values]

    def error(self, changes: Sequence[Change]) -> float:
        """Squared relative L2 error of the outputs with these layers changed, the mean over the calls.

        Infinite where the output is.
        """
        changed: dict[str, Any] = {}
        for change in changes:
            changed[f"intaglio.weight.{change.layer.parameter}"] = self.value(change.weight)
            if change.activations:
                name = self.switches[change.layer.parameter, change.activations]
                changed[name] = self.value(np.array(change.scales.activation, np.float32))
                if change.scales.smooth is not None:
                    factor = (1 / change.scales.smooth).astype(np.float32)
                    changed[f"{name}.factor"] = self.value(factor.reshape(factor_shape(change.layer)))
        errors = []
        for feed, truth in zip(self.feeds, self.truth, strict=True):
            found = self._run(feed, changed)
            off = sum(float(np.sum((a - b) ** 2)) for a, b in zip(found, truth, strict=True))
            errors.append(off / max(sum(float(np.sum(b**2)) for b in truth), 1e-300))
        mean = float(np.mean(errors))
        return mean if np.isfinite(mean) else float("inf")


def factor_shape(layer: Layer) -> list[int]:
    """Of a factor of a layer's input channels: [K], or [C, 1, 1] in front of a convolution."""
    return [layer.channels, *[1] * (len(layer.shape) - 2)] if layer.node.op_type == "Conv" else [layer.channels]


def switched(
    model: ir.Model, before: ir.Node, value: ir.Value, inputs: Sequence[ir.Value], dtype: ir.DataType
) -> ir.Value:
    """`value`, or quantized to `dtype` and back where the scale (first of `inputs`) is above zero."""
    scale, factor = inputs
    constant = ir.node("Constant", [], {"value": ir.tensor(np.zeros((), dtype.numpy()))})
    small = ir.node("Mul", [value, factor])
    codes = ir.node("QuantizeLinear", [small.outputs[0], scale, constant.outputs[0]])
    back = ir.node("DequantizeLinear", [codes.outputs[0], scale, constant.outputs[0]])
    large = ir.node("Div", [back.outputs[0], factor])
    same = ir.node("Identity", [value])
    for node in (large, same):
        node.outputs[0].type = FLOAT
    label = str(scale.name)
    then = ir.Graph([], [large.outputs[0]], nodes=[constant, small, codes, back, large], name=f"{label}.then")
    other = ir.Graph([], [same.outputs[0]], nodes=[same], name=f"{label}.else")
    for place, node in enumerate([*then, *other]):
        node.outputs[0].name = f"{label}.inner.{place}"
    zero = insert(model, before, ir.node("Constant", [], {"value": ir.tensor(np.zeros((), np.float32))}), FLOAT.dtype)
    above = insert(model, before, ir.node("Greater", [scale, zero]), ir.DataType.BOOL)
    return insert(
        model, before, ir.node("If", [above], {"then_branch": then, "else_branch": other}), FLOAT.dtype, value.shape
    )


def open_session(model: ir.Model, path: Path) -> Any:
    """The graph on ONNX Runtime in float32; the file is removed again."""
    ort = need("onnxruntime", extra="onnxruntime")

    ir.save(model, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()
