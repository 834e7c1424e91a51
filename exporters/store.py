"""Write a component: one ``model.onnx`` and one ``model.onnx.data``, tensor by tensor, with the map of weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from intaglio.exporters.passes import is_parameter
from intaglio.profiles.spec import StoredTensor, WeightBinding
from intaglio.quantize.layers import PARAMETER
from intaglio.quantize.rewrite import ACTIVATION, FORMAT, PARTS, SMOOTH, TRANSFORM
from intaglio.quantize.tensors import WeightView, values_of

GRAPH, DATA = "model.onnx", "model.onnx.data"
INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape arithmetic needs them
ALIGNMENT, ALIGN_ABOVE = 4096, 1 << 20
IR_VERSION = 10  # what ONNX Runtime 1.20 and newer read


def keep_stored_dtype(model: ir.Model) -> None:
    """Store half-precision parameters as the checkpoint does, with a ``Cast`` to the graph's float32 behind them."""
    for value in list(model.graph.initializers.values()):
        stored = value.const_value.metadata_props.get("stored", "float32") if is_parameter(value) else "float32"
        if stored == "float32" or value.const_value.nbytes < INLINE_BYTES:
            continue
        source, dtype = value.const_value, ir.DataType[stored.upper()]

        view = functools.partial(values_of, source)
        tensor = WeightView(view, dtype=dtype, shape=source.shape.numpy(), name=value.name)
        small = ir.Value(
            name=f"{value.name}.{stored}", const_value=tensor, shape=value.shape, type=ir.TensorType(dtype)
        )
        small.metadata_props.update(value.metadata_props)
        model.graph.register_initializer(small)
        cast = ir.node("Cast", [small], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        model.graph.insert_before(model.graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        del model.graph.initializers[value.name]


def save_component(model: ir.Model, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the graph and its data file into an empty component folder; `progress` is called per tensor."""
    folder.mkdir(parents=True)
    model.ir_version = IR_VERSION
    model.graph.name = folder.name
    model.producer_name = "intaglio"
    model.producer_version = None
    for notes in (model.metadata_props, model.graph.metadata_props):
        for key in [k for k in notes if k.startswith("pkg.")]:  # torch's notes; their order varies from run to run
            del notes[key]
    ir.save(
        model,
        folder / GRAPH,
        external_data=DATA,
        size_threshold_bytes=INLINE_BYTES,
        alignment=ALIGNMENT,
        align_threshold=ALIGN_ABOVE,
        max_workers=1,
        callback=lambda tensor, info: progress(tensor.name or ""),
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What lies in the data file, read back from the graph that was written."""
    model = ir.load(folder / GRAPH)
    return {
        name: StoredTensor(
            dtype=tensor.dtype.name,
            shape=tuple(int(d) for d in tensor.shape),
            offset=int(tensor.offset or 0),
            nbytes=int(tensor.length or tensor.nbytes),
        )
        for name, value in model.graph.initializers.items()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }


def weight_bindings(model: ir.Model) -> dict[str, WeightBinding]:
    """Checkpoint parameter to initializer, from the metadata the passes carried along."""
    bindings = {}
    for name, value in model.graph.initializers.items():
        meta = value.metadata_props
        if PARAMETER in meta and meta[PARAMETER] not in bindings:
            bindings[meta[PARAMETER]] = WeightBinding(
                initializer=name,
                transform=meta.get(TRANSFORM, "none"),
                format=meta.get(FORMAT, "none"),
                parts=json.loads(meta.get(PARTS, "{}")),
                smooth=meta.get(SMOOTH),
                activation=meta.get(ACTIVATION),
            )
    return bindings


def graph_summary(folder: Path) -> Mapping[str, int]:
    """Operator types and their counts."""
    counts: dict[str, int] = {}
    for node in ir.load(folder / GRAPH).graph.all_nodes():
        key = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))
