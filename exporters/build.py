"""``intaglio build``: checkpoint to artifact, whole or not at all."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio import __version__
from intaglio.exporters import additions
from intaglio.exporters.capture import capture
from intaglio.exporters.checkpoint import Checkpoint, Weights, source_digests, write_config
from intaglio.exporters.checkpoint_index import digest_of, remember, remember_files
from intaglio.exporters.component import Component
from intaglio.exporters.lowering import Job, Lowered, lowering
from intaglio.exporters.parity import check_component
from intaglio.exporters.passes import canonicalize
from intaglio.exporters.plan import Plan, audit_steps, audited, make_plan
from intaglio.exporters.stages import Stages
from intaglio.exporters.store import DATA, keep_stored_dtype, save_component, stored_tensors, weight_bindings
from intaglio.profiles.artifact import Artifact, seal, writing
from intaglio.profiles.manifest import SCHEMA_VERSION, Manifest
from intaglio.profiles.spec import ComponentRecord
from intaglio.profiles.strict import to_dict
from intaglio.quantize.rewrite import quantize_graph

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


def build(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    quant: Mapping[str, str] | None = None,
    dtype: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    config: str | Path | None = None,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    preview_vae: str | None = None,
    force: bool = False,
) -> Artifact:
    """Build an artifact at `output`; arguments as for `make_plan`.

    The folder appears whole by one rename, after every runnable target was compared with torch.

    Raises:
        ToolError: an input is wrong, a target refuses the graph, or the result differs from the reference.
    """
    plan = make_plan(
        checkpoint,
        targets=targets,
        quant=quant,
        dtype=dtype,
        options=options,
        config=config,
        loras=loras,
        embeddings=embeddings,
        preview_vae=preview_vae,
    )
    target, total = Path(output), len(plan.components) * (len(plan.targets) + 2) + 1 + bool(audited(plan))
    with writing(target, force=force) as folder, Stages(total) as stages:
        with stages.stage("hash checkpoint"):
            sources = source_digests(plan.checkpoint)
        plan.exporter.copy_files(plan.checkpoint, folder)
        plan.checkpoint.inversions.extend_tokenizers(folder)
        records, engines = {}, {}
        for component in plan.components:
            records[component.name], lowered = build_component(plan, component, folder, stages)
            engines.update(lowered.engines)
        manifest = draft_manifest(plan, records, engines, sources)
        remember(plan.checkpoint, digest_of(sources))
        remember_files(additions.files(plan.checkpoint))
        draft = Artifact(folder=folder, manifest=manifest)
        parity = check_all(plan, draft, stages)
        peaks = check_ranges(plan, draft, stages)
        sealed = seal(folder, manifest, {**build_log(stages, parity, plan), "float16_peaks": peaks})
    return Artifact(folder=target, manifest=sealed)


def build_component(plan: Plan, component: Component, folder: Path, stages: Stages) -> tuple[ComponentRecord, Lowered]:
    """Capture, quantize, write and lower one component; returns its record and its engines by artifact path."""
    weights = plan.checkpoint.weights(component.source)
    format_, contract = plan.recipe[component.name], plan.contract(component.name)
    place = folder / component.name
    with stages.stage(f"{component.name}: capture") as facts:
        model = capture(component, plan.checkpoint.config(component.source), weights, plan.shapes)
        canonicalize(model)
        coverage = quantize_graph(model, format_, contract.keep) if format_ != "none" else None
        keep_stored_dtype(model)
        save_component(model, place, stages.note)
        write_config(plan.checkpoint.config(component.source), place / "config.json")
        facts["data_bytes"] = (place / DATA).stat().st_size
    record = ComponentRecord(
        source=component.source,
        inputs=component.inputs,
        outputs=component.outputs,
        parameters=count_parameters(component, weights),
        format=format_,
        targets=plan.targets,
        tensors=stored_tensors(place),
        weights=weight_bindings(model),
        coverage=round(coverage.share, 6) if coverage else 0.0,
    )
    engines: dict[str, dict[str, Any]] = {}
    for target in plan.targets:
        with stages.stage(f"{component.name}: {target}") as facts:
            lowered = lowering(target).lower(make_job(plan, component, place, target, stages))
            facts.update(lowered.facts)
        engines.update({f"{component.name}/{name}": value for name, value in lowered.engines.items()})
    return record, Lowered(engines=engines)


def make_job(plan: Plan, component: Component, place: Path, target: str, stages: Stages) -> Job:
    """What the lowering of one component is given."""
    return Job(
        folder=place,
        component=component.name,
        inputs=component.inputs,
        outputs=component.outputs,
        shapes=plan.shapes,
        contract=plan.contract(component.name),
        dtype=plan.dtypes[target][component.name],
        format=plan.recipe[component.name],
        packed_bytes=(place / DATA).stat().st_size,
        options=plan.target_options(target),
        progress=stages.note,
    )


def count_parameters(component: Component, weights: Weights) -> int:
    """Number of weights of this component in the checkpoint."""
    import math
    import re

    kept = {n: p for n, p in weights.renamed(component.rename).items() if not re.search(component.ignore, n)}
    return sum(math.prod(p.shape) for p in kept.values())


def check_all(plan: Plan, artifact: Artifact, stages: Stages) -> dict[str, dict[str, float]]:
    """Parity of every component, largest relative L2 error per backend."""
    parity = {}
    for component in plan.components:
        with stages.stage(f"{component.name}: compare with torch"):
            tolerance = plan.contract(component.name).tolerance
            parity[component.name] = check_component(artifact, component.name, tolerance)
    return parity


def check_ranges(plan: Plan, artifact: Artifact, stages: Stages) -> dict[str, dict[str, float]]:
    """Audit what is computed in float16 over all steps; returns the largest peaks.

    Raises:
        NumericsError: a tensor outside the contract's float32 islands leaves float16's range.
    """
    from intaglio.exporters.range_audit import audit_ranges

    contracts = audited(plan)
    if not contracts:
        return {}
    with stages.stage("audit float16 ranges") as facts:
        facts["steps"] = steps = audit_steps(plan.options)
        audit = audit_ranges(artifact, contracts, steps=steps)
        audit.check()
    return audit.to_json()


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
        recipe=dict(plan.recipe),
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
            "options": dict(plan.options),
            "intaglio": __version__,
            "tools": {name: importlib.metadata.version(name) for name in TOOLS},
        },
        engines={name: {k: v for k, v in facts.items() if k != "bytes"} for name, facts in engines.items()},
        files={},
    )


def build_log(stages: Stages, parity: dict[str, dict[str, float]], plan: Plan) -> dict[str, Any]:
    """What goes into ``build.json``: seconds and peak memory per stage, parity figures, remarks."""
    import os
    import platform

    return {
        "stages": stages.log,
        "seconds": round(sum(s["seconds"] for s in stages.log), 2),
        "peak_bytes": max((s["peak_bytes"] or 0 for s in stages.log), default=0) or None,
        "parity_relative_l2": {c: {b: float(f"{e:.3e}") for b, e in rows.items()} for c, rows in parity.items()},
        "remarks": list(plan.remarks),
        "host": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
    }
