"""The workshop of a search: measures groups of layers, makes candidates on the target and judges their pictures."""

from __future__ import annotations

import dataclasses
import glob
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from intaglio.exporters.budget import Plan, Point
from intaglio.exporters.derive import contract_of, lower
from intaglio.exporters.plan import RUNTIME_OF
from intaglio.exporters.quantization import Calibrated, quantization_record, quantize_component
from intaglio.exporters.recipes import completed
from intaglio.exporters.search import Group, error_of, formats_of
from intaglio.exporters.store import DATA, GRAPH, save_component, stored_tensors, weight_bindings
from intaglio.exporters.survey import NONE, Note, Survey
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.profiles.spec import ComponentRecord
from intaglio.quantize.layers import Choice, assign, check_share
from intaglio.quantize.weight import InputScales
from intaglio.runtimes.engine import Engine, EngineOptions, load_engine
from intaglio.runtimes.fidelity import WINDOW, psnr, ssim
from intaglio.runtimes.pipeline import Pipeline
from intaglio.runtimes.probe import Place, sample

ROUNDS = 5  # of timing, the two engines in turn


class Workshop:
    """One search's artifact, scratch folder, reference pictures and engines.

    Raises:
        UsageError: the component is not there, takes no part in pictures from text, or a pattern matches nothing.
    """

    def __init__(self, survey: Survey, groups: Sequence[Group], note: Note = lambda text: None) -> None:
        self.survey, self.groups, self.note = survey, tuple(groups), note
        self.source, self.settings, self.name = survey.source, survey.settings, survey.name
        self.backend = RUNTIME_OF[self.settings.target]
        self.options = EngineOptions(threads=self.settings.threads)
        self.pipeline = Pipeline(self.source, self.backend, self.options, residency="low")
        self.pipeline.engines.keep = True
        self.pictures: list[np.ndarray] = []
        self.feed = survey.judged_feeds()[-1]
        self.made = 0
        self.unquantized_bytes = (self.source.component(self.name) / DATA).stat().st_size

    def close(self) -> None:
        """Unload every engine."""
        self.pipeline.close()

    # --- candidates -------------------------------------------------------------------------------------------------

    def uniform(self, request: str) -> Plan:
        """The plan of one format everywhere."""
        wanted = self.survey.choices[request]
        return tuple(
            next(i for i, v in enumerate(g.levels) if v.formats == tuple(wanted[m].format for m in g.members))
            for g in self.groups
        )

    def recipe(self, plan: Plan) -> ComponentRecipe:
        """The recipe that gives every layer its format: the nominal one that leaves the fewest exceptions."""
        wanted = {p: c.format for p, c in self.survey.choices[NONE].items()} | formats_of(self.groups, plan)
        best: ComponentRecipe | None = None
        for name in self.settings.formats:
            base = assign(self.survey.layers, ComponentRecipe(format=name), self.survey.rules)
            lines = {glob.escape(p): f for p, f in wanted.items() if base[p].format != f}
            if best is None or len(lines) < len(best.layers):
                best = ComponentRecipe(format=name, layers=lines)
        assert best is not None
        return completed(self.name, best, self.survey.rules)

    def usable(self, plan: Plan) -> bool:
        """Whether a build would take it: it must reach enough of the weights."""
        import onnx_ir as ir

        model = ir.load(self.source.component(self.name) / GRAPH)
        found = {p: Choice(format=f) for p, f in formats_of(self.groups, plan).items()}
        rows = {layer.parameter: found.get(layer.parameter, Choice(format=NONE)) for layer in self.survey.layers}
        try:
            check_share(self.name, model, self.survey.layers, rows)
        except UsageError:
            return False
        return True

    def calibrated(self, plan: Plan) -> Calibrated:
        """The scales of the plan's static layers, as a build finds them by the same recipe and feeds."""
        rows: dict[str, InputScales] = {}
        for group, index in zip(self.groups, plan, strict=True):
            scales = self.survey.scales.get(group.levels[index].request, {})
            rows |= {m: scales[m] for m in group.members if m in scales}
        return Calibrated(scales=rows, macs=self.survey.statistics.macs, facts=dict(self.survey.facts))

    def derive(self, plan: Plan, folder: Path) -> Artifact:
        """The component by `plan`, for the target, in a folder of its own; as `derive_component`, with known codes."""
        import onnx_ir as ir

        recipe, calibrated = self.recipe(plan), self.calibrated(plan)
        model = ir.load(self.source.component(self.name) / GRAPH)
        made = quantize_component(self.name, model, recipe, contract_of(self.source, self.name), calibrated)
        for weight in made.weights:
            weight.held = self.survey.codes.tensors(weight)
        save_component(model, folder / self.name, lambda text: None)
        shutil.copy(self.source.component(self.name) / "config.json", folder / self.name)
        record: ComponentRecord = dataclasses.replace(
            self.source.manifest.components[self.name],
            format=recipe.format,
            tensors=stored_tensors(folder / self.name),
            weights=weight_bindings(model),
            quantization=quantization_record(recipe, made, calibrated),
        )
        lower(self.source, folder, self.name, record, (self.settings.target,))
        components = {**self.source.manifest.components, self.name: record}
        return Artifact(folder=folder, manifest=dataclasses.replace(self.source.manifest, components=components))

    # --- pictures ---------------------------------------------------------------------------------------------------

    def reference(self) -> list[np.ndarray]:
        """The unquantized pictures on the target, made once."""
        if not self.pictures:
            self.pictures = self._pictures("the unquantized pictures")
        return self.pictures

    def _pictures(self, what: str) -> list[np.ndarray]:
        found = []
        for number, prompt in enumerate(self.settings.prompts):
            self.note(f"{what}: {number + 1} of {len(self.settings.prompts)}")
            seed, steps = self.settings.seed + number, self.settings.steps
            result = sample(self.pipeline, prompt, Place(), steps=steps, seed=seed)
            assert result is not None
            found.append(np.asarray(result.images[0].convert("RGB"), np.uint8))
        return found

    def verify(self, plan: Plan, name: str = "", kind: str = "search") -> Point:
        """Make the pictures of a plan on the target and compare them with the unquantized ones; time both engines."""
        self.made += 1
        folder, label = self.survey.scratch / f"candidate-{self.made}", name or f"mix {self.made}"
        truth = self.reference()
        self.note(f"{label}: quantize")
        artifact = self.derive(plan, folder)
        size = (folder / self.name / DATA).stat().st_size
        engines = self.pipeline.engines
        before = engines[self.name]
        engine = load_engine(self.backend, artifact, self.name, self.options)
        note, speed, found = "", None, []
        try:
            engines.loaded[self.name] = engine
            found = self._pictures(label)
            speed = ratio(before, engine, self.feed)
        except NumericsError as error:
            note = str(error)
        finally:
            engines.loaded[self.name] = before
            engine.close()
            shutil.rmtree(folder)
        rows = judged(found, truth)
        predicted = error_of(self.groups, plan) ** 0.5
        return Point(name=label, kind=kind, plan=plan, bytes=size, speed=speed, predicted=predicted, note=note, **rows)


def judged(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, float]:
    """The worst and the median of PSNR and SSIM; zero where there are no pictures, SSIM 1 where they are too small."""
    if not found:
        return dict.fromkeys(("psnr", "psnr_median", "ssim", "ssim_median"), 0.0)
    pairs = list(zip(found, truth, strict=True))
    small = min(truth[0].shape[:2]) < WINDOW
    rows = {"psnr": [psnr(a, b) for a, b in pairs], "ssim": [1.0 if small else ssim(a, b) for a, b in pairs]}
    worst = {key: min(values) for key, values in rows.items()}
    return {**worst, **{f"{key}_median": statistics.median(values) for key, values in rows.items()}}


def ratio(reference: Engine, engine: Engine, feed: Mapping[str, np.ndarray]) -> float:
    """Seconds of `reference` by those of `engine`, the median of rounds in which both run once."""
    found = []
    for turn in range(ROUNDS + 1):
        seconds = []
        for each in (reference, engine) if turn % 2 else (engine, reference):
            start = time.perf_counter()
            each.run(feed)
            seconds.append(time.perf_counter() - start)
        found.append(seconds[0] / seconds[1] if turn % 2 else seconds[1] / seconds[0])
    return float(statistics.median(found[1:]))
