"""The sampling loop that every family shares: condition, denoise step by step, decode. NumPy only.

A family's `Sampler` says what its denoiser is fed and how guidance combines its answers; the order of operations is
that of diffusers' pipelines. Latents are [pictures, C, h, w] everywhere; packing to tokens happens at the denoiser.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.noise import Noise, batch_randn
from intaglio.runtimes.sampling import Clock, Parameter, Request, Result, StepEvent, check_finite, to_images
from intaglio.runtimes.schedulers import Draw, Scheduler, SchedulerConfig, default_name, make_scheduler
from intaglio.runtimes.tiling import GIB, TILE, VaeTiled, decode_bytes, decode_tiled

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.profiles.artifact import Artifact
    from intaglio.runtimes.engine import Engine

Feeds = dict[str, np.ndarray]
COMMON_PARAMETERS = {
    "vae_memory": Parameter(
        kind=float, default=4.0, help="GiB of activations above which the VAE decodes in tiles", minimum=0.0
    ),
}


class Components(Protocol):
    """An artifact's engines, loaded at first use."""

    def __getitem__(self, name: str) -> Engine:
        """The engine of a component."""

    def release(self, *names: str) -> None:
        """These are not needed again in this request; they are unloaded where memory is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One of the denoiser's evaluations of a step: its name (``conditional``, ``negative``) and conditioning feeds.

    Feeds whose tensor fact begins with ``batch`` have one row a picture.
    """

    name: str
    feeds: Feeds


