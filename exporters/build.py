"""``intaglio build``: checkpoint to artifact, whole or not at all."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio import __version__
from intaglio.exporters import additions
from intaglio.exporters.capture import capture
from intaglio.exporters.certificate import certify
from intaglio.exporters.checkpoint import Checkpoint, Weights, source_digests, write_config
from intaglio.exporters.checkpoint_index import digest_of, remember, remember_files
from intaglio.exporters.component import Component
from intaglio.exporters.graph_cache import FROM_CACHE
from intaglio.exporters.lowering import Job, Lowered, lowering
from intaglio.exporters.parity import check_component
from intaglio.exporters.passes import canonicalize
from intaglio.exporters.plan import Plan, audit_steps, audited, make_plan
from intaglio.exporters.quantization import (
    DRAFT,
    Calibrated,
    calibrate,
    name_file,
    quantization_record,
    quantize_component,
    unquantized,
)
from intaglio.exporters.recipes import is_quantized, needs_feeds
from intaglio.exporters.stages import Stages
from intaglio.exporters.store import DATA, GRAPH, keep_stored_dtype, save_component, stored_tensors, weight_bindings
from intaglio.profiles.artifact import Artifact, seal, writing
from intaglio.profiles.manifest import SCHEMA_VERSION, Manifest
from intaglio.profiles.spec import ComponentRecord, Quantization
from intaglio.profiles.strict import to_dict
from intaglio.quantize.rewrite import BadWeight

if TYPE_CHECKING:
    import onnx_ir as ir

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


def build(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    quant: Mapping[str, str] | None = None,
    recipe: str | Path | None = None,
    dtype: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    config: str | Path | None = None,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    preview_vae: str | None = None,
    accept_fidelity: bool = False,
    force: bool = False,
) -> Artifact:
    """Build an artifact at `output`; arguments as for `make_plan`.

    The folder appears whole by one rename, after every runnable target was compared with torch and its pictures with
    those of the unquantized graphs. With `accept_fidelity` pictures that miss their thresholds are recorded as waived.

    Raises:
        ToolError: an input is wrong, a target refuses the graph, or the result differs from the reference.
    """
    plan = make_plan(
        checkpoint,
        targets=targets,
        quant=quant,
        recipe=recipe,
        dtype=dtype,
        options=options,
        config=config,
        loras=loras,
        embeddings=embeddings,
        preview_vae=preview_vae,
    )
    target = Path(output)
    with writing(target, force=force) as folder, Stages(stage_count(plan)) as stages:
        with stages.stage("hash checkpoint"):
            sources = source_digests(plan.checkpoint)
        copy_files(plan, folder)
        remember(plan.checkpoint, digest_of(sources))
        remember_files(additions.files(plan.checkpoint))
        draft = make_draft(plan, folder / DRAFT, sources, stages) if plan.drafted else None
        calibrated = calibrate(plan, draft, draft.folder, stages) if draft and plan.calibration else {}
        records, engines = {}, {}
        for component in plan.components:
            made = calibrated.get(component.name)
            records[component.name], lowered = build_component(plan, component, folder, stages, draft, made)
            engines.update(lowered.engines)
        manifest = draft_manifest(plan, records, engines, sources)
        built = Artifact(folder=folder, manifest=manifest)
        parity = check_all(plan, built, stages)
        peaks = check_ranges(plan, draft or built, stages)
        certified = certify(plan, built, draft, stages, accept=accept_fidelity)
        if draft:
            shutil.rmtree(draft.folder)
        log = {**build_log(stages, parity, plan), "float16_peaks": peaks}
        log["remarks"] += certified.remarks
        sealed = seal(folder, manifest, log, certified.certificate)
    return Artifact(folder=target, manifest=sealed)


def stage_count(plan: Plan) -> int:
    """How many stages a build has."""
    count = len(plan.components) * (len(plan.targets) + 2) + 1 + bool(audited(plan)) + bool(plan.certificate)
    if plan.drafted:
        count += len(plan.components)
    if plan.calibration:
        count += 1 + sum(needs_feeds(r) for r in plan.recipe.values())
    return count


def copy_files(plan: Plan, folder: Path) -> None:
    """Tokenizers, scheduler and pipeline index."""
    plan.exporter.copy_files(plan.checkpoint, folder)
    plan.checkpoint.inversions.extend_tokenizers(folder)


def make_draft(plan: Plan, folder: Path, sources: dict[str, str], stages: Stages) -> Artifact:
    """The unquantized graphs as an artifact for ONNX Runtime: what calibration and certificates compare with."""
    plain, records = unquantized(plan), {}
    folder.mkdir()
    copy_files(plan, folder)
    for component in plan.components:
        with stages.stage(f"{component.name}: capture") as facts:
            model = captured(plan, component)
            facts["traced"] = not model.meta[FROM_CACHE]
            keep_stored_dtype(model)
            save_component(model, folder / component.name, stages.note)
            write_config(plan.checkpoint.config(component.source), folder / component.name / "config.json")
        records[component.name] = record_of(plain, component, folder / component.name, model)
    return Artifact(folder=folder, manifest=draft_manifest(plain, records, {}, sources))


def captured(plan: Plan, component: Component) -> ir.Model:
    """A component's canonical graph; weights stay in the checkpoint."""
    weights = plan.checkpoint.weights(component.source)
    model = capture(component, plan.checkpoint.config(component.source), weights, plan.shapes)
    canonicalize(model)
    return model


