"""``intaglio build``: checkpoint to artifact, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.exporters import additions
from intaglio.exporters.build_component import build_component, first_stage, write_component
from intaglio.exporters.build_records import build_log, draft_manifest
from intaglio.exporters.certificate import certify
from intaglio.exporters.checkpoint import Checkpoint, source_digests
from intaglio.exporters.checkpoint_index import digest_of, remember, remember_files
from intaglio.exporters.memory import compare_limit
from intaglio.exporters.parity import check_component, uncompared
from intaglio.exporters.plan import Plan, audit_steps, audited, make_plan
from intaglio.exporters.quantization import Calibrated, calibrate, unquantized
from intaglio.exporters.recipes import needs_feeds
from intaglio.exporters.resume import Work, build_key
from intaglio.exporters.stages import Stages
from intaglio.profiles.artifact import Artifact, seal
from intaglio.profiles.spec import ComponentRecord
from intaglio.profiles.staging import claim
from intaglio.profiles.trust import remember_engines


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
    with claim(target, force=force) as held, Stages(stage_count(plan), bounded=plan.memory is not None) as stages:
        with stages.stage("hash checkpoint"):
            sources = source_digests(plan.checkpoint)
        work = open_work(plan, held.start(build_key(plan, sources)))
        folder = work.content
        copy_files(plan, folder)
        remember(plan.checkpoint, digest_of(sources))
        remember_files(additions.files(plan.checkpoint))
        draft = make_draft(plan, work, sources, stages) if plan.drafted else None
        calibrated = calibrated_once(plan, draft, work, stages) if draft and plan.calibration else {}
        records, engines = build_components(plan, work, stages, sources, draft, calibrated)
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
        if done:
            resumed(stages, first_stage(component.name, None))
            records[component.name] = done.record
            continue
        place = folder / component.name
        records[component.name] = write_component(plain, component, place, stages, sources)
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


def build_components(
    plan: Plan,
    work: Work,
    stages: Stages,
    sources: Mapping[str, str],
    draft: Artifact | None,
    calibrated: Mapping[str, Calibrated],
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
        scales = calibrated.get(name)
        records[name], lowered = build_component(plan, component, work.content, stages, sources, draft, scales)
        engines.update(lowered.engines)
        work.note_built(name, records[name], lowered.engines)
    return records, engines


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
