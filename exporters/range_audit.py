"""Find what float16 would overflow, by a float32 run over prompts and all steps that records max|x| per tensor.

ONNX Runtime and OpenVINO on a CPU compute float16 graphs in wider arithmetic: they return 153.6 where a GPU gives inf.
So the float32 graph is run instead, with one more output: the largest absolute value of every tensor that the cast
pass would make float16, and of the scores inside `Attention`. The limit is half of float16's largest value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.exporters.cast import cast_to_contract
from intaglio.exporters.passes import is_parameter
from intaglio.exporters.store import GRAPH
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import NumericsError, Unsupported
from intaglio.profiles.family import Contract
from intaglio.profiles.registry import need
from intaglio.quantize.layers import PARAMETER
from intaglio.runtimes.engine import EngineOptions, check_feeds
from intaglio.runtimes.pipeline import Pipeline
from intaglio.runtimes.probe import Place, last_feeds, replaced, sample

LIMIT = 32752.0  # half of 65504
PROMPTS = ("a photograph of a red cat on the moon", "红心，月亮和一只猫")
NEAR = 6  # nodes
PEAKS, AUDIT_GRAPH = "intaglio.peaks", "model.audit.onnx"


@dataclass(slots=True)
class Peak:
    """The largest value a tensor took, and where."""

    value: float = 0.0
    step: int = 0
    prompt: str = ""


class AuditEngine:
    """A component on ONNX Runtime in float32 that keeps the peak of every tensor float16 would hold."""

    def __init__(self, artifact: Artifact, component: str, contract: Contract, place: Place) -> None:
        ort = need("onnxruntime", extra="onnxruntime")

        self.record, self.place = artifact.manifest.components[component], place
        path = artifact.component(component) / AUDIT_GRAPH
        self.names = write_audit_graph(artifact.component(component), contract)
        self.peaks = {name: Peak() for name in self.names}
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # fused tensors would not show
        options.log_severity_level = 3
        # Peaks as soon as their tensor is there: by default they come last, and every tensor is kept until then.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        try:
            self.session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        finally:
            path.unlink()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        names = [s.name for s in self.record.outputs]
        *values, peaks = self.session.run([*names, PEAKS], check_feeds(self.record, feeds))
        for name, value in zip(self.names, peaks, strict=True):
            if not value <= self.peaks[name].value:  # NaN too
                self.peaks[name] = Peak(float(value), self.place.step, self.place.prompt)
        return dict(zip(names, values, strict=True))

    def memory(self) -> dict[str, int | None]:
        """Not said."""
        return {"weight_bytes": None}

    def close(self) -> None:
        """Drop the session, keep the peaks."""
        self.session = None


def write_audit_graph(folder: Path, contract: Contract) -> tuple[str, ...]:
    """``model.audit.onnx`` beside ``model.onnx``: the same graph with the output PEAKS; returns its tensors' names."""
    import onnx_ir as ir

    report = cast_to_contract(ir.load(folder / GRAPH), "float16", contract)
    model = ir.load(folder / GRAPH)
    graph = model.graph
    wanted = [v for n in graph for v in n.outputs if v.name in report.narrow_values]
    wanted += [v for v in graph.inputs if v.name in report.narrow_values]
    attention = [n for n in graph if n.op_type == "Attention" and n.outputs[0].name in report.narrow_values]
    wanted += [scores(model, node) for node in attention]
    maxima = []
    for value in wanted:
        size = ir.node("Abs", [value])
        flat = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
        row = ir.node("Reshape", [flat.outputs[0], constant(model, "intaglio.one", np.array([1], np.int64))])
        graph.extend([size, flat, row])
        maxima.append(row.outputs[0])
    joined = ir.node("Concat", maxima, {"axis": 0})
    joined.outputs[0].name, joined.outputs[0].dtype = PEAKS, ir.DataType.FLOAT
    joined.outputs[0].shape = ir.Shape([len(maxima)])
    graph.append(joined)
    graph.outputs.append(joined.outputs[0])
    ir.save(model, folder / AUDIT_GRAPH)
    return tuple(label(v) for v in wanted)


