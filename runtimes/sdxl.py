"""How Stable Diffusion XL is sampled: two text encoders, micro-conditioning, start from a picture. NumPy only.

The order of operations is that of diffusers' ``StableDiffusionXLPipeline.__call__`` and
``StableDiffusionXLImg2ImgPipeline.__call__``; micro-conditioning is section 2.2 of arXiv:2307.01952.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.runtimes.clip_prompts import CONTEXT, PROMPT_WEIGHTS, chunked, encode_chunked
from intaglio.runtimes.evaluation import Feeds
from intaglio.runtimes.loop import Branch, Components, Sampler
from intaglio.runtimes.sampling import Clock, Parameter, Request, check_finite
from intaglio.runtimes.schedulers import Draw, NoiseAdder, Scheduler
from intaglio.runtimes.sdxl_time_ids import PAIRS, time_ids
from intaglio.runtimes.text import PromptTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.profiles.artifact import Artifact

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
STRENGTH = 0.3  # diffusers' default
GUIDANCE_ONLY = ("guidance_rescale", "negative_prompt_2", "negative_aesthetic_score", *(f"negative_{n}" for n in PAIRS))
LOG_VARIANCE = (-30.0, 20.0)  # bounds in diffusers' DiagonalGaussianDistribution
LANCZOS = 1  # PIL.Image.Resampling.LANCZOS, the way of diffusers' VaeImageProcessor


class StableDiffusionXL(Sampler):
    """The sampler of the family ``sdxl``."""

    denoiser = "unet"
    takes_images = 1
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "prompt_2": Parameter(kind=str, default="", help="what the second encoder reads; empty: the prompt"),
        "negative_prompt_2": Parameter(kind=str, default="", help="likewise; empty: the negative prompt"),
        "clip_skip": Parameter(kind=int, default=0, help="further layers of CLIP the prompt leaves out", minimum=0),
        "prompt_weights": PROMPT_WEIGHTS,
        "guidance_rescale": Parameter(
            kind=float, default=0.0, help="how far guidance keeps the contrast, arXiv:2305.08891", minimum=0, maximum=1
        ),
        "strength": Parameter(
            kind=float, default=None, help="how much of a picture is made anew; 0.3 if not given", minimum=0, maximum=1
        ),
        **{name: Parameter(kind=str, default="", help=text) for name, text in PAIRS.items()},
        **{
            f"negative_{name}": Parameter(kind=str, default="", help=f"what guidance leads away from: {text}")
            for name, text in PAIRS.items()
        },
        "aesthetic_score": Parameter(kind=float, default=None, help="the refiner's score; 6 if not given"),
        "negative_aesthetic_score": Parameter(
            kind=float, default=None, help="the score guidance leads away from; 2.5 if not given"
        ),
    }

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        encoders = [name for name in TOKENIZERS if name in artifact.manifest.components]
        self.components = (*encoders, "unet", "vae_decoder")
        self.tokenizers = {name: PromptTokenizer(artifact.folder / TOKENIZERS[name]) for name in encoders}
        self.layers = {name: self.count_layers(name) for name in encoders}
        self.needs_images = self.settings["needs_image"]

    def count_layers(self, name: str) -> int:
        """Layers of a text encoder, from its outputs: one more hidden state."""
        outputs = self.manifest.components[name].outputs
        return sum(output.name.startswith("hidden_states.") for output in outputs) - 1

    def size(self, images: Sequence[Image]) -> tuple[int, int]:
        """The picture's own size, rounded down to whole latents, where one is given."""
        if not images:
            return super().size(images)
        factor = self.settings["vae_scale_factor"]
        width, height = images[0].size
        return width - width % factor, height - height % factor

    def check(self, request: Request) -> None:
        """See `Sampler.check`.

        Raises:
            UsageError: a picture is missing; a value that no part of this artifact would use; a layer it lacks.
            Unsupported: the scheduler cannot start from a picture.
        """
        super().check(request)
        self.check_texts(request)
        self.check_picture(request)
        time_ids(request, scored=self.settings["requires_aesthetics_score"])

    def check_texts(self, request: Request) -> None:
        """Refuse what takes no part, and layers that are not there."""
        options, deepest = request.options, min(self.layers.values()) - 1
        if options["clip_skip"] > deepest:
            raise UsageError(f"clip_skip {options['clip_skip']} is not allowed: 0 to {deepest}")
        for name in ("prompt_2", "negative_prompt_2"):
            if options[name] and len(self.tokenizers) == 1:
                raise UsageError(f"{name} has no reader: this artifact has one text encoder; leave it out")
        if options["negative_prompt_2"] and request.negative_prompt is None:
            raise UsageError("negative_prompt_2 takes part with a negative prompt only, and none was given")
        self.refuse_unread(request, GUIDANCE_ONLY)

    def check_picture(self, request: Request) -> None:
        """Refuse a start this artifact cannot make."""
        if not request.images:
            if request.options["strength"] is not None:
                raise UsageError("strength says how much of a picture is made anew, and none was given; leave it out")
            return
        starting(self.make_scheduler(request))
        if first_step(request) == request.num_inference_steps:
            least = 1 / request.num_inference_steps
            raise UsageError(
                f"strength {strength(request):g} of {request.num_inference_steps} steps leaves none: {least:g} or more"
            )

    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """See `Sampler.encode`; without a negative prompt its states are zeros where the checkpoint wants them so."""
        options, negative = request.options, request.negative_prompt
        texts: dict[str, tuple[str, ...]] = {"text_encoder": request.prompts, "text_encoder_2": request.prompts}
        if options["prompt_2"]:
            texts["text_encoder_2"] = (options["prompt_2"],) * len(request.prompts)
        zeros = negative is None and self.settings["force_zeros_for_empty_prompt"]
        avoided: dict[str, tuple[str, ...]] = {
            "text_encoder": (negative or "",),
            "text_encoder_2": (options["negative_prompt_2"] or negative or "",),
        }
        told: list[dict[str, tuple[str, ...]]] = [texts, avoided] if self.guided(request) and not zeros else [texts]
        chunks = self.count_chunks(told) if options["prompt_weights"] else 0
        states = {"conditional": self.texts(engines, texts, options["clip_skip"], chunks, clock)}
        if self.guided(request) and zeros:
            states["negative"] = {name: np.zeros_like(v) for name, v in states["conditional"].items()}
        elif self.guided(request):
            # diffusers skips layers of the prompt alone, webuis of both.
            skip = options["clip_skip"] if options["prompt_weights"] else 0
            states["negative"] = self.texts(engines, avoided, skip, chunks, clock)
        numbers = time_ids(request, scored=self.settings["requires_aesthetics_score"])
        ids = dict(zip(("conditional", "negative"), numbers, strict=True))
        rows = {name: {**feeds, "time_ids": ids[name]} for name, feeds in states.items()}
        return [Branch(name=n, feeds={k: request.per_picture(v) for k, v in r.items()}) for n, r in rows.items()]

    def count_chunks(self, told: Sequence[Mapping[str, Sequence[str]]]) -> int:
        """Chunks of the longest text: both encoders' states lie side by side, both branches' in one batch."""
        context = self.manifest.shapes[CONTEXT]
        rows = [chunked(t, texts[name], context) for name, t in self.tokenizers.items() for texts in told]
        return max(len(chunks[0].ids) for chunks in rows)

    def texts(
        self, engines: Components, texts: Mapping[str, Sequence[str]], skip: int, chunks: int, clock: Clock
    ) -> Feeds:
        """States of the encoders side by side, [B, T, D], and the pooled vectors of the last one, [B, P].

        The states are those before the last layer, or `skip` layers earlier. With `chunks` the texts have weights and
        that many chunks; the pooled vector is the first chunk's, as in webuis.
        """
        states = []
        for name, tokenizer in self.tokenizers.items():

            def encode(ids: np.ndarray, name: str = name) -> tuple[np.ndarray, np.ndarray | None]:
                with clock.stage(name):
                    outputs = engines[name].run({"input_ids": ids})
                found = check_finite(name, outputs[f"hidden_states.{self.layers[name] - 1 - skip}"])
                return found, outputs.get("text_embeds")

            if chunks:
                split = chunked(tokenizer, texts[name], self.manifest.shapes[CONTEXT], least=chunks)
                found, pooled = encode_chunked(encode, split)
            else:
                with clock.stage("tokenize"):
                    ids = tokenizer(texts[name]).ids
                found, pooled = encode(ids)
            states.append(found)
        assert pooled is not None  # the last encoder has a projection
        return {"encoder_hidden_states": np.concatenate(states, axis=-1), "text_embeds": pooled}

    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """See `Sampler.model_feeds`."""
        return {"sample": sample, "timestep": np.full(len(sample), timestep, np.float32)}

    def combine(self, request: Request, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Sampler.combine`; `guidance_rescale` is section 3.4 of arXiv:2305.08891."""
        mixed, share = super().combine(request, predictions), np.float32(request.options["guidance_rescale"])
        if share == 0 or "negative" not in predictions:
            return mixed
        axes = tuple(range(1, mixed.ndim))
        wanted, found = (x.std(axis=axes, keepdims=True, ddof=1) for x in (predictions["conditional"], mixed))
        rescaled: np.ndarray = share * (mixed * (wanted / found)) + (1 - share) * mixed
        return rescaled

    def initial(
        self, engines: Components, request: Request, scheduler: Scheduler, draw: Draw, clock: Clock
    ) -> tuple[np.ndarray, int]:
        """See `Sampler.initial`; a picture's latents are drawn from the encoder's posterior, then noised."""
        if not request.images:
            return super().initial(engines, request, scheduler, draw, clock)
        with clock.stage("vae_encoder"):
            pixels = to_pixels(request.images[0], request.width, request.height)
            moments = engines["vae_encoder"].run({"sample": pixels})["latent_parameters"]
        mean, log_variance = np.split(check_finite("vae_encoder", moments), 2, axis=1)
        deviation = np.exp(np.float32(0.5) * log_variance.clip(*LOG_VARIANCE))
        clean = self.scale(mean + deviation * draw())
        noise = draw() if request.latents is None else request.latents.astype(np.float32)
        first = first_step(request)
        return starting(scheduler).add_noise(clean, noise, first), first

    def scale(self, latents: np.ndarray) -> np.ndarray:
        """Latents of the VAE encoder as the UNet takes them; the inverse of `unscale`."""
        factor, statistics = np.float32(self.settings["scaling_factor"]), self.statistics()
        if statistics is None:
            return latents * factor
        mean, deviation = statistics
        scaled: np.ndarray = (latents - mean) * factor / deviation
        return scaled

    def unscale(self, latents: np.ndarray) -> np.ndarray:
        """See `Sampler.unscale`; with the latents' mean and deviation where the VAE has them (Playground)."""
        statistics = self.statistics()
        if statistics is None:
            return super().unscale(latents)
        mean, deviation = statistics
        unscaled: np.ndarray = latents * deviation / np.float32(self.settings["scaling_factor"]) + mean
        return unscaled

    def statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and deviation of the VAE's latents, float32 [1, C, 1, 1]."""
        values = [self.settings["latents_mean"], self.settings["latents_std"]]
        if None in values:
            return None
        mean, deviation = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in values)
        return mean, deviation

    def report(self, request: Request) -> dict[str, Any]:
        """See `Sampler.report`."""
        return super().report(request) | ({"strength": strength(request)} if request.images else {})


def starting(scheduler: Scheduler) -> NoiseAdder:
    """`scheduler` as one that can start from a picture.

    Raises:
        Unsupported: it cannot.
    """
    if isinstance(scheduler, NoiseAdder):
        return scheduler
    name = type(scheduler).__name__
    raise Unsupported(f"the scheduler {name} cannot start from a picture; take euler, euler_a, ddim, dpmpp_2m or unipc")


def strength(request: Request) -> float:
    """How much of the picture is made anew."""
    given = request.options["strength"]
    return STRENGTH if given is None else float(given)


def first_step(request: Request) -> int:
    """The step to start at."""
    steps = request.num_inference_steps
    return steps - min(int(steps * strength(request)), steps)


def to_pixels(image: Image, width: int, height: int) -> np.ndarray:
    """A picture as float32 [1, 3, H, W] in [-1, 1], resized and rounded as diffusers' VaeImageProcessor does."""
    resized = image.resize((width, height), resample=LANCZOS).convert("RGB")
    pixels = np.asarray(resized).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((2 * pixels - 1).transpose(2, 0, 1)[None])
