"""What a build says about what it made: the records of components, the manifest and ``build.json``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio import __version__
from intaglio.exporters import additions
from intaglio.exporters.checkpoint_index import digest_of
from intaglio.exporters.component import Component
from intaglio.exporters.memory import weights_of
from intaglio.exporters.plan import Plan
from intaglio.exporters.stages import Stages
from intaglio.exporters.store import stored_tensors, weight_bindings
from intaglio.profiles.manifest import SCHEMA_VERSION, Manifest
from intaglio.profiles.spec import ComponentRecord, Quantization
from intaglio.profiles.strict import to_dict

if TYPE_CHECKING:
    import onnx_ir as ir

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


def record_of(
    plan: Plan, component: Component, place: Path, model: ir.Model, quantization: Quantization | None = None
) -> ComponentRecord:
    """What the manifest says of a component that was written."""
    return ComponentRecord(
        source=component.source,
        inputs=component.inputs,
        outputs=component.outputs,
        parameters=sum(weights_of(plan, component)),
        format=plan.recipe[component.name].format,
        targets=plan.targets,
        tensors=stored_tensors(place),
        weights=weight_bindings(model),
        quantization=quantization,
    )


def draft_manifest(
    plan: Plan, records: dict[str, ComponentRecord], engines: dict[str, dict[str, Any]], sources: dict[str, str]
) -> Manifest:
    """The manifest without its file list."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=plan.profile.name,
        name=plan.checkpoint.name,
        components=records,
        shapes=dict(plan.shapes),
        settings={**plan.profile.defaults, **plan.exporter.settings(plan.checkpoint)},
        recipe=plan.formats,
        dtypes={target: dict(rows) for target, rows in plan.dtypes.items()},
        licence=plan.checkpoint.licence,
        contract={c.name: to_dict(plan.contract(c.name)) for c in plan.components},
        provenance={
            "checkpoint": plan.checkpoint.name,
            "family": plan.profile.name,
            "pipeline": plan.checkpoint.pipeline_class,
            "digest": digest_of(sources),
            "sources": sources,
            **additions.provenance(plan.checkpoint),
            # What is measured of an artifact, and where a file lies, is not what the artifact is.
            "options": {
                key: value
                for key, value in plan.options.items()
                if not key.startswith("certificate.") and key != "calibration.feeds"
            },
            "intaglio": __version__,
            "tools": {name: importlib.metadata.version(name) for name in TOOLS},
        },
        engines={name: {k: v for k, v in facts.items() if k != "bytes"} for name, facts in engines.items()},
        files={},
    )


def build_log(stages: Stages, parity: dict[str, dict[str, float]], plan: Plan) -> dict[str, Any]:
    """What goes into ``build.json``: seconds and peak memory per stage, parity figures, remarks."""
    private = max((s["private_peak_bytes"] or 0 for s in stages.log), default=0) or None
    remarks = list(plan.remarks)
    if plan.memory is not None and private is not None and private > plan.memory:
        remarks.append(f"--max-memory was {plan.memory} bytes, and {private} were held: please report the checkpoint")
    return {
        "stages": stages.log,
        "seconds": round(sum(s["seconds"] for s in stages.log), 2),
        "max_memory": plan.memory,
        "private_peak_bytes": private,
        "peak_bytes": max((s["peak_bytes"] or 0 for s in stages.log), default=0) or None,
        "parity_relative_l2": {c: {b: float(f"{e:.3e}") for b, e in rows.items()} for c, rows in parity.items()},
        "remarks": remarks,
        "host": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
    }