def build_component(
    plan: Plan,
    component: Component,
    folder: Path,
    stages: Stages,
    draft: Artifact | None = None,
    calibrated: Calibrated | None = None,
) -> tuple[ComponentRecord, Lowered]:
    """Capture (or take from the draft), quantize, write and lower one component; its record and engines by path."""
    import onnx_ir as ir

    place, quantization = folder / component.name, None
    with stages.stage(f"{component.name}: {'quantize' if draft else 'capture'}") as facts:
        model = ir.load(draft.component(component.name) / GRAPH) if draft else captured(plan, component)
        made = None
        if is_quantized(plan.recipe[component.name]):
            recipe = plan.recipe[component.name]
            made = quantize_component(component.name, model, recipe, plan.contract(component.name), calibrated)
        keep_stored_dtype(model)
        try:
            save_component(model, place, stages.note)
        except BadWeight as error:
            raise name_file(plan, component.source, error) from error
        write_config(plan.checkpoint.config(component.source), place / "config.json")
        facts["data_bytes"] = (place / DATA).stat().st_size
        if not draft:
            facts["traced"] = not model.meta[FROM_CACHE]
    if made:
        quantization = quantization_record(plan.recipe[component.name], made, calibrated)
    record = record_of(plan, component, place, model, quantization)
    engines: dict[str, dict[str, Any]] = {}
    for target in plan.targets:
        with stages.stage(f"{component.name}: {target}") as facts:
            lowered = lowering(target).lower(make_job(plan, component, place, target, stages))
            facts.update(lowered.facts)
        engines.update({f"{component.name}/{name}": value for name, value in lowered.engines.items()})
    return record, Lowered(engines=engines)


def record_of(
    plan: Plan, component: Component, place: Path, model: ir.Model, quantization: Quantization | None = None
) -> ComponentRecord:
    """What the manifest says of a component that was written."""
    return ComponentRecord(
        source=component.source,
        inputs=component.inputs,
        outputs=component.outputs,
        parameters=count_parameters(component, plan.checkpoint.weights(component.source)),
        format=plan.recipe[component.name].format,
        targets=plan.targets,
        tensors=stored_tensors(place),
        weights=weight_bindings(model),
        quantization=quantization,
    )


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
        format=plan.recipe[component.name].format,
        packed_bytes=(place / DATA).stat().st_size,
        options=plan.target_options(target),
        activations=plan.recipe[component.name].activations,
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
