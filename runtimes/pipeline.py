"""``intaglio.load``: an artifact on a backend, ready to make pictures."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.profiles.artifact import Artifact, whole
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import pick, resolve
from intaglio.runtimes.engine import Engine, EngineOptions, load_engine
from intaglio.runtimes.loop import Sampler
from intaglio.runtimes.sampling import Request, Result, StepEvent, read_parameters

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLERS = {
    "flux": "intaglio.runtimes.flux:Flux",
    "flux2": "intaglio.runtimes.flux2:Flux2",
    "qwen_image": "intaglio.runtimes.qwen_image:QwenImage",
    "sd": "intaglio.runtimes.sd:StableDiffusion",
    "sd3": "intaglio.runtimes.sd3:StableDiffusion3",
    "sdxl": "intaglio.runtimes.sdxl:StableDiffusionXL",
}
RESIDENCY = ("all", "low")


class LoadedEngines:
    """An artifact's engines by component name, loaded at first use; see `loop.Components`."""

    def __init__(self, artifact: Artifact, backend: str, options: EngineOptions, *, keep: bool) -> None:
        self.artifact, self.backend, self.options, self.keep = artifact, backend, options, keep
        self.loaded: dict[str, Engine] = {}

    def __getitem__(self, name: str) -> Engine:
        """The engine of a component."""
        if name not in self.loaded:
            self.loaded[name] = load_engine(self.backend, self.artifact, name, self.options)
            self.artifact.check_current()
        return self.loaded[name]

    def release(self, *names: str) -> None:
        """Unload these, unless everything stays loaded."""
        for name in () if self.keep else names:
            if name in self.loaded:
                self.loaded.pop(name).close()

    def close(self) -> None:
        """Unload everything."""
        while self.loaded:
            self.loaded.popitem()[1].close()


class Pipeline:
    """An artifact's components on one backend: all loaded, or (`residency` ``low``) each only while it is needed."""

    def __init__(self, artifact: Artifact, backend: str, options: EngineOptions, residency: str = "all") -> None:
        if residency not in RESIDENCY:
            raise UsageError(f"residency {residency!r} is unknown; allowed: {', '.join(RESIDENCY)}")
        self.artifact, self.backend, self.options = artifact, backend, options
        self.sampler: Sampler = resolve(pick(SAMPLERS, artifact.manifest.family, "family"))(artifact)
        self.engines = LoadedEngines(artifact, backend, options, keep=residency == "all")
        try:
            for name in self.sampler.components if residency == "all" else ():
                self.engines[name]
        except BaseException:
            self.close()
            raise

    def __call__(self, prompt: str | Sequence[str], **parameters: Any) -> Result:
        """Make pictures; parameters as for `request`."""
        steps = self.stream(prompt, **parameters)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                result: Result = stop.value
                return result

    def stream(self, prompt: str | Sequence[str], **parameters: Any) -> Generator[StepEvent, None, Result]:
        """Yield one event per denoiser evaluation and return the result; parameters as for `request`.

        Raises:
            UsageError: a value is not allowed.
            NumericsError: a component returned NaN, infinity, or a picture without content.
        """
        return self.sampler.stream(self.engines, self.request(prompt, **parameters))

    def request(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str | None = None,
        count: int = 1,
        images: Sequence[Image] = (),
        latents: np.ndarray | None = None,
        **options: Any,
    ) -> Request:
        """A complete and checked request.

        Args:
            prompt: text, in any language the checkpoint knows; several make `count` pictures each.
            negative_prompt: what to steer away from; used when guidance is on. Not given: the family's own way.
            seed: picture k equals the picture of ``seed + k`` alone.
            width: pixels; the artifact's own (or the reference picture's) where not given.
            height: pixels; likewise.
            num_inference_steps: the artifact's default where not given.
            guidance_scale: likewise; above 1 the negative prompt takes part.
            scheduler: a name from SCHEDULERS; the checkpoint's own where not given.
            count: pictures of each prompt at once.
            images: reference pictures, where the family takes them.
            latents: noise to start from, standard normal float32 [pictures, C, h, w].
            options: further parameters, `all_parameters` of the sampler.

        Raises:
            UsageError: a value is not allowed.
        """
        for image in images:
            if not hasattr(image, "convert"):
                raise UsageError(f"a reference image is a {type(image).__name__}, allowed: PIL.Image.Image")
        settings, own = self.artifact.manifest.settings, self.sampler.size(images)
        request = Request(
            prompts=(prompt,) if isinstance(prompt, str) else tuple(prompt),
            negative_prompt=negative_prompt,
            seed=seed,
            width=own[0] if width is None else width,
            height=own[1] if height is None else height,
            num_inference_steps=settings["num_inference_steps"] if num_inference_steps is None else num_inference_steps,
            guidance_scale=settings["guidance_scale"] if guidance_scale is None else guidance_scale,
            scheduler=scheduler,
            count=count,
            images=tuple(images),
            latents=latents,
            options=read_parameters(self.sampler.all_parameters, options, self.artifact.manifest.family),
        )
        self.sampler.check(request)
        return request

    @property
    def compile_seconds(self) -> dict[str, float | None]:
        """Seconds that each engine's backend took to read and compile its graph, ``None`` where it compiles nothing."""
        return {name: getattr(engine, "compile_seconds", None) for name, engine in self.engines.loaded.items()}

    def memory(self) -> dict[str, dict[str, int | None]]:
        """What each engine says it holds, in bytes."""
        return {name: engine.memory() for name, engine in self.engines.loaded.items()}

    def close(self) -> None:
        """Unload every component."""
        self.engines.close()


def load(
    artifact: str | Path | Artifact,
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    threads: int = 0,
    checkpoint: str = "",
    settings: Mapping[str, str] | None = None,
    residency: str = "all",
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
        residency: ``all`` keeps every component loaded, ``low`` loads each while it is needed and unloads it again.
        verify: hash every file first.

    Raises:
        ArtifactError: the artifact is incomplete or altered.
        MissingDependency: the backend is not installed; the message is the pip line.
        Unsupported: the device is not there.
    """
    options = EngineOptions(device=device, threads=threads, checkpoint=checkpoint, settings=dict(settings or {}))
    if isinstance(artifact, Artifact):
        return Pipeline(artifact, backend, options, residency)
    return whole(artifact, lambda a: Pipeline(a, backend, options, residency), verify=verify, discard=Pipeline.close)
