"""ONNX Runtime runs the waist itself on a CPU, or the same codes behind operators it has; a GPU may run another dtype.

``model.onnxruntime.onnx`` is written where the waist as it is would fail or be slow on a CPU, ``model.float16.onnx``
for GPUs. Both read what is stored in ``model.onnx.data`` from there and the rest from a data file of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.cast import DTYPES, cast_to_contract
from intaglio.exporters.lowering import Job, Lowered
from intaglio.exporters.onnxruntime_passes import lower_graph
from intaglio.exporters.store import GRAPH, INLINE_BYTES, graph_summary
from intaglio.exporters.tensorrt_passes import decode_nf4
from intaglio.runtimes.engine_onnxruntime import LOWERED, variant_name

if TYPE_CHECKING:
    import onnx_ir as ir


class LowerOnnx:
    """The ``onnx`` target."""

    options: tuple[str, ...] = ()

    def check(self, options: Mapping[str, str], formats: Collection[str] = ()) -> None:
        """No options, no packages beyond the exporter's."""

    def lower(self, job: Job) -> Lowered:
        """Check the written graph with onnx's own checker, count its operators, write the graphs that are needed.

        Raises:
            Unsupported: the cast refuses the graph.
        """
        import onnx

        onnx.checker.check_model(str(job.folder / GRAPH))
        facts: dict[str, Any] = {"operators": dict(graph_summary(job.folder))}
        if rewritten := write_lowered(job):
            facts["onnxruntime"] = rewritten
        if job.dtype in DTYPES:
            job.progress(f"onnx: cast to {job.dtype}")
            facts["cast"] = write_variant(job)
        return Lowered(facts=facts)


def write_lowered(job: Job) -> dict[str, int]:
    """``model.onnxruntime.onnx`` where a pass has something to do; returns how many nodes each pass rewrote."""
    import onnx_ir as ir

    model = ir.load(job.folder / GRAPH)
    counts = lower_graph(model, job.activations)
    if counts:
        job.progress("onnx: lower for ONNX Runtime")
        save_beside(model, job.folder, LOWERED)
    return counts


def write_variant(job: Job) -> dict[str, Any]:
    """``model.DTYPE.onnx`` beside the float32 graph; returns what the cast did."""
    import onnx_ir as ir

    model = ir.load(job.folder / GRAPH)
    decode_nf4(model)  # the CUDA provider has no operator for it
    report = cast_to_contract(model, job.dtype, job.contract)
    save_beside(model, job.folder, variant_name(job.dtype))
    return report.to_json()


def save_beside(model: ir.Model, folder: Path, name: str) -> None:
    """Write a graph made from `folder`'s: tensors of its data file stay there, other large ones go to ``NAME.data``."""
    import onnx
    import onnx_ir as ir

    values = [
        v
        for v in model.graph.initializers.values()
        if v.const_value is not None
        and not isinstance(v.const_value, ir.ExternalTensor)
        and v.const_value.nbytes >= INLINE_BYTES
    ]
    tensors = [v.const_value for v in values if v.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(tensors, str(folder), f"{name}.data") if tensors else []
    for value, tensor in zip(values, external, strict=True):
        value.const_value = tensor
    ir.save(model, folder / name)
    onnx.checker.check_model(str(folder / name))


LOWERING = LowerOnnx()
