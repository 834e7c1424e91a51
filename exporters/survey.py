"""What is known of a component's layers before any picture: formats, scales, codes, what each does to the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.exporters.derive import contract_of
from intaglio.exporters.quantization import layers_of
from intaglio.exporters.recipes import completed, rules_of
from intaglio.exporters.search import Group, Level
from intaglio.exporters.sensitivity import Change, Probe, beside, effective_weight
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.quantize.feeds import CalibrationSet, read_feeds, record_feeds
from intaglio.quantize.formats import FORMATS
from intaglio.quantize.layers import Layer, assign
from intaglio.quantize.scales import input_scales, needs_statistics
from intaglio.quantize.statistics import collect
from intaglio.quantize.weight import InputScales, Weight

NONE = "none"
ITEM_BITS = {"INT4": 4, "INT8": 8, "UINT8": 8, "FLOAT8E4M3FN": 8, "FLOAT16": 16, "FLOAT": 32}
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a search is asked to do.

    Attributes:
        component: to be quantized.
        target: of TARGETS; its engine makes the pictures.
        formats: that layers may take, besides staying as they are.
        prompts: of the pictures; picture k with the seed ``seed + k``.
        calibration: as a build would record it.
        steps: of the sampler; ``None`` for the artifact's own.
        keep: patterns of parameters that stay as they are.
    """

    component: str
    target: str
    formats: tuple[str, ...]
    prompts: tuple[str, ...]
    calibration: CalibrationSet
    steps: int | None = None
    seed: int = 0
    keep: tuple[str, ...] = ()
    threads: int = 0


