"""The quantizing part of a build: the unquantized draft, calibration on it, and the rewrite of every graph."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.recipes import needs_feeds, rules_of
from intaglio.exporters.stages import Stages
from intaglio.exporters.store import GRAPH, save_component
from intaglio.profiles.artifact import Artifact, sha256
from intaglio.profiles.errors import CheckpointError, UsageError
from intaglio.profiles.family import Contract
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.profiles.spec import Coverage, Quantization
from intaglio.profiles.strict import to_dict
from intaglio.quantize.feeds import CalibrationSet, read_feeds, record_feeds, weight_bytes
from intaglio.quantize.layers import Layer, assign, check_share, coverage, find_layers
from intaglio.quantize.rewrite import quantize_graph
from intaglio.quantize.scales import input_scales, needs_statistics
from intaglio.quantize.statistics import collect
from intaglio.quantize.weight import BadWeight, InputScales, Weight
from intaglio.runtimes.host_memory import available_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

    from intaglio.exporters.plan import Plan

DRAFT, FEEDS, CODED = "draft", "feeds.zip", "int8"
WHOLE, SEGMENTED = "unquantized weights, whole", "int8 weights, in segments"


@dataclass(slots=True)
class Calibrated:
    """What calibration gave one component; `segments` is the bytes of weights of each segment it was run in."""

    scales: dict[str, InputScales] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    segments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """Where to read a component that is too large for memory, and the bytes of weights to load at a time."""

    folder: Path
    limit: int | None


@dataclass(slots=True)
class Rewritten:
    """A quantized graph that was not written yet."""

    weights: list[Weight]
    coverage: Coverage

    def low_rank(self) -> dict[str, float]:
        """Mean weighted error of the weights without and with the low-rank branch, once they were written."""
        rows = [w.errors for w in self.weights if w.errors]
        return {key: round(sum(r[key] for r in rows) / len(rows), 6) for key in ("without", "with")} if rows else {}


def calibrate(plan: Plan, draft: Artifact, folder: Path, stages: Stages) -> dict[str, Calibrated]:
    """Record feeds of the components that need them, watch their layers' inputs on them, choose scales.

    Feeds are recorded into `folder`, or into (or read from) the file ``--set calibration.feeds=FILE``.

    Raises:
        UsageError: that file was recorded with another draft or other settings.
        NumericsError: the checkpoint itself overflows.
    """
    assert plan.calibration is not None
    names = tuple(n for n in plan.quantized if needs_feeds(plan.recipe[n]))
    path = Path(plan.options.get("calibration.feeds", folder / FEEDS))
    limit, coded = memory_limit(plan.calibration), folder / CODED
    with stages.stage("calibration: record feeds") as facts:
        folders = coded_components(plan, draft, names, limit, coded, stages)
        facts["sha256"] = recorded(plan, draft, names, path, stages, limit, folders)
    result = {}
    for name in names:
        with stages.stage(f"{name}: calibrate") as facts:
            recipe, contract = plan.recipe[name], plan.contract(name)
            held = Held(folders[name], limit) if name in folders else None
            result[name] = made = calibrate_component(draft, name, recipe, contract, path, stages.note, held)
            made.facts.update(plan.calibration.to_json())
            facts["segment_bytes"] = list(made.segments)
    shutil.rmtree(coded, ignore_errors=True)
    return result


def memory_limit(settings: CalibrationSet) -> int | None:
    """Bytes that the weights of a component may take; ``None``: any, nobody says how much memory there is."""
    available = available_bytes()
    return settings.memory or (None if available is None else available // 2)


def coded_components(
    plan: Plan, draft: Artifact, names: tuple[str, ...], limit: int | None, folder: Path, stages: Stages
) -> dict[str, Path]:
    """Those of the components whose weights exceed the limit, written with int8 weights: folder by name.

    A segment of the limit's size then holds four times the layers.
    """
    import onnx_ir as ir

    large = [name for name in names if limit is not None and weight_bytes(draft, name) > limit]
    for name in large:
        stages.note(f"{name} in int8")
        model = ir.load(draft.component(name) / GRAPH)
        recipe = ComponentRecipe(format="int8", activations="exact")
        quantize_graph(model, assign(find_layers(model), recipe, rules_of(plan.contract(name))))
        try:
            save_component(model, folder / name, stages.note)
        except BadWeight as error:
            raise name_file(plan, draft.manifest.components[name].source, error) from error
    return {name: folder / name for name in large}


def recorded(
    plan: Plan,
    draft: Artifact,
    names: tuple[str, ...],
    path: Path,
    stages: Stages,
    limit: int | None,
    folders: Mapping[str, Path],
) -> str:
    """The digest of the file of feeds, recorded now unless it is there."""
    assert plan.calibration is not None
    if path.exists():
        for name in names:
            next(iter(read_feeds(path, name)))
        return sha256(path)
    if not path.parent.is_dir():
        raise UsageError(f"--set calibration.feeds={path}: {path.parent} is not a folder; make it first")
    part = path.with_name(f".{path.name}.part")
    digest = record_feeds(draft, names, plan.calibration, part, limit=limit, folders=folders, note=stages.note)
    part.rename(path)
    return digest


def calibrate_component(
    draft: Artifact,
    name: str,
    recipe: ComponentRecipe,
    contract: Contract,
    feeds: Path,
    note: Callable[[str], None],
    held: Held | None = None,
) -> Calibrated:
    """Statistics of one component's layers on recorded feeds, and the scales they give; `held`: segment by segment."""
    layers = layers_of(draft.component(name))
    choices = assign(layers, recipe, rules_of(contract))
    watched, names = needs_statistics(recipe, choices), [layer.parameter for layer in layers]
    folder, limit = (held.folder, held.limit) if held else (draft.component(name), None)
    statistics = collect(folder, names, read_feeds(feeds, name), limit=limit, note=note)
    chosen = [layer for layer in layers if layer.parameter in watched]
    return Calibrated(
        scales=input_scales(chosen, choices, statistics, recipe, note=note),
        macs=statistics.macs,
        facts={"feeds_sha256": sha256(feeds), "ran_on": SEGMENTED if held else WHOLE},
        segments=statistics.segments,
    )


