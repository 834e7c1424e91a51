"""The sampling loop that every family shares: condition, denoise step by step, decode. NumPy only.

A family's `Sampler` says what its denoiser is fed and how guidance combines its answers; the order of operations is
that of diffusers' pipelines. Latents are [pictures, C, h, w] everywhere; packing to tokens happens at the denoiser.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.evaluation import Evaluation, Feeds, Work, evaluate
from intaglio.runtimes.noise import Noise, batch_randn
from intaglio.runtimes.previews import DECODERS, PREVIEW, Previewer, need_preview_vae
from intaglio.runtimes.sampling import Clock, Parameter, Request, Result, StepEvent, check_finite, to_images
from intaglio.runtimes.schedulers import CleanEstimator, Draw, Scheduler, SchedulerConfig, default_name, make_scheduler
from intaglio.runtimes.tiling import GIB, TILE, VaeTiled, decode_bytes, decode_tiled, decoder_kind

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.profiles.artifact import Artifact
    from intaglio.runtimes.engine import Engine

COMMON_PARAMETERS = {
    "vae_memory": Parameter(
        kind=float, default=16.0, help="GiB of activations above which the VAE decodes in tiles", minimum=0.0
    ),
    "decoder": Parameter(
        kind=str, default=DECODERS[0], help="which VAE makes the pictures; the tiny one is fast", choices=DECODERS
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
        guidance_parameter: the one that scales guidance, where `guidance_scale` is something else.
        guidance_is_true_cfg: whether diffusers calls `guidance_scale` ``true_cfg_scale`` here.
    """

    components: tuple[str, ...]
    denoiser: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    takes_images: int = 0
    needs_images: bool = False
    batched: ClassVar[bool] = True
    guidance_parameter: ClassVar[str | None] = None
    guidance_is_true_cfg: ClassVar[bool] = False

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest
        self.settings = artifact.manifest.settings
        text = (artifact.folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8")
        self.scheduler_config = SchedulerConfig.from_dict(json.loads(text))
        configs = {name: artifact.component(name) / "config.json" for name in DECODERS}
        # Read now: by the time of a request the folder may be another build.
        self.decoder_kinds = {name: decoder_kind(file) for name, file in configs.items() if file.is_file()}

    # What a family says.

    @abstractmethod
    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """Text (and reference pictures) to the denoiser's conditioning, the conditional branch first."""

    @abstractmethod
    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """The feeds that change with every step: `sample` [pictures, C, h, w] packed as the denoiser takes it, time."""

    def widened(self, feeds: Feeds) -> Feeds:
        """The same feeds with the text padded to a common length, so that requests of unlike prompts share a call."""
        return feeds

    def prediction(self, request: Request, output: np.ndarray) -> np.ndarray:
        """The denoiser's first output as [pictures, C, h, w]."""
        return output

    def guidance(self, request: Request) -> float:
        """How strongly the negative branch is left behind."""
        name = self.guidance_parameter
        return request.guidance_scale if name is None else float(request.options[name])

    def guided(self, request: Request) -> bool:
        """Whether a negative branch takes part."""
        return self.guidance(request) > 1

    def combine(self, request: Request, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Classifier-free guidance, arXiv:2207.12598: from the branches' predictions to one."""
        conditional = predictions["conditional"]
        if "negative" not in predictions:
            return conditional
        negative = predictions["negative"]
        mixed: np.ndarray = negative + np.float32(self.guidance(request)) * (conditional - negative)
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
        """The common parameters and the family's; a setting of the artifact of the same name is the default."""
        declared = {**COMMON_PARAMETERS, **self.parameters}
        return {n: dataclasses.replace(p, default=self.settings.get(n, p.default)) for n, p in declared.items()}

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
        if request.options["decoder"] == PREVIEW:
            need_preview_vae(self.artifact)
        self.make_scheduler(request)  # refuses what it cannot
        if request.latents is not None and request.latents.shape != self.latent_shape(request):
            raise UsageError(f"latents have shape {request.latents.shape}, expected {self.latent_shape(request)}")

    def refuse_unread(self, request: Request, names: Iterable[str] = ()) -> None:
        """Refuse a negative prompt, and parameters of these `names`, where guidance is off and nobody reads them.

        Raises:
            UsageError: one of them was given.
        """
        given = {"negative_prompt": request.negative_prompt, **{name: request.options[name] for name in names}}
        for name, value in given.items():
            if value and not self.guided(request):
                scale, word = self.guidance(request), self.guidance_parameter or "guidance"
                raise UsageError(f"{name} takes part with {word} above 1 only, it is {scale:g}; leave it out")

    def make_scheduler(self, request: Request) -> Scheduler:
        """A new scheduler for the request."""
        steps, extra = request.num_inference_steps, self.schedule(request)
        return make_scheduler(request.scheduler, self.scheduler_config, steps, **extra)

    def stream(self, engines: Components, request: Request) -> Generator[StepEvent, bool | None, Result]:
        """Encode, denoise step by step, decode. An event answered (`send`) with ``True`` ends the denoising there."""
        work, answer = self.work(engines, request), cast("Any", None)
        while True:
            try:
                wanted = work.send(answer)
            except StopIteration as end:
                result: Result = end.value
                return result
            if isinstance(wanted, StepEvent):
                answer = yield wanted
            else:
                answer = evaluate(engines[self.denoiser], self.manifest.components[self.denoiser], wanted)

    def work(self, engines: Components, request: Request) -> Work:
        """`stream` with the denoiser left to the caller, who may evaluate it for several requests at once.

        Yields an `Evaluation` for each step, to be answered with `evaluate`'s list, then the step's `StepEvent`, to be
        answered with ``True`` where the denoising is to end there.
        """
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
        engines.release(*(n for n in self.manifest.components if n not in (self.denoiser, request.options["decoder"])))
        previews = Previewer(self.artifact, engines, lambda x, by: self.pixels(engines, request, x, by)[0])
        total = len(scheduler.timesteps) - first
        for step, timestep in enumerate(scheduler.timesteps[first:]):
            start, index = time.perf_counter(), step + first
            with clock.stage("scheduler"):
                sample = scheduler.scale_model_input(latents, index)
                active = self.active(request, branches, step, total)
                feeds = tuple({**b.feeds, **self.model_feeds(request, sample, timestep, b)} for b in active)
            with clock.stage("denoiser"):
                outputs = yield Evaluation(feeds=feeds, together=self.batched)
            with clock.stage("scheduler"):
                predictions = {b.name: self.prediction(request, o) for b, o in zip(active, outputs, strict=True)}
                predicted = check_finite(self.denoiser, self.combine(request, predictions), step=step)
                clean = scheduler.clean(predicted, index, latents) if isinstance(scheduler, CleanEstimator) else None
                latents = scheduler.step(predicted, index, latents, draw)
            estimate = latents if clean is None else clean
            enough = yield StepEvent(
                index=step,
                total=total,
                timestep=float(timestep),
                latents=latents,
                seconds=time.perf_counter() - start,
                preview=functools.partial(previews, estimate),
            )
            if enough:
                latents = estimate
                break
        engines.release(self.denoiser)
        previews.end()
        result = self.decode(engines, request, latents, clock)
        if step + 1 < total:
            result.parameters["stopped_after_steps"] = step + 1
        return result

    def decode(self, engines: Components, request: Request, latents: np.ndarray, clock: Clock) -> Result:
        """Latents to pictures."""
        decoder = request.options["decoder"]
        with clock.stage(decoder):
            pixels, tiles = self.pixels(engines, request, latents, decoder)
        with clock.stage("postprocess"):
            images = to_images(pixels, decoder)
        engines.release(decoder)
        seconds, parameters = clock.seconds, self.report(request)
        if tiles > 1:
            parameters["vae_tiles"] = tiles
        return Result(images=images, latents=latents, seeds=request.seeds, seconds=seconds, parameters=parameters)

    def pixels(
        self, engines: Components, request: Request, latents: np.ndarray, decoder: str
    ) -> tuple[np.ndarray, int]:
        """Decode as many pictures together as ``vae_memory`` allows, in tiles where not even one fits; how many tiles.

        Whether a picture is tiled depends on its size alone, never on its neighbours.
        """
        latents = latents if decoder == PREVIEW else self.unscale(latents)

        def decode(part: np.ndarray) -> np.ndarray:
            return engines[decoder].run({"latent_sample": part})["sample"]

        factor = self.settings["vae_scale_factor"]
        channels, attends = self.decoder_kinds[decoder]
        budget = request.options["vae_memory"]
        needed = decode_bytes(request.height, request.width, channels, factor, attends=attends) / GIB  # one picture's
        if needed <= budget or max(request.height, request.width) <= TILE:
            together = len(latents) if needed * len(latents) <= budget else max(1, int(budget // needed))
            parts = [decode(latents[i : i + together]) for i in range(0, len(latents), together)]
            return np.concatenate(parts), 1
        pixels, tiles = decode_tiled(decode, latents, factor)
        message = (
            f"{decoder} decoded in {tiles} tiles of {TILE} pixels: whole it takes about {needed:.1f} GiB, more than "
            f"{budget:g}; --set vae_memory={math.ceil(needed)} decodes it whole"
        )
        warnings.warn(message, VaeTiled, stacklevel=2)
        return pixels, tiles
