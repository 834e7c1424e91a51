"""``intaglio.load``: an artifact on a backend, ready to make pictures."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.registry import pick, resolve
from intaglio.runtimes.engine import Engine, EngineOptions, load_engine
from intaglio.runtimes.sampling import Request, Result, StepEvent

SAMPLERS = {"sd": "intaglio.runtimes.sd:StableDiffusion"}
Components = Mapping[str, Engine]


class Sampler(Protocol):
    """What a family's ``runtimes/X.py`` has."""

    components: tuple[str, ...]

    def check(self, request: Request) -> None:
        """Refuse a request this artifact cannot serve, before anything runs."""

    def stream(self, engines: Components, request: Request) -> Generator[StepEvent, None, Result]:
        """Run it."""


class Pipeline:
    """An artifact's components, loaded on one backend."""

    def __init__(self, artifact: Artifact, backend: str, options: EngineOptions) -> None:
        self.artifact, self.backend, self.options = artifact, backend, options
        self.sampler: Sampler = resolve(pick(SAMPLERS, artifact.manifest.family, "family"))(artifact)
        self.engines: dict[str, Engine] = {}
        try:
            for name in self.sampler.components:
                self.engines[name] = load_engine(backend, artifact, name, options)
        except BaseException:
            self.close()
            raise

    def __call__(self, prompt: str, **parameters: Any) -> Result:
        """Make pictures; parameters as for `stream`."""
        steps = self.stream(prompt, **parameters)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                result: Result = stop.value
                return result

    def stream(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str | None = None,
        count: int = 1,
        latents: np.ndarray | None = None,
    ) -> Generator[StepEvent, None, Result]:
        """Yield one event per denoiser evaluation and return the result.

        Args:
            prompt: text, in any language the checkpoint knows.
            negative_prompt: what to steer away from; used when `guidance_scale` is above 1.
            seed: image k of `count` equals the picture of ``seed + k`` alone.
            width: pixels; the artifact's own where not given.
            height: pixels; likewise.
            num_inference_steps: the artifact's default where not given.
            guidance_scale: likewise; above 1 the negative prompt takes part.
            scheduler: a name from SCHEDULERS; the checkpoint's own where not given.
            count: images at once.
            latents: noise to start from, standard normal float32 [count, C, h, w].

        Raises:
            UsageError: a value is not allowed.
            NumericsError: a component returned NaN, infinity, or a picture without content.
        """
        shapes, settings = self.artifact.manifest.shapes, self.artifact.manifest.settings
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            width=shapes["width"].opt if width is None else width,
            height=shapes["height"].opt if height is None else height,
            num_inference_steps=settings["num_inference_steps"] if num_inference_steps is None else num_inference_steps,
            guidance_scale=settings["guidance_scale"] if guidance_scale is None else guidance_scale,
            scheduler=scheduler,
            count=count,
            latents=latents,
        )
        self.sampler.check(request)
        return self.sampler.stream(self.engines, request)

    def memory(self) -> dict[str, dict[str, int | None]]:
        """What each engine says it holds, in bytes."""
        return {name: engine.memory() for name, engine in self.engines.items()}

    def close(self) -> None:
        """Unload every component."""
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()


def load(
    artifact: str | Path | Artifact,
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    threads: int = 0,
    checkpoint: str = "",
    settings: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Pipeline:
    """Load an artifact on a backend.

    Args:
        artifact: folder, or an opened artifact.
        backend: a name from ENGINES.
        device: the backend's device name.
        threads: CPU threads; 0 leaves it to the backend.
        checkpoint: for the torch backend, where the checkpoint lies.
        settings: further settings of the backend.
        verify: hash every file first.

    Raises:
        ArtifactError: the artifact is incomplete or altered.
        MissingDependency: the backend is not installed; the message is the pip line.
        Unsupported: the device is not there.
    """
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact, verify=verify)
    options = EngineOptions(device=device, threads=threads, checkpoint=checkpoint, settings=dict(settings or {}))
    return Pipeline(opened, backend, options)
