"""Run an artifact and its references on every backend that is here, and judge what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from intaglio.exporters.derive import lower
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.certificate import (
    REFERENCE,
    BackendRecord,
    Certificate,
    Comparison,
    Overrides,
    Sampled,
    load_rules,
    overridden,
)
from intaglio.profiles.errors import MissingDependency, ParityError, Unsupported
from intaglio.runtimes.certificate import (
    TARGETS,
    Evidence,
    Miss,
    allowed_on,
    backend_version,
    backends_of,
    misses,
    write_evidence,
)
from intaglio.runtimes.pipeline import Pipeline
from intaglio.runtimes.sampling import Request
from intaglio.runtimes.trajectory import (
    Trajectory,
    compare,
    component_errors,
    digest_of,
    initial_noise,
    lack_of_memory,
    opened,
    request_of,
    trajectory,
)

TORCH, UNQUANTIZED = "torch", "unquantized"
NOT_LOWERED = "plans of the unquantized graphs are not built for a comparison"  # minutes each, and a GPU's memory
Note = Callable[[str], None]


class Work:
    """One certificate in the making: the noise, the references that were run, the records so far."""

    def __init__(
        self,
        artifact: Artifact,
        draft: Artifact | None,
        *,
        prompts: int,
        steps: int | None,
        limits: Overrides,
        note: Note,
    ) -> None:
        self.artifact, self.draft, self.truth = artifact, draft, draft or artifact
        self.steps, self.limits, self.note = steps, limits, note
        self.rules = load_rules()
        self.prompts = self.rules.prompts[:prompts]
        with opened(artifact, "onnxruntime") as pipeline:  # nothing is loaded: what a request is depends on no backend
            self.noise = [initial_noise(pipeline, prompt) for prompt in self.prompts]
            self.components = pipeline.sampler.components
            self.settings = settings_of(pipeline, request_of(pipeline, self.prompts[0], steps))
        self.evidence = Evidence(self.noise)
        self.reference: tuple[str, str] | None = None  # whose pictures are stored, and its version
        self.torch: list[Trajectory] | None = None
        self.records: dict[str, BackendRecord] = {}
        self.skipped: dict[str, str] = {}

    def sample(self, pipeline: Pipeline, what: str, *, keep: bool) -> list[Trajectory]:
        """All prompts, one after the other."""
        runs = []
        for number, (prompt, noise) in enumerate(zip(self.prompts, self.noise, strict=True)):

            def note(text: str, number: int = number) -> None:
                self.note(f"{what} {number + 1}/{len(self.prompts)}, {text}")

            request = request_of(pipeline, prompt, self.steps, noise)
            runs.append(trajectory(pipeline, request, keep=keep, note=note))
        return runs

    def refer(self, artifact: Artifact, backend: str, name: str, what: str) -> list[Trajectory] | None:
        """Run a reference; ``None`` with the reason noted where it cannot run here."""
        reason = lack_of_memory(artifact)
        if reason:
            self.skipped[name] = reason
            return None
        with opened(artifact, backend) as pipeline:
            runs = self.sample(pipeline, what, keep=True)
        if self.reference is None:
            self.reference = (name, backend_version(backend))
            self.evidence.add(REFERENCE, runs)
        return runs

    def run_torch(self) -> None:
        """The reference of everything."""
        self.torch = self.refer(self.truth, TORCH, TORCH, TORCH)

    def references(self, backend: str) -> dict[str, list[Trajectory]]:
        """What a backend is compared with."""
        found = {TORCH: self.torch}
        if self.draft and backend in TARGETS:
            view = self.lowered(self.draft, backend)
            if view is None:
                self.skipped[f"{UNQUANTIZED} {backend}"] = NOT_LOWERED
            else:
                found[UNQUANTIZED] = self.refer(view, backend, f"{UNQUANTIZED} {backend}", f"plain {backend}")
        return {name: runs for name, runs in found.items() if runs is not None}

    def lowered(self, draft: Artifact, backend: str) -> Artifact | None:
        """The draft with its graphs for a backend, in the compute dtypes of the artifact."""
        target, manifest = TARGETS[backend], draft.manifest
        if target == "tensorrt":
            return None
        if target == "onnx":
            return draft
        dtypes = {**manifest.dtypes, target: self.artifact.manifest.dtypes[target]}
        view = Artifact(folder=draft.folder, manifest=dataclasses.replace(manifest, dtypes=dtypes))
        for name, record in manifest.components.items():
            self.note(f"plain {backend}: {name}")
            lower(view, view.folder, name, record, (target,))
        return view

    def judge(self, backend: str, reason: str | None) -> None:
        """Run a backend and its references, and keep the record."""
        limits = overridden(allowed_on(self.rules, self.artifact, backend, self.components), self.limits)
        self.records[backend] = BackendRecord(version=None, allowed=limits)
        if reason:
            self.skipped[backend] = reason
            return
        try:
            references = self.references(backend)
            with opened(self.artifact, backend) as pipeline:
                runs = self.sample(pipeline, backend, keep=False)
                self.note(f"{backend}: components")
                errors = component_errors(pipeline, references)
        except (Unsupported, MissingDependency) as error:
            self.skipped[backend] = str(error)
            return
        against: dict[str, Comparison] = {n: compare(runs, ref, errors[n]) for n, ref in references.items()}
        if not against:
            self.skipped[backend] = "it ran, and there was nothing to compare it with"
        self.evidence.add(backend, runs)
        self.records[backend] = BackendRecord(version=backend_version(backend), allowed=limits, against=against)

    def certificate(self, waived: tuple[str, ...]) -> Certificate:
        """What is written; the manifest's digest is not known yet."""
        name, version = self.reference or (None, None)
        return Certificate(
            prompts=tuple(
                Sampled(text=p.text, seed=p.seed, noise_sha256=digest_of(n))
                for p, n in zip(self.prompts, self.noise, strict=True)
            ),
            settings=self.settings,
            reference=name,
            reference_version=version,
            backends=self.records,
            skipped=self.skipped,
            waived=waived,
        )


