"""Run the real sampling loop with some of its engines replaced by ones that watch; for audits and calibration."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.runtimes.engine import Engine
from intaglio.runtimes.pipeline import Pipeline
from intaglio.runtimes.sampling import Clock, Result

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(slots=True)
class Place:
    """Where a run is: step 0 is text, the first denoiser evaluation is 1, `total` of them; behind it is decoding."""

    step: int = 0
    total: int = 0
    prompt: str = ""


@contextlib.contextmanager
def replaced(pipeline: Pipeline, engines: Mapping[str, Engine]) -> Iterator[None]:
    """The pipeline with these engines in it; its own are unloaded at the end, these are left to the caller."""
    pipeline.engines.loaded.update(engines)
    pipeline.engines.keep = True
    try:
        yield
    finally:
        for name in engines:
            pipeline.engines.loaded.pop(name, None)
        pipeline.engines.close()


def sample(
    pipeline: Pipeline, prompt: str, place: Place, *, whole: bool = True, steps: int | None = None, seed: int = 0
) -> Result | None:
    """One picture at the artifact's own settings, `place` kept on the step; without `whole` its text alone."""
    place.step, place.prompt = 0, prompt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = (waves(*pipeline.sampler.size(())),) if pipeline.sampler.needs_images else ()
        request = pipeline.request(prompt, seed=seed, images=images, num_inference_steps=steps)
        if not whole:
            pipeline.sampler.encode(pipeline.engines, request, Clock())
            return None
        place.total = request.num_inference_steps
        events = pipeline.sampler.stream(pipeline.engines, request)
        while True:
            try:
                place.step = next(events).index + 1
            except StopIteration as stop:
                result: Result = stop.value
                return result


def last_feeds(engines: Mapping[str, Engine], result: Result) -> None:
    """Feed what the loop of a text prompt does not: the VAE encoder the pictures, a tiny VAE the latents."""
    if "vae_encoder" in engines:
        engines["vae_encoder"].run({"sample": as_samples(result)})
    if "vae_preview" in engines:  # it clamps its input, so that the latents of earlier steps reach no further
        engines["vae_preview"].run({"latent_sample": result.latents})


def as_samples(result: Result) -> np.ndarray:
    """A result's pictures as a VAE encoder takes them: float32 [B, 3, H, W] in [-1, 1]."""
    pixels = np.stack([np.asarray(i, np.float32) for i in result.images]).transpose(0, 3, 1, 2)
    return np.asarray(pixels / np.float32(127.5) - 1)


def waves(width: int, height: int) -> Image:
    """A picture of full contrast, for artifacts that start from one."""
    from PIL import Image

    y, x = np.mgrid[:height, :width] / 32
    pixels = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(2 * y)], axis=-1)
    return Image.fromarray(((pixels + 1) * 127.5).astype(np.uint8))


def memory_of(engine: Any) -> dict[str, int | None]:
    """What a watching engine says of its memory: nothing."""
    return {"weight_bytes": None}