def scores(model: Any, node: Any) -> Any:
    """The scaled scores q k^T of an Attention node; they have no name of their own in the graph.

    They are computed beside it: ONNX Runtime infers a wrong shape for Attention's own output of them where the text is
    shorter or longer than the image.

    Raises:
        Unsupported: queries and keys do not have as many heads.
    """
    import onnx_ir as ir

    query, key = node.inputs[0], node.inputs[1]
    if len(query.shape) != 4 or query.shape[1] != key.shape[1]:
        raise Unsupported(f"the scores of {node.name} cannot be audited: its queries and keys have other shapes")
    default = 1.0 / float(query.shape[3]) ** 0.5
    factor = node.attributes["scale"].as_float() if "scale" in node.attributes else default
    turned = ir.node("Transpose", [key], {"perm": [0, 1, 3, 2]})
    scaled = ir.node("Mul", [query, constant(model, f"intaglio.scale.{factor}", np.array(factor, np.float32))])
    product = ir.node("MatMul", [scaled.outputs[0], turned.outputs[0]])
    model.graph.extend([turned, scaled, product])
    product.outputs[0].name, product.outputs[0].dtype = f"{node.outputs[0].name}.scores", ir.DataType.FLOAT
    return product.outputs[0]


def label(value: Any) -> str:
    """A tensor's name with the nearest parameter before it, which says where in the model it is."""
    front: list[Any] = [value]
    for _ in range(NEAR):
        front = [i for v in front if (p := v.producer()) is not None for i in p.inputs if i is not None]
        names = [i.metadata_props[PARAMETER] for i in front if is_parameter(i)]
        if names:
            return f"{value.name} (after {names[0]})"
    return str(value.name)


def constant(model: Any, name: str, values: np.ndarray) -> Any:
    """An initializer, made once."""
    import onnx_ir as ir

    if name not in model.graph.initializers:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


@dataclass(slots=True)
class Audit:
    """Peaks by component and tensor."""

    peaks: dict[str, dict[str, Peak]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what float16 cannot hold with a margin of two.

        Raises:
            NumericsError: naming the first such tensor of the first such component, its step and prompt.
        """
        bad = [(c, n, p) for c, tensors in self.peaks.items() for n, p in tensors.items() if not p.value <= LIMIT]
        if not bad:
            return
        component, tensor, peak = bad[0]
        raise NumericsError(
            f"{component}: {tensor} reaches {peak.value:.4g} at step {peak.step} of {peak.prompt!r}, over {LIMIT:g}, "
            f"half of what float16 holds ({len(bad)} such tensors); build with --dtype bf16 or fp32, or name a float32 "
            "island in the contract"
        )

    def to_json(self) -> dict[str, dict[str, float]]:
        """The three largest peaks of each component, for ``build.json``."""
        result = {}
        for component, tensors in self.peaks.items():
            top = sorted(tensors.items(), key=lambda item: -item[1].value)[:3]
            result[component] = {name: float(f"{peak.value:.4g}") for name, peak in top}
        return result


def audit_ranges(
    artifact: Artifact,
    contracts: Mapping[str, Contract],
    prompts: Sequence[str] = PROMPTS,
    *,
    steps: int | None = None,
) -> Audit:
    """Sample `prompts` with every component of `contracts` instrumented; components without one run as they are.

    `steps` are the artifact's own where not given. The VAE encoder is fed the pictures, a tiny VAE the latents.
    """
    place = Place()
    engines = {name: AuditEngine(artifact, name, contract, place) for name, contract in contracts.items()}
    pipeline = Pipeline(artifact, "onnxruntime", EngineOptions(), residency="low")
    whole = any(not name.startswith("text_encoder") for name in contracts)  # text is read before the first step
    for prompt in prompts:
        with replaced(pipeline, engines):
            result = sample(pipeline, prompt, place, whole=whole, steps=steps)
        if result is not None:
            last_feeds(engines, result)
    for engine in engines.values():
        engine.close()
    return Audit({name: engine.peaks for name, engine in engines.items()})