class Codes:
    """Encoded weights on disk, each made once: candidates differ in a few layers."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.known: dict[tuple[Any, ...], dict[str, tuple[Path, np.dtype[Any], tuple[int, ...]]]] = {}

    def tensors(self, weight: Weight) -> dict[str, np.ndarray]:
        """What `weight` will be stored as."""
        key = (weight.layer.parameter, weight.shape, weight.format)
        if key not in self.known:
            first = next(iter(weight.layout()))
            made = {first: weight.tensor(first)}
            made |= {role: weight.tensor(role) for role in weight.layout() if role != first}
            rows = {}
            for role, array in made.items():
                path = self.folder / f"{len(self.known)}.{role}"
                np.ascontiguousarray(array).tofile(path)
                rows[role] = (path, array.dtype, array.shape)
            self.known[key] = rows
        rows = self.known[key]
        return {role: np.fromfile(path, dtype).reshape(shape) for role, (path, dtype, shape) in rows.items()}


class Survey:
    """One component's layers, their formats and scales by requested format, and statistics collected once.

    Raises:
        UsageError: a pattern to keep matches nothing.
    """

    def __init__(self, source: Artifact, settings: Settings, scratch: Path, note: Note = lambda text: None) -> None:
        self.source, self.settings, self.scratch, self.note = source, settings, scratch, note
        self.name = settings.component
        self.rules = rules_of(contract_of(source, self.name))
        self.layers = layers_of(source.component(self.name))
        self.requests = (*dict.fromkeys(settings.formats), NONE)
        self.choices = {name: assign(self.layers, self._recipe(name), self.rules) for name in self.requests}
        self.codes = Codes(scratch / "codes")
        self.folder, self.feeds = scratch / "graph", scratch / "feeds.zip"
        beside(source.component(self.name), self.folder)
        digest = record_feeds(source, (self.name,), settings.calibration, self.feeds, note=self._at("record feeds"))
        self.facts: dict[str, Any] = {"feeds_sha256": digest, **settings.calibration.to_json()}
        calls, parameters = read_feeds(self.feeds, self.name), [layer.parameter for layer in self.layers]
        self.statistics = collect(self.folder, parameters, calls, note=self._at("watch the inputs"))
        self.scales = {name: self._scales(name) for name in settings.formats}

    def _scales(self, name: str) -> dict[str, InputScales]:
        recipe, choices = self._recipe(name), self.choices[name]
        watched = needs_statistics(recipe, choices)
        chosen = [layer for layer in self.layers if layer.parameter in watched]
        return input_scales(chosen, choices, self.statistics, recipe, note=self._at(f"{name}: scales"))

    def _recipe(self, name: str, layers: Mapping[str, str] | None = None) -> ComponentRecipe:
        rows = {**dict.fromkeys(self.settings.keep, NONE), **(layers or {})}
        return completed(self.name, ComponentRecipe(format=name, layers=rows), self.rules)

    def _at(self, stage: str) -> Note:
        return lambda text: self.note(f"{stage}: {text}")

    def groups(self) -> tuple[Group, ...]:
        """Every group that some format reaches, with its levels; they cost their bytes."""
        rows = [members for members in clusters(self.layers) if self._outcomes(members)[1:]]
        static: dict[str, list[str]] = {}
        for name in self.settings.formats:
            for parameter, choice in self.choices[name].items():
                dtype = FORMATS[choice.format].activations
                if dtype and dtype not in static.setdefault(parameter, []):
                    static[parameter].append(dtype)
        parameters = [la.parameter for members in rows for la in members]
        probe = Probe(self.folder, parameters, static, self.judged_feeds(), note=self._at("sensitivity"))
        groups = []
        for number, members in enumerate(rows):
            self.note(f"sensitivity: {number + 1} of {len(rows)} groups")
            levels = tuple(self._level(members, request, probe) for request in self._outcomes(members))
            groups.append(Group(members=tuple(dict.fromkeys(la.parameter for la in members)), levels=levels))
        return tuple(groups)

    def _outcomes(self, members: Sequence[Layer]) -> list[str]:
        """Requests that give these layers different formats; the first of those that give the same."""
        found: dict[tuple[str, ...], str] = {}
        for name in self.requests:
            found.setdefault(self._formats(members, name), name)
        return list(found.values())

    def _formats(self, members: Sequence[Layer], request: str) -> tuple[str, ...]:
        rows = {layer.parameter: self.choices[request][layer.parameter].format for layer in members}
        return tuple(rows.values())

    def _level(self, members: Sequence[Layer], request: str, probe: Probe) -> Level:
        """One request for one group: its bytes and its error."""
        size, changes = 0, []
        for layer in {la.parameter: la for la in members}.values():
            name = self.choices[request][layer.parameter].format
            if name == NONE:
                size += int(layer.source.const_value.nbytes)
                continue
            scales = self.scales[request].get(layer.parameter, InputScales())
            weight = Weight(layer, name, ComponentRecipe().method, scales, 0)
            size += sum(ITEM_BITS[dtype] * int(np.prod(shape)) // 8 for dtype, shape in weight.layout().values())
            value = effective_weight(layer, name, self.codes.tensors(weight), scales, weight.method)
            changes.append(Change(layer=layer, weight=value, activations=FORMATS[name].activations, scales=scales))
        error = probe.error(changes) if changes else 0.0
        return Level(request=request, formats=self._formats(members, request), bytes=size, cost=size, error=error)

    def judged_feeds(self) -> list[dict[str, np.ndarray]]:
        """The first, a middle and the last recorded call, each of another prompt where there are several."""
        rows = list(read_feeds(self.feeds, self.name))
        each = max(len(rows) // len(self.settings.calibration.prompts), 1)
        prompts = len(rows) // each
        picks = [0, (1 % prompts) * each + each // 2, (2 % prompts) * each + each - 1]
        return [rows[i] for i in dict.fromkeys(picks)]


def timed(groups: Sequence[Group], macs: Mapping[str, int], seconds: Mapping[str, float]) -> tuple[Group, ...]:
    """The groups with predicted time as their cost: multiply-accumulates times the relative seconds of the format."""

    def priced(group: Group, level: Level) -> Level:
        return dataclasses.replace(level, cost=sum(macs[m] for m in group.members) * seconds[level.request])

    return tuple(dataclasses.replace(g, levels=tuple(priced(g, v) for v in g.levels)) for g in groups)


def clusters(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers that must be decided together, since they share an input or a weight, in graph order; no Gathers."""
    found: list[tuple[set[object], list[Layer]]] = []
    for layer in (la for la in layers if la.op != "Gather"):
        keys, members, apart = {id(layer.input), layer.parameter}, [layer], []
        for row in found:
            if keys & row[0]:
                keys, members = keys | row[0], row[1] + members
            else:
                apart.append(row)
        found = [*apart, (keys, members)]
    order = {id(layer): place for place, layer in enumerate(layers)}
    rows = [sorted(members, key=lambda la: order[id(la)]) for _, members in found]
    return sorted(rows, key=lambda members: order[id(members[0])])
