"""One component of a build: its graph captured, quantized and written, then lowered for every target.

Both are taken from the cache of builds (`intaglio.exporters.build_cache`) where all that decides them is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters import additions, build_cache
from intaglio.exporters.build_records import record_of
from intaglio.exporters.capture import Prepared, capture, prepare
from intaglio.exporters.checkpoint import source_files, write_config
from intaglio.exporters.component import Component
from intaglio.exporters.graph_cache import FROM_CACHE
from intaglio.exporters.lowering import Job, Lowered, lowering
from intaglio.exporters.passes import canonicalize
from intaglio.exporters.plan import Plan
from intaglio.exporters.quantization import Calibrated, name_file, quantization_record, quantize_component
from intaglio.exporters.recipes import is_quantized
from intaglio.exporters.resume import digests, packed
from intaglio.exporters.stages import Stages
from intaglio.exporters.store import DATA, GRAPH, keep_stored_dtype, save_component
from intaglio.exporters.tools import tools
from intaglio.profiles.artifact import Artifact, sha256
from intaglio.profiles.spec import ComponentRecord
from intaglio.profiles.strict import from_dict, to_dict
from intaglio.profiles.trust import host
from intaglio.quantize.weight import BadWeight, in_advance

if TYPE_CHECKING:
    import onnx_ir as ir


def first_stage(component: str, draft: Artifact | None) -> str:
    """What the first stage of a component is called: its graph is captured, or taken from the draft."""
    return f"{component}: {'quantize' if draft else 'capture'}"


def build_component(
    plan: Plan,
    component: Component,
    folder: Path,
    stages: Stages,
    sources: Mapping[str, str],
    draft: Artifact | None = None,
    calibrated: Calibrated | None = None,
) -> tuple[ComponentRecord, Lowered]:
    """Capture (or take from the draft), quantize, write and lower one component; its record and engines by path.

    Args:
        plan: of the build.
        component: to be built.
        folder: the unfinished artifact.
        stages: the build's log.
        sources: sha256 of the checkpoint's files.
        draft: the unquantized graphs, where they were made.
        calibrated: scales of this component.
    """
    place = folder / component.name
    record = write_component(plan, component, place, stages, sources, draft, calibrated)
    engines: dict[str, dict[str, Any]] = {}
    for target in plan.targets:
        with stages.stage(f"{component.name}: {target}") as facts:
            lowered = lower_component(plan, component, place, target, stages, facts)
            facts.update(lowered.facts)
        engines.update({f"{component.name}/{name}": value for name, value in lowered.engines.items()})
    return record, Lowered(engines=engines)


def write_component(
    plan: Plan,
    component: Component,
    place: Path,
    stages: Stages,
    sources: Mapping[str, str],
    draft: Artifact | None = None,
    calibrated: Calibrated | None = None,
) -> ComponentRecord:
    """The component's ``model.onnx``, its data and its configuration in `place`; from the cache if they are there."""
    import onnx_ir as ir

    with stages.stage(first_stage(component.name, draft)) as facts:
        kept = build_cache.limit_bytes() > 0
        prepared = prepared_of(plan, component) if kept or draft is None else None
        decided = graph_facts(plan, prepared, sources, calibrated) if prepared and kept else {}
        if decided and (entry := build_cache.take(decided, place)):
            facts.update(from_build_cache=True, data_bytes=(place / DATA).stat().st_size)
            record = from_dict(ComponentRecord, entry.notes["record"], str(build_cache.entries_folder()))
            return dataclasses.replace(record, targets=plan.targets)
        if draft is not None:
            model = ir.load(draft.component(component.name) / GRAPH)
        else:
            assert prepared is not None
            model = captured(prepared)
            facts["traced"] = not model.meta.get(FROM_CACHE, False)
        record = made(plan, component, place, stages, facts, model, calibrated)
        keep(facts, decided, place, names(place), about(plan, component, "graph"), {"record": to_dict(record)})
    return record


