"""ONNX Runtime runs the waist itself: nothing to lower, the graph is loaded once to prove that it is accepted."""

from __future__ import annotations

from collections.abc import Mapping

from intaglio.exporters.lowering import Job, Lowered
from intaglio.exporters.store import GRAPH, graph_summary


class LowerOnnx:
    """The ``onnx`` target."""

    options: tuple[str, ...] = ()

    def check(self, options: Mapping[str, str]) -> None:
        """No options, no packages beyond the exporter's."""

    def lower(self, job: Job) -> Lowered:
        """Check the written graph with onnx's own checker and count its operators."""
        import onnx

        onnx.checker.check_model(str(job.folder / GRAPH))
        return Lowered(facts={"operators": dict(graph_summary(job.folder))})


LOWERING = LowerOnnx()