def quantize_component(
    name: str, model: ir.Model, recipe: ComponentRecipe, contract: Contract, calibrated: Calibrated | None
) -> Rewritten:
    """Rewrite a component's graph in place by its recipe.

    Raises:
        UsageError: a layer pattern matches nothing, or next to nothing would be quantized.
    """
    layers = find_layers(model)
    choices = assign(layers, recipe, rules_of(contract))
    check_share(name, model, layers, choices)
    made = calibrated or Calibrated()
    covered = coverage(layers, choices, made.macs)
    weights = quantize_graph(model, choices, made.scales, method=recipe.method, rank=recipe.rank)
    return Rewritten(weights=weights, coverage=covered)


def quantization_record(recipe: ComponentRecipe, made: Rewritten, calibrated: Calibrated | None) -> Quantization:
    """What the manifest says about it."""
    return Quantization(
        activations=recipe.activations,
        recipe=to_dict(recipe),
        coverage=made.coverage,
        calibration=dict(calibrated.facts) if calibrated else {},
        low_rank=made.low_rank(),
    )


def name_file(plan: Plan, source: str, error: BadWeight) -> CheckpointError:
    """A bad weight as an error that says in which file of the checkpoint it lies."""
    files: Mapping[str, Any] = plan.checkpoint.weights(source)
    parameter = files.get(error.parameter)
    where = parameter.file if parameter is not None else plan.checkpoint.folder
    return CheckpointError(f"{where}: {error}; fetch the checkpoint again or repair it")


def unquantized(plan: Plan) -> Plan:
    """The same plan with every weight as it is, for ONNX alone."""
    plain = {name: dataclasses.replace(ComponentRecipe(), activations="exact") for name in plan.recipe}
    return dataclasses.replace(plan, recipe=plain, targets=("onnx",), dtypes={"onnx": dict.fromkeys(plain, "float32")})


def layers_of(folder: Path) -> list[Layer]:
    """The layers of a component folder's graph."""
    import onnx_ir as ir

    return find_layers(ir.load(folder / GRAPH))