def made(
    plan: Plan,
    component: Component,
    place: Path,
    stages: Stages,
    facts: dict[str, Any],
    model: ir.Model,
    calibrated: Calibrated | None,
) -> ComponentRecord:
    """Quantize a graph and write it.

    Raises:
        NumericsError: a weight to be quantized has a NaN or an infinity; with its file.
    """
    recipe, rewritten, quantization = plan.recipe[component.name], None, None
    if is_quantized(recipe):
        rewritten = quantize_component(component.name, model, recipe, plan.contract(component.name), calibrated)
        in_advance(rewritten.weights)
    keep_stored_dtype(model)
    start = time.monotonic()
    try:
        save_component(model, place, stages.note)
    except BadWeight as error:
        raise name_file(plan, component.source, error) from error
    facts["write_seconds"] = round(time.monotonic() - start, 3)
    write_config(plan.checkpoint.config(component.source), place / "config.json")
    facts["data_bytes"] = (place / DATA).stat().st_size
    if rewritten:
        quantization = quantization_record(recipe, rewritten, calibrated)
    return record_of(plan, component, place, model, quantization)


def prepared_of(plan: Plan, component: Component) -> Prepared:
    """A component ready to be traced."""
    config, weights = plan.checkpoint.config(component.source), plan.checkpoint.weights(component.source)
    return prepare(component, config, weights, plan.shapes)


def captured(prepared: Prepared) -> ir.Model:
    """A component's canonical graph; weights stay in the checkpoint."""
    model = capture(prepared)
    canonicalize(model)
    return model


def lower_component(
    plan: Plan, component: Component, place: Path, target: str, stages: Stages, facts: dict[str, Any]
) -> Lowered:
    """One target's files beside the graph in `place`; from the cache if they are there."""
    job = make_job(plan, component, place, target, stages)
    before = names(place)
    decided = target_facts(job, target, digests(place)) if build_cache.holds(job.packed_bytes) else {}
    if decided and (entry := build_cache.take(decided, place)):
        facts["from_build_cache"] = True
        return Lowered(facts=entry.notes["facts"], engines=entry.notes["engines"])
    lowered = lowering(target).lower(job)
    notes = {"facts": to_dict(lowered.facts), "engines": to_dict(lowered.engines)}
    keep(facts, decided, place, names(place) - before, about(plan, component, target), notes)
    return lowered


def names(place: Path) -> set[str]:
    """Files below a folder, by relative path."""
    return {p.relative_to(place).as_posix() for p in place.rglob("*") if not p.is_dir()}


def keep(
    facts: dict[str, Any],
    decided: Mapping[str, Any],
    place: Path,
    files: Iterable[str],
    rows: Mapping[str, str],
    notes: Mapping[str, Any],
) -> None:
    """Put files into the cache, or say in ``build.json`` why not."""
    if not decided:
        return
    if reason := build_cache.put(decided, place, files, about=rows, notes=notes):
        facts["not_cached"] = reason


def about(plan: Plan, component: Component, what: str) -> dict[str, str]:
    """An entry for people."""
    recipe = plan.recipe[component.name]
    return {"checkpoint": plan.checkpoint.name, "component": component.name, "format": recipe.format, "target": what}


def graph_facts(
    plan: Plan, prepared: Prepared, sources: Mapping[str, str], calibrated: Calibrated | None
) -> dict[str, Any]:
    """All that decides ``model.onnx`` and its data: weights, graph, recipe with its scales, shapes and tools."""
    component = prepared.component
    config, weights = plan.checkpoint.config(component.source), plan.checkpoint.weights(component.source)
    known = {path: sources[name] for name, path in source_files(plan.checkpoint).items()}
    scales = packed({component.name: calibrated}) if calibrated else b""
    return to_plain(
        target="graph",
        weights=[known[file] if file in known else sha256(file) for file in weights.files],
        additions=additions.provenance(plan.checkpoint),
        source=component.source,
        rename=component.rename,
        ignore=component.ignore,
        graph=prepared.key,
        recipe=plan.recipe[component.name],
        contract=plan.contract(component.name),
        scales=hashlib.sha256(scales).hexdigest() if scales else "",
        shapes=dict(plan.shapes),
        config=config,
        tools=tools(),
    )


def target_facts(job: Job, target: str, files: Mapping[str, str]) -> dict[str, Any]:
    """All that decides a target's files: the graph's files, dtype, shapes, contract, options and tools.

    The host, too: engines are native code, and a build records those in it as made on this host.
    """
    return to_plain(
        target=target,
        files=dict(files),
        component=job.component,
        inputs=job.inputs,
        outputs=job.outputs,
        shapes=dict(job.shapes),
        contract=job.contract,
        dtype=job.dtype,
        format=job.format,
        activations=job.activations,
        options=dict(job.options),
        host=host(),
        tools=tools(),
    )


def to_plain(**facts: Any) -> dict[str, Any]:
    """As JSON has it."""
    plain: dict[str, Any] = to_dict(facts)
    return plain


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