def make_certificate(
    artifact: Artifact,
    draft: Artifact | None,
    *,
    prompts: int,
    steps: int | None = None,
    limits: Overrides | None = None,
    accept: bool = False,
    note: Note = lambda text: None,
) -> Certificate:
    """The certificate of an artifact; pictures and latents are written into its folder.

    Args:
        artifact: as built.
        draft: its unquantized graphs for ONNX Runtime, ``None`` where it is unquantized itself. Graphs for other
            backends are added to its folder.
        prompts: how many of the fixed set are sampled.
        steps: of the sampler, ``None`` for the artifact's own.
        limits: replace those of ``certificate.toml``.
        accept: record what misses its threshold instead of raising.
        note: called with what is going on.

    Raises:
        ParityError: a figure misses its threshold.
        NumericsError: NaN or a picture without content, whatever is accepted.
    """
    work = Work(artifact, draft, prompts=prompts, steps=steps, limits=limits or Overrides(), note=note)
    work.run_torch()
    for backend, reason in backends_of(artifact).items():
        work.judge(backend, reason)
    missed = [miss for backend, record in work.records.items() for miss in misses(backend, record)]
    if missed and not accept:
        raise ParityError(complaint(artifact, missed))
    write_evidence(artifact, work.evidence)
    return work.certificate(tuple(miss.text for miss in missed))


def complaint(artifact: Artifact, missed: list[Miss]) -> str:
    """The first miss, how many more there are, and the ways out."""
    first = missed[0]
    record = artifact.manifest.components.get(first.component)
    more = f" ({len(missed) - 1} more)" if len(missed) > 1 else ""
    way = f"choose another --quant {first.component}=FORMAT" if record and record.quantization else ""
    ways = [way, f"set the limit with --set certificate.{first.key}=NUMBER", "keep it as it is with --accept-fidelity"]
    return f"certificate: {first.text}{more}; {', or '.join(w for w in ways if w)}"


def settings_of(pipeline: Pipeline, request: Request) -> dict[str, Any]:
    """What the pictures were made with, prompt and seed aside."""
    facts = pipeline.sampler.report(request)
    return {key: value for key, value in facts.items() if key not in ("prompt", "seed")}
