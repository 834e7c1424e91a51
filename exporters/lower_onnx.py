"""ONNX Runtime runs the waist itself on a CPU; a GPU may be given a variant in half precision beside it.

The variant ``model.float16.onnx`` reads weights that are stored in that dtype from the shared ``model.onnx.data`` and
the others from a data file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intaglio.exporters.cast import DTYPES, cast_to_contract
from intaglio.exporters.lowering import Job, Lowered
from intaglio.exporters.store import GRAPH, INLINE_BYTES, graph_summary
from intaglio.runtimes.engine_onnxruntime import variant_name


class LowerOnnx:
    """The ``onnx`` target."""

    options: tuple[str, ...] = ()

    def check(self, options: Mapping[str, str]) -> None:
        """No options, no packages beyond the exporter's."""

    def lower(self, job: Job) -> Lowered:
        """Check the written graph with onnx's own checker, count its operators, write the variant that was asked for.

        Raises:
            Unsupported: the cast refuses the graph.
        """
        import onnx

        onnx.checker.check_model(str(job.folder / GRAPH))
        facts: dict[str, Any] = {"operators": dict(graph_summary(job.folder))}
        if job.dtype in DTYPES:
            job.progress(f"onnx: cast to {job.dtype}")
            facts["cast"] = write_variant(job)
        return Lowered(facts=facts)


def write_variant(job: Job) -> dict[str, Any]:
    """``model.DTYPE.onnx`` beside the float32 graph; returns what the cast did."""
    import onnx
    import onnx_ir as ir

    model = ir.load(job.folder / GRAPH)
    report = cast_to_contract(model, job.dtype, job.contract)
    name = variant_name(job.dtype)
    values = [
        v
        for v in model.graph.initializers.values()
        if v.const_value is not None
        and not isinstance(v.const_value, ir.ExternalTensor)
        and v.const_value.nbytes >= INLINE_BYTES
    ]
    tensors = [v.const_value for v in values if v.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(tensors, str(job.folder), f"{name}.data")
    for value, tensor in zip(values, external, strict=True):
        value.const_value = tensor
    ir.save(model, job.folder / name)
    onnx.checker.check_model(str(job.folder / name))
    return report.to_json()


LOWERING = LowerOnnx()
