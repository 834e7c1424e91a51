"""The quantizing part of a build: the unquantized draft, calibration on it, and the rewrite of every graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.recipes import needs_feeds, rules_of
from intaglio.exporters.stages import Stages
from intaglio.exporters.store import GRAPH
from intaglio.profiles.artifact import Artifact, sha256
from intaglio.profiles.errors import CheckpointError, UsageError
from intaglio.profiles.family import Contract
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.profiles.spec import Coverage, Quantization
from intaglio.profiles.strict import to_dict
from intaglio.quantize.feeds import read_feeds, record_feeds
from intaglio.quantize.layers import Layer, assign, check_share, coverage, find_layers
from intaglio.quantize.rewrite import BadWeight, InputScales, Weight, quantize_graph
from intaglio.quantize.scales import input_scales, needs_statistics
from intaglio.quantize.statistics import collect

if TYPE_CHECKING:
    import onnx_ir as ir

    from intaglio.exporters.plan import Plan

DRAFT, FEEDS = "draft", "feeds.zip"


@dataclass(slots=True)
class Calibrated:
    """What calibration gave one component."""

    scales: dict[str, InputScales] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


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
    with stages.stage("calibration: record feeds") as facts:
        facts["sha256"] = recorded(plan, draft, names, path, stages)
    result = {}
    for name in names:
        with stages.stage(f"{name}: calibrate"):
            made = calibrate_component(draft, name, plan.recipe[name], plan.contract(name), path, stages.note)
            made.facts.update(plan.calibration.to_json())
            result[name] = made
    return result


def recorded(plan: Plan, draft: Artifact, names: tuple[str, ...], path: Path, stages: Stages) -> str:
    """The digest of the file of feeds, recorded now unless it is there."""
    assert plan.calibration is not None
    if path.exists():
        for name in names:
            next(iter(read_feeds(path, name)))
        return sha256(path)
    if not path.parent.is_dir():
        raise UsageError(f"--set calibration.feeds={path}: {path.parent} is not a folder; make it first")
    part = path.with_name(f".{path.name}.part")
    digest = record_feeds(draft, names, plan.calibration, part, note=stages.note)
    part.rename(path)
    return digest


def calibrate_component(
    draft: Artifact, name: str, recipe: ComponentRecipe, contract: Contract, feeds: Path, note: Callable[[str], None]
) -> Calibrated:
    """Statistics of one component's layers on recorded feeds, and the scales they give."""
    layers = layers_of(draft.component(name))
    choices = assign(layers, recipe, rules_of(contract))
    watched = needs_statistics(recipe, choices)
    statistics = collect(draft.component(name), [la.parameter for la in layers], read_feeds(feeds, name), note=note)
    chosen = [layer for layer in layers if layer.parameter in watched]
    return Calibrated(
        scales=input_scales(chosen, choices, statistics, recipe, note=note),
        macs=statistics.macs,
        facts={"feeds_sha256": sha256(feeds)},
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
