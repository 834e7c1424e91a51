"""How Stable Diffusion 1.x and 2.x are sampled: conditioning, classifier-free guidance, decoding. NumPy only.

The order of operations is that of diffusers' ``StableDiffusionPipeline.__call__``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.noise import Noise, batch_randn
from intaglio.runtimes.sampling import Clock, Request, Result, StepEvent, check_finite, to_images
from intaglio.runtimes.schedulers import SchedulerConfig, default_name, make_scheduler
from intaglio.runtimes.text import ClipTokenizer

if TYPE_CHECKING:
    from intaglio.profiles.artifact import Artifact
    from intaglio.runtimes.pipeline import Components


HAS_CLIP_SAMPLE = ("DDIMScheduler", "LCMScheduler")
HAS_STEPS_OFFSET = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
)


class StableDiffusion:
    """The sampler of the family ``sd``; holds what every request shares."""

    components = ("text_encoder", "unet", "vae_decoder")

    def __init__(self, artifact: Artifact) -> None:
        self.manifest = artifact.manifest
        self.settings = artifact.manifest.settings
        self.tokenizer = ClipTokenizer(artifact.folder / "tokenizer")
        text = (artifact.folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8")
        self.scheduler_config = as_pipeline_expects(SchedulerConfig.from_dict(json.loads(text)))

    def check(self, request: Request) -> None:
        """Refuse a size, count or steps outside the ranges, an unknown scheduler, and latents of another shape.

        Raises:
            UsageError: with the value, the range and the nearest allowed value.
            Unsupported: the scheduler cannot honour the checkpoint's configuration.
        """
        for axis in ("width", "height"):
            self.manifest.shapes[axis].check(axis, getattr(request, axis))
        rows = request.count * (2 if guided(request) else 1)
        limit = self.manifest.shapes["batch"].max
        if rows > limit:
            raise UsageError(
                f"count {request.count} needs a batch of {rows}; this artifact allows {limit}: ask for fewer at once"
            )
        make_scheduler(request.scheduler, self.scheduler_config, request.num_inference_steps)  # refuses what it cannot
        if request.latents is not None and request.latents.shape != self.latent_shape(request):
            raise UsageError(f"latents have shape {request.latents.shape}, expected {self.latent_shape(request)}")

    def latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        """(count, C, h, w)."""
        factor = self.settings["vae_scale_factor"]
        return (request.count, self.settings["latent_channels"], request.height // factor, request.width // factor)

    def stream(self, engines: Components, request: Request) -> Generator[StepEvent, None, Result]:
        """Encode, denoise step by step, decode."""
        self.check(request)
        clock = Clock()
        states = self._encode(engines, request, clock)
        noises = [Noise(seed) for seed in request.seeds]
        shape = self.latent_shape(request)
        with clock.stage("scheduler"):
            scheduler = make_scheduler(request.scheduler, self.scheduler_config, request.num_inference_steps)
            noise = batch_randn(noises, shape) if request.latents is None else request.latents
            latents = np.float32(scheduler.init_noise_sigma) * noise.astype(np.float32)
        total = len(scheduler.timesteps)
        for index, timestep in enumerate(scheduler.timesteps):
            start = time.perf_counter()
            with clock.stage("scheduler"):
                model_input = scheduler.scale_model_input(latents, index)
            with clock.stage("denoiser"):
                predicted = self._denoise(engines, request, model_input, timestep, states)
            check_finite("unet", predicted, step=index)
            with clock.stage("scheduler"):
                latents = scheduler.step(predicted, index, latents, lambda: batch_randn(noises, shape))
            seconds = time.perf_counter() - start
            yield StepEvent(index=index, total=total, timestep=float(timestep), latents=latents, seconds=seconds)
        return self._decode(engines, request, latents, clock)

    def _encode(self, engines: Components, request: Request, clock: Clock) -> np.ndarray:
        prompts = [request.negative_prompt, request.prompt] if guided(request) else [request.prompt]
        with clock.stage("tokenize"):
            ids = self.tokenizer(prompts)
        with clock.stage("text_encoder"):
            states = engines["text_encoder"].run({"input_ids": ids})["last_hidden_state"]
        return np.repeat(check_finite("text_encoder", states), request.count, axis=0)

    @staticmethod
    def _denoise(
        engines: Components, request: Request, latents: np.ndarray, timestep: np.float32, states: np.ndarray
    ) -> np.ndarray:
        sample = np.concatenate([latents, latents]) if guided(request) else latents
        timesteps = np.full(len(sample), timestep, np.float32)
        feeds = {"sample": sample, "timestep": timesteps, "encoder_hidden_states": states}
        output = engines["unet"].run(feeds)["out_sample"]
        if not guided(request):
            return output
        unconditional, conditional = np.split(output, 2)
        mixed: np.ndarray = unconditional + np.float32(request.guidance_scale) * (conditional - unconditional)
        return mixed

    def _decode(self, engines: Components, request: Request, latents: np.ndarray, clock: Clock) -> Result:
        with clock.stage("vae_decoder"):
            unscaled = (latents / np.float32(self.settings["scaling_factor"])).astype(np.float32)
            pixels = engines["vae_decoder"].run({"latent_sample": unscaled})["sample"]
        with clock.stage("postprocess"):
            images = to_images(pixels)
        parameters = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "scheduler": request.scheduler or default_name(self.scheduler_config),
            "seed": request.seed,
            "width": request.width,
            "height": request.height,
        }
        return Result(images=images, latents=latents, seeds=request.seeds, seconds=clock.seconds, parameters=parameters)


def as_pipeline_expects(config: SchedulerConfig) -> SchedulerConfig:
    """The configuration after diffusers' ``StableDiffusionPipeline.__init__``.

    It overrules outdated scheduler files: ``steps_offset`` becomes 1 and ``clip_sample`` false, for the classes that
    have the key. Without this a checkpoint saved with old defaults would give another picture than in diffusers.
    """
    overruled: dict[str, object] = {}
    if config.class_name in HAS_STEPS_OFFSET:
        overruled["steps_offset"] = 1
    if config.class_name in HAS_CLIP_SAMPLE:
        overruled["clip_sample"] = False
    return config.replace(**overruled)


def guided(request: Request) -> bool:
    """Whether the negative prompt takes part: above a guidance of 1, as in diffusers."""
    return request.guidance_scale > 1