class Sampler(ABC):
    """What a family's ``runtimes/X.py`` fills in; holds what every request shares.

    Attributes:
        components: loaded with the pipeline, in order of use. Others of the artifact are loaded at first use.
        denoiser: the one that runs every step.
        parameters: what a request may carry beyond the common values.
        takes_images: how many reference pictures a request may have at most.
        needs_images: whether it must have one.
        batched: whether the branches of a step run as one batch where their shapes allow it.
    """

    components: tuple[str, ...]
    denoiser: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    takes_images: int = 0
    needs_images: bool = False
    batched: ClassVar[bool] = True

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest
        self.settings = artifact.manifest.settings
        text = (artifact.folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8")
        self.scheduler_config = SchedulerConfig.from_dict(json.loads(text))

    # What a family says.

    @abstractmethod
    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """Text (and reference pictures) to the denoiser's conditioning, the conditional branch first."""

    @abstractmethod
    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """The feeds that change with every step: `sample` [pictures, C, h, w] packed as the denoiser takes it, time."""

    def prediction(self, request: Request, output: np.ndarray) -> np.ndarray:
        """The denoiser's first output as [pictures, C, h, w]."""
        return output

    def guided(self, request: Request) -> bool:
        """Whether a negative branch takes part."""
        return request.guidance_scale > 1

    def combine(self, request: Request, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Classifier-free guidance, arXiv:2207.12598: from the branches' predictions to one."""
        conditional = predictions["conditional"]
        if "negative" not in predictions:
            return conditional
        negative = predictions["negative"]
        mixed: np.ndarray = negative + np.float32(request.guidance_scale) * (conditional - negative)
        return mixed

    def active(self, request: Request, branches: Sequence[Branch], index: int, total: int) -> Sequence[Branch]:
        """The branches that run at step `index` of `total`."""
        return branches

    def schedule(self, request: Request) -> dict[str, Any]:
        """Further arguments of `make_scheduler`: ``sigmas`` and ``mu``."""
        return {}

    def latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        """(pictures, C, h, w)."""
        factor = self.settings["vae_scale_factor"]
        channels = self.settings["latent_channels"]
        return (request.pictures, channels, request.height // factor, request.width // factor)

    def size(self, images: Sequence[Image]) -> tuple[int, int]:
        """Width and height in pixels where the request says none, given its reference pictures."""
        shapes = self.manifest.shapes
        return shapes["width"].opt, shapes["height"].opt

    def initial(
        self, engines: Components, request: Request, scheduler: Scheduler, draw: Draw, clock: Clock
    ) -> tuple[np.ndarray, int]:
        """The latents to start from and the step to start at; `draw` gives noise from each picture's own generator."""
        noise = draw() if request.latents is None else request.latents.astype(np.float32)
        return np.float32(scheduler.init_noise_sigma) * noise, 0

    def unscale(self, latents: np.ndarray) -> np.ndarray:
        """Latents as the VAE decoder takes them: divided by ``scaling_factor``, then plus ``shift_factor``."""
        unscaled = latents / np.float32(self.settings["scaling_factor"])
        return (unscaled + np.float32(self.settings.get("shift_factor") or 0)).astype(np.float32)

    def report(self, request: Request) -> dict[str, Any]:
        """What the result says about how it was made."""
        changed = {n: v for n, v in request.options.items() if v != self.all_parameters[n].default}
        single = len(request.prompts) == 1
        return {
            "prompt": request.prompts[0] if single else list(request.prompts),
            "negative_prompt": request.negative_prompt or "",
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "scheduler": request.scheduler or default_name(self.scheduler_config),
            "seed": request.seed,
            "width": request.width,
            "height": request.height,
            **changed,
        }

    # What they share.

    @property
    def all_parameters(self) -> dict[str, Parameter]:
        """The common parameters and the family's."""
        return {**COMMON_PARAMETERS, **self.parameters}

    def check(self, request: Request) -> None:
        """Refuse a size, count or steps outside the ranges, an unknown scheduler, and latents of another shape.

        Raises:
            UsageError: with the value, the range and the nearest allowed value.
            Unsupported: the scheduler cannot honour the checkpoint's configuration.
        """
        for axis in ("width", "height"):
            self.manifest.shapes[axis].check(axis, getattr(request, axis))
        rows = request.pictures * (2 if self.batched and self.guided(request) else 1)
        limit = self.manifest.shapes["batch"].max
        if rows > limit:
            raise UsageError(
                f"{request.pictures} pictures need a batch of {rows}; the artifact allows {limit}: ask for fewer"
            )
        if len(request.images) > self.takes_images:
            allowed = f"at most {self.takes_images}" if self.takes_images else "none"
            raise UsageError(f"{len(request.images)} reference images were given; this artifact takes {allowed}")
        if self.needs_images and not request.images:
            raise UsageError("this artifact starts from a picture and none was given; give one (--image FILE)")
        self.make_scheduler(request)  # refuses what it cannot
        if request.latents is not None and request.latents.shape != self.latent_shape(request):
            raise UsageError(f"latents have shape {request.latents.shape}, expected {self.latent_shape(request)}")

    def make_scheduler(self, request: Request) -> Scheduler:
        """A new scheduler for the request."""
        steps, extra = request.num_inference_steps, self.schedule(request)
        return make_scheduler(request.scheduler, self.scheduler_config, steps, **extra)

    def stream(self, engines: Components, request: Request) -> Generator[StepEvent, None, Result]:
        """Encode, denoise step by step, decode."""
        self.check(request)
        clock = Clock()
        branches = self.encode(engines, request, clock)
        for branch in branches:
            for name, values in branch.feeds.items():
                check_finite(f"{branch.name} {name}", values)
        noises = [Noise(seed) for seed in request.seeds]
        shape = self.latent_shape(request)

        def draw() -> np.ndarray:
            return batch_randn(noises, shape)

        with clock.stage("scheduler"):
            scheduler = self.make_scheduler(request)
        latents, first = self.initial(engines, request, scheduler, draw, clock)
        engines.release(*(n for n in self.manifest.components if n not in (self.denoiser, "vae_decoder")))
        total = len(scheduler.timesteps) - first
        for step, timestep in enumerate(scheduler.timesteps[first:]):
            start, index = time.perf_counter(), step + first
            with clock.stage("scheduler"):
                sample = scheduler.scale_model_input(latents, index)
            active = self.active(request, branches, step, total)
            predicted = self.predict(engines[self.denoiser], request, active, sample, timestep, clock)
            check_finite(self.denoiser, predicted, step=step)
            with clock.stage("scheduler"):
                latents = scheduler.step(predicted, index, latents, draw)
            seconds = time.perf_counter() - start
            yield StepEvent(index=step, total=total, timestep=float(timestep), latents=latents, seconds=seconds)
        engines.release(self.denoiser)
        return self.decode(engines, request, latents, clock)

    def predict(
        self,
        engine: Engine,
        request: Request,
        branches: Sequence[Branch],
        sample: np.ndarray,
        timestep: np.float32,
        clock: Clock,
    ) -> np.ndarray:
        """Run the branches, together where they fit in one batch, and combine them."""
        feeds = [{**b.feeds, **self.model_feeds(request, sample, timestep, b)} for b in branches]
        record = self.manifest.components[self.denoiser]
        rows = {spec.name for spec in record.inputs if spec.shape[0] == "batch"}
        output = record.outputs[0].name
        with clock.stage("denoiser"):
            if len(feeds) > 1 and self.batched and fits_one_batch(feeds, rows):
                joined = {n: np.concatenate([f[n] for f in feeds]) if n in rows else v for n, v in feeds[0].items()}
                outputs = list(np.split(engine.run(joined)[output], len(feeds)))
            else:
                outputs = [engine.run(f)[output] for f in feeds]
        with clock.stage("scheduler"):
            predictions = {b.name: self.prediction(request, o) for b, o in zip(branches, outputs, strict=True)}
            return self.combine(request, predictions)

    def decode(self, engines: Components, request: Request, latents: np.ndarray, clock: Clock) -> Result:
        """Latents to pictures."""
        with clock.stage("vae_decoder"):
            pixels, tiles = self.pixels(engines, request, self.unscale(latents))
        with clock.stage("postprocess"):
            images = to_images(pixels)
        engines.release("vae_decoder")
        seconds, parameters = clock.seconds, self.report(request)
        if tiles > 1:
            parameters["vae_tiles"] = tiles
        return Result(images=images, latents=latents, seeds=request.seeds, seconds=seconds, parameters=parameters)

    def pixels(self, engines: Components, request: Request, latents: np.ndarray) -> tuple[np.ndarray, int]:
        """Decode at once, or in tiles where the activations would take more than ``vae_memory``; how many tiles."""

        def decode(part: np.ndarray) -> np.ndarray:
            return engines["vae_decoder"].run({"latent_sample": part})["sample"]

        needed = decode_bytes(request.height, request.width, self.decoder_channels(), request.pictures) / GIB
        if needed <= request.options["vae_memory"] or max(request.height, request.width) <= TILE:
            return decode(latents), 1
        pixels, tiles = decode_tiled(decode, latents, self.settings["vae_scale_factor"])
        message = (
            f"decoded in {tiles} tiles of {TILE} pixels: whole it takes about {needed:.1f} GiB, more than "
            f"{request.options['vae_memory']:g}; --set vae_memory={math.ceil(needed)} decodes it whole"
        )
        warnings.warn(message, VaeTiled, stacklevel=2)
        return pixels, tiles

    def decoder_channels(self) -> int:
        """Feature channels of the VAE decoder's last stage."""
        config = json.loads((self.artifact.component("vae_decoder") / "config.json").read_text(encoding="utf-8"))
        return int(config["block_out_channels"][0] if "block_out_channels" in config else config["base_dim"])


def fits_one_batch(feeds: Sequence[Feeds], rows: set[str]) -> bool:
    """Whether the branches' feeds have the same shapes, and the same values where there is no batch axis."""
    first = feeds[0]
    return all(
        f[n].shape == first[n].shape and (n in rows or np.array_equal(f[n], first[n])) for f in feeds[1:] for n in first
    )
