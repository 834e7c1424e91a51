"""``intaglio build``: checkpoint to artifact, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters import additions
from intaglio.exporters.build_records import build_log, draft_manifest, record_of
from intaglio.exporters.capture import capture
from intaglio.exporters.certificate import certify
from intaglio.exporters.checkpoint import Checkpoint, source_digests, write_config
from intaglio.exporters.checkpoint_index import digest_of, remember, remember_files
from intaglio.exporters.component import Component
from intaglio.exporters.graph_cache import FROM_CACHE
from intaglio.exporters.lowering import Job, Lowered, lowering
from intaglio.exporters.memory import compare_limit
from intaglio.exporters.parity import check_component, uncompared
from intaglio.exporters.passes import canonicalize
from intaglio.exporters.plan import Plan, audit_steps, audited, make_plan
from intaglio.exporters.quantization import (
    Calibrated,
    calibrate,
    name_file,
    quantization_record,
    quantize_component,
    unquantized,
)
from intaglio.exporters.recipes import is_quantized, needs_feeds
from intaglio.exporters.resume import Work, build_key
from intaglio.exporters.stages import Stages
from intaglio.exporters.store import DATA, GRAPH, keep_stored_dtype, save_component
from intaglio.profiles.artifact import Artifact, seal
from intaglio.profiles.spec import ComponentRecord
from intaglio.profiles.staging import claim
from intaglio.profiles.trust import remember_engines
from intaglio.quantize.rewrite import BadWeight

if TYPE_CHECKING:
    import onnx_ir as ir


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
    max_memory: str | None = None,
    accept_fidelity: bool = False,
    force: bool = False,
) -> Artifact:
    """Build an artifact at `output`; arguments as for `make_plan`.

    The folder appears whole by one rename, after every runnable target was compared with torch and its pictures with
    those of the unquantized graphs. With `accept_fidelity` pictures that miss their thresholds are recorded as waived.
    What a build of the same inputs finished before it was killed is taken up; ``build.json`` says what.

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
        max_memory=max_memory,
    )
    target = Path(output)
    with claim(target, force=force) as held, Stages(stage_count(plan)) as stages:
        with stages.stage("hash checkpoint"):
            sources = source_digests(plan.checkpoint)
        work = open_work(plan, held.start(build_key(plan, sources)))
        folder = work.content
        copy_files(plan, folder)
        remember(plan.checkpoint, digest_of(sources))
        remember_files(additions.files(plan.checkpoint))
        draft = make_draft(plan, work, sources, stages) if plan.drafted else None
        calibrated = calibrated_once(plan, draft, work, stages) if draft and plan.calibration else {}
        records, engines = build_components(plan, work, stages, draft, calibrated)
        unrecorded = remember_engines(folder, engines)
        manifest = draft_manifest(plan, records, engines, sources)
        built = Artifact(folder=folder, manifest=manifest)
        parity = check_all(plan, built, stages)
        peaks = check_ranges(plan, draft or built, stages)
        certified = certify(plan, built, draft, stages, accept=accept_fidelity)
        log = {**build_log(stages, parity, plan), "float16_peaks": peaks}
        log["remarks"] += [*unrecorded, *uncompared(parity, records), *certified.remarks]
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


def open_work(plan: Plan, folder: Path) -> Work:
    """The staging folder, with what an earlier build of the same inputs finished before it was killed."""
    feeds = plan.options.get("calibration.feeds")
    return Work(folder, [c.name for c in plan.components], None if feeds is None else Path(feeds))


def make_draft(plan: Plan, work: Work, sources: dict[str, str], stages: Stages) -> Artifact:
    """The unquantized graphs as an artifact for ONNX Runtime: what calibration and certificates compare with."""
    plain, records, folder = unquantized(plan), {}, work.draft
    copy_files(plan, folder)
    for component in plan.components:
        done = work.drafted(component.name)
        with stages.stage(f"{component.name}: capture") as facts:
            if done:
                facts["resumed"] = True
                records[component.name] = done.record
                continue
            model = captured(plan, component)
            facts["traced"] = not model.meta[FROM_CACHE]
            keep_stored_dtype(model)
            save_component(model, folder / component.name, stages.note)
            write_config(plan.checkpoint.config(component.source), folder / component.name / "config.json")
            records[component.name] = record_of(plain, component, folder / component.name, model)
            work.note_drafted(component.name, records[component.name])
    return Artifact(folder=folder, manifest=draft_manifest(plain, records, {}, sources))


def calibrated_once(plan: Plan, draft: Artifact, work: Work, stages: Stages) -> dict[str, Calibrated]:
    """Scales by component, measured now or by the build that was killed."""
    found = work.calibrated()
    if found is None:
        return work.note_calibrated(calibrate(plan, draft, draft.folder, stages))
    resumed(stages, "calibration: record feeds", *(f"{name}: calibrate" for name in found))
    return found


def resumed(stages: Stages, *names: str) -> None:
    """Log stages that an earlier build finished."""
    for name in names:
        with stages.stage(name) as facts:
            facts["resumed"] = True


def captured(plan: Plan, component: Component) -> ir.Model:
    """A component's canonical graph; weights stay in the checkpoint."""
    weights = plan.checkpoint.weights(component.source)
    model = capture(component, plan.checkpoint.config(component.source), weights, plan.shapes)
    canonicalize(model)
    return model


def build_components(
    plan: Plan, work: Work, stages: Stages, draft: Artifact | None, calibrated: Mapping[str, Calibrated]
) -> tuple[dict[str, ComponentRecord], dict[str, dict[str, Any]]]:
    """Every component that was not finished before; records by component and engines by path."""
    records, engines = {}, {}
    for component in plan.components:
        name, done = component.name, work.built(component.name)
        if done:
            resumed(stages, first_stage(name, draft), *(f"{name}: {target}" for target in plan.targets))
            records[name] = done.record
            engines.update(done.engines)
            continue
        made = calibrated.get(name)
        records[name], lowered = build_component(plan, component, work.content, stages, draft, made)
        engines.update(lowered.engines)
        work.note_built(name, records[name], lowered.engines)
    return records, engines


def first_stage(component: str, draft: Artifact | None) -> str:
    """What the first stage of a component is called: its graph is captured, or taken from the draft."""
    return f"{component}: {'quantize' if draft else 'capture'}"


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
    with stages.stage(first_stage(component.name, draft)) as facts:
        model = ir.load(draft.component(component.name) / GRAPH) if draft else captured(plan, component)
        made = None
        if is_quantized(plan.recipe[component.name]):
            recipe = plan.recipe[component.name]
            made = quantize_component(component.name, model, recipe, plan.contract(component.name), calibrated)
        keep_stored_dtype(model)
        start = time.monotonic()
        try:
            save_component(model, place, stages.note)
        except BadWeight as error:
            raise name_file(plan, component.source, error) from error
        facts["write_seconds"] = round(time.monotonic() - start, 3)
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


def check_all(plan: Plan, artifact: Artifact, stages: Stages) -> dict[str, dict[str, float]]:
    """Parity of every component, largest relative L2 error per backend."""
    parity, limit = {}, compare_limit(plan)
    for component in plan.components:
        with stages.stage(f"{component.name}: compare with torch"):
            tolerance = plan.contract(component.name).tolerance
            parity[component.name] = check_component(artifact, component.name, tolerance, limit)
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
