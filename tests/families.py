"""A family's case, built and run: our pictures beside diffusers', and the figures the tolerances are about."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from cases import HEIGHT, WIDTH, Answer, Case, diffusers_answer, diffusers_pipeline

from intaglio.profiles.artifact import Artifact
from intaglio.runtimes.fidelity import psnr, relative_l2
from intaglio.runtimes.pipeline import Pipeline, load

# Measured figures of every case: bench/results/evidence/families.json.
COMPONENT = 1e-4  # relative L2 to torch at untraced shapes
LATENTS = 1e-4  # relative L2 to diffusers after all steps
DECODE = 1e-4  # relative L2 of the un-clamped decode of diffusers' final latents
PICTURE = 55.0  # dB
STEPS, SEED = 4, 11
PROMPT = "a red cat on the moon 红心"
PROMPTS = ("a red heart", "the moon, a blue car, a cat face, 月亮 and a star on the red car")
BACKENDS = ("onnxruntime", "openvino")
CHECKPOINT, BUILT = "checkpoint", "built"
Key = tuple[Any, ...]


def artifact_key(case: Case) -> Key:
    """What decides the artifact: cases with the same key share it."""
    return (case.checkpoint, *sorted(case.options.items()))


def core_cases() -> list[str]:
    """Each family's first case and those that share its artifact; the others run in ``make evidence families``."""
    first: dict[str, Key] = {}
    for case in tiny.CASES.values():
        first.setdefault(case.family, artifact_key(case))
    return [name for name, case in tiny.CASES.items() if artifact_key(case) == first[case.family]]


def by_artifact(names: Iterable[str]) -> list[str]:
    """Names in an order in which cases of one artifact follow each other."""
    keys = [artifact_key(c) for c in tiny.CASES.values()]
    return sorted(names, key=lambda name: keys.index(artifact_key(tiny.CASES[name])))


def build_case(case: Case, folder: Path, targets: tuple[str, ...], options: dict[str, str]) -> None:
    """A case's checkpoint and artifact, in `folder`."""
    from intaglio.exporters.build import build

    family = {f"{case.family}.{k}": v for k, v in case.options.items()}
    build(case.checkpoint(folder / CHECKPOINT), folder / BUILT, targets=targets, options={**family, **options})


class Built:
    """What `build_case` made in a folder, and diffusers' pipeline on it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.checkpoint = case, folder / CHECKPOINT
        self.artifact = Artifact.open(folder / BUILT)
        self.loaded: dict[str, Pipeline] = {}

    @functools.cached_property
    def theirs(self) -> Any:
        """Diffusers' own pipeline."""
        return diffusers_pipeline(self.case, self.checkpoint)

    def parity(self) -> dict[str, dict[str, float]]:
        """Relative L2 of every component to torch at two untraced shapes, by backend."""
        log: dict[str, dict[str, float]] = json.loads((self.artifact.folder / "build.json").read_text())[
            "parity_relative_l2"
        ]
        return log

    def pipeline(self, backend: str) -> Pipeline:
        """Ours on a backend, loaded once."""
        if backend not in self.loaded:
            self.loaded[backend] = load(self.artifact, backend=backend)
        return self.loaded[backend]

    def close(self) -> None:
        """Unload everything."""
        while self.loaded:
            self.loaded.popitem()[1].close()


class Run:
    """A case on what was built for it."""

    def __init__(self, case: Case, built: Built) -> None:
        self.case, self.built = case, built
        self.steps = case.request.get("num_inference_steps", STEPS)

    @functools.cache  # noqa: B019  lives as long as the test of its case
    def answer(self, prompt: str | tuple[str, ...]) -> Answer:
        """Diffusers' own."""
        texts = list(prompt) if isinstance(prompt, tuple) else prompt
        return diffusers_answer(self.case, self.built.theirs, texts, seed=SEED, steps=self.steps)

    def ask(self, pipeline: Pipeline, prompt: str | tuple[str, ...], **changes: Any) -> Any:
        """Ours."""
        request = {"num_inference_steps": self.steps, **self.case.request, **changes}
        return pipeline(prompt, seed=SEED, height=HEIGHT, width=WIDTH, **request)

    def figures(self, pipeline: Pipeline, prompt: str | tuple[str, ...], **changes: Any) -> dict[str, float]:
        """What the tolerances are about: latents, decode, and the worst picture of a batch."""
        result, answer = self.ask(pipeline, prompt, **changes), self.answer(prompt)
        latents = pipeline.sampler.unscale(answer.latents)
        decoded = pipeline.engines["vae_decoder"].run({"latent_sample": latents})["sample"]
        found = np.stack([np.asarray(i) for i in result.images])
        return {
            "latents": relative_l2(result.latents, answer.latents),
            "decode": relative_l2(decoded, answer.pixels),
            "psnr": min(psnr(a, b) for a, b in zip(found, as_bytes(answer.pixels), strict=True)),
        }


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels [B, 3, H, W] as pictures uint8 [B, H, W, 3]."""
    return ((pixels * 0.5 + 0.5).clip(0, 1).transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)


def passes(found: dict[str, float]) -> bool:
    """Whether all tolerances hold."""
    return found["latents"] <= LATENTS and found["decode"] <= DECODE and found["psnr"] >= PICTURE


def disturbed_psnr(run: Run, relative: float = 1e-6) -> float:
    """PSNR of diffusers' picture after every weight changed by `relative`, to the one before: the floor of noise.

    The pictures are compared before they are rounded to bytes, which would hide such small differences.
    """
    import torch

    before = run.answer(PROMPT).pixels
    pipeline, generator = run.built.theirs, torch.Generator().manual_seed(0)
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    parameters = [p for m in modules for p in m.parameters() if p.is_floating_point()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.mul_(1 + relative * torch.randn(p.shape, generator=generator))
        try:
            after = diffusers_answer(run.case, pipeline, PROMPT, seed=SEED, steps=run.steps).pixels
        finally:
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
    difference = np.square(((after - before) * 0.5).astype(np.float64)).mean()
    return float(-10 * np.log10(max(difference, 1e-20)))
