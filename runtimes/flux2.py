"""How FLUX.2 is sampled: stacked text states, reference pictures, embedded or true guidance. NumPy only.

The order of operations is that of diffusers' ``Flux2KleinPipeline.__call__`` and ``Flux2Pipeline.__call__``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.evaluation import Feeds
from intaglio.runtimes.loop import Branch, Components
from intaglio.runtimes.packed import PATCH, PackedSampler, flatten, patchify, unflatten, unpatchify
from intaglio.runtimes.sampling import Clock, Parameter, Request, check_finite
from intaglio.runtimes.scheduler_flow_match_euler import empirical_mu
from intaglio.runtimes.text import PromptTokenizer, fill_template

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.profiles.artifact import Artifact

LONGEST_TEXT = 512
ID_AXES = 4  # time, row, column, text position
REFERENCE_TIME = 10  # reference picture i is at the time 10 + 10 i, diffusers' `_prepare_image_ids`
# Of diffusers' Flux2ImageProcessor.
REFERENCE_AREA, REFERENCE_SIDE, REFERENCE_RATIO = 1024 * 1024, 64, 8
# `settings["guidance"]` -> why no negative prompt takes part.
NO_NEGATIVE = {
    "embedded": "its guidance is an input of the transformer",
    "none": "the checkpoint is distilled, it has no guidance",
}


class Flux2(PackedSampler):
    """The sampler of the family ``flux2``."""

    components = ("text_encoder", "transformer", "vae_decoder")
    denoiser = "transformer"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "max_sequence_length": Parameter(
            kind=int, default=LONGEST_TEXT, help="text tokens, template included", minimum=1, maximum=LONGEST_TEXT
        ),
    }

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.tokenizer = PromptTokenizer(artifact.folder / "tokenizer")
        self.takes_images = int(self.settings["reference_images"])
        self.mean, self.deviation = (
            np.array(self.settings[name], np.float32).reshape(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
        )

    def guided(self, request: Request) -> bool:
        """See `Sampler.guided`; klein base only."""
        return bool(self.settings["guidance"] == "true" and request.guidance_scale > 1)

    def size(self, images: Sequence[Image]) -> tuple[int, int]:
        """See `Sampler.size`: the first reference picture's, as the VAE sees it."""
        return cropped_size(shrunk_size(images[0].size), self.token_side) if images else super().size(images)

    def latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        """See `Sampler.latent_shape`: the channels of a patch are channels of the latents."""
        return (request.pictures, PATCH * PATCH * self.settings["latent_channels"], *self.grid(request))

    def check(self, request: Request) -> None:
        """See `Sampler.check`.

        Raises:
            UsageError: guidance or a negative prompt that would have no effect; a prompt with a word that means a
                picture to the text encoder; a reference picture, text length or number of tokens beyond the ranges.
        """
        kind, default = self.settings["guidance"], self.settings["guidance_scale"]
        if kind == "none" and request.guidance_scale != default:
            raise UsageError(
                f"guidance {request.guidance_scale:g} is not allowed: the checkpoint is distilled, it has no guidance; "
                f"leave it out, it is {default:g}"
            )
        if request.negative_prompt and kind in NO_NEGATIVE:
            raise UsageError(f"a negative prompt would have no effect: {NO_NEGATIVE[kind]}; leave it out")
        self.refuse_unread(request)
        for prompt in (*request.prompts, request.negative_prompt or ""):
            for word in self.settings["forbidden_in_prompts"]:
                if word in prompt:
                    raise UsageError(f"{word} in the prompt {prompt!r} means a picture to the text encoder; drop it")
        self.manifest.shapes["tokens"].check("max_sequence_length", request.options["max_sequence_length"])
        super().check(request)
        sizes = [self.check_reference(image) for image in request.images]
        tokens = sum(w * h for w, h in [(request.width, request.height), *sizes]) // self.token_side**2
        self.manifest.shapes["image_tokens"].check("number of image tokens, reference pictures included,", tokens)

    def check_reference(self, image: Image) -> tuple[int, int]:
        """Width and height in pixels at which a reference picture is encoded.

        Raises:
            UsageError: diffusers refuses it, or the VAE encoder's ranges do.
        """
        width, height = image.size
        if min(width, height) < REFERENCE_SIDE:
            raise UsageError(
                f"a reference picture has {width} x {height} pixels; both sides need {REFERENCE_SIDE} or more"
            )
        if max(width / height, height / width) > REFERENCE_RATIO:
            raise UsageError(
                f"a reference picture has {width} x {height} pixels; one side may be {REFERENCE_RATIO} times the other "
                "at most: crop it"
            )
        size = cropped_size(shrunk_size(image.size), self.token_side)
        for axis, side in zip(("width", "height"), size, strict=True):
            self.manifest.shapes[axis].check(f"a reference picture's {axis}", side)
        return size

    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """See `Sampler.encode`: prompts in the checkpoint's template, and reference pictures as further tokens."""
        prompts = [*request.prompts, *([request.negative_prompt or ""] if self.guided(request) else [])]
        length = request.options["max_sequence_length"]
        with clock.stage("tokenize"):
            texts = [fill_template(self.settings["prompt_template"], prompt) for prompt in prompts]
            special = self.settings["add_special_tokens"]
            tokens = self.tokenizer(texts, length=length, add_special_tokens=special)
        with clock.stage("text_encoder"):
            feeds = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
            states = check_finite("text_encoder", engines["text_encoder"].run(feeds)["prompt_embeds"])
        engines.release("text_encoder")
        rows = {"conditional": states[: len(request.prompts)]}
        if self.guided(request):
            rows["negative"] = states[-1:]
        references = self.encode_references(engines, request, clock)
        constant: Feeds = {
            "txt_ids": position_ids(text=length),
            "img_ids": np.concatenate([position_ids(*self.grid(request)), *reference_ids(references)]),
        }
        if references:  # these stand behind every step's own tokens, see model_feeds
            row = np.concatenate([flatten(latents) for latents in references], axis=1)
            constant["hidden_states"] = np.repeat(row, request.pictures, axis=0)
        if self.settings["guidance"] == "embedded":
            constant["guidance"] = np.full(request.pictures, request.guidance_scale, np.float32)
        return [
            Branch(name=name, feeds={"encoder_hidden_states": request.per_picture(text), **constant})
            for name, text in rows.items()
        ]

    def encode_references(self, engines: Components, request: Request, clock: Clock) -> list[np.ndarray]:
        """Normalised latents [1, C, h, w] of each reference picture, the mode of the VAE's posterior."""
        result = []
        with clock.stage("vae_encoder"):
            for image in request.images:
                pixels = reference_pixels(image, self.token_side)
                moments = engines["vae_encoder"].run({"sample": pixels})["latent_parameters"]
                mode = check_finite("vae_encoder", moments)[:, : self.settings["latent_channels"]]
                result.append((patchify(mode) - self.mean) / self.deviation)
        engines.release("vae_encoder")
        return result

    def pack(self, latents: np.ndarray) -> np.ndarray:
        """See `PackedSampler.pack`; they are patches already."""
        return flatten(latents)

    def unpack(self, request: Request, tokens: np.ndarray) -> np.ndarray:
        """See `PackedSampler.unpack`; reference pictures' tokens, which stand behind, are left out."""
        rows, columns = self.grid(request)
        return unflatten(tokens[:, : rows * columns], rows, columns)

    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """See `Sampler.model_feeds`; with the reference pictures' tokens behind the picture's own."""
        feeds = super().model_feeds(request, sample, timestep, branch)
        if "hidden_states" in branch.feeds:
            feeds["hidden_states"] = np.concatenate([feeds["hidden_states"], branch.feeds["hidden_states"]], axis=1)
        return feeds

    def shift(self, image_tokens: int, steps: int) -> float:
        """See `PackedSampler.shift`; it depends on the steps as well."""
        return empirical_mu(image_tokens, steps)

    def unscale(self, latents: np.ndarray) -> np.ndarray:
        """See `Sampler.unscale`: the VAE's batch norm backwards, then patches of 2 x 2 back in place."""
        return unpatchify(latents * self.deviation + self.mean)

    def report(self, request: Request) -> dict[str, Any]:
        """See `Sampler.report`."""
        sizes = {"reference_images": [f"{w}x{h}" for w, h in (i.size for i in request.images)]}
        return {**super().report(request), **(sizes if request.images else {})}


def position_ids(rows: int = 1, columns: int = 1, *, time: int = 0, text: int = 1) -> np.ndarray:
    """Position ids float32 [rows * columns * text, 4]: time, row, column, text position."""
    grid = np.meshgrid([time], np.arange(rows), np.arange(columns), np.arange(text), indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, ID_AXES).astype(np.float32)


def reference_ids(references: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Position ids of reference pictures' latents [1, C, h, w], each at a time of its own."""
    return [position_ids(*x.shape[2:], time=REFERENCE_TIME * (1 + i)) for i, x in enumerate(references)]


def shrunk_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a reference picture with at most `REFERENCE_AREA` pixels."""
    width, height = size
    if width * height <= REFERENCE_AREA:
        return size
    scale = math.sqrt(REFERENCE_AREA / (width * height))
    return int(width * scale), int(height * scale)


def cropped_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height cut to multiples."""
    return size[0] // multiple * multiple, size[1] // multiple * multiple


def reference_pixels(image: Image, multiple: int) -> np.ndarray:
    """Pixels in [-1, 1] float32 [1, 3, h, w] as diffusers' Flux2ImageProcessor makes them: shrunk, centre cropped."""
    from PIL.Image import Resampling

    if shrunk_size(image.size) != image.size:
        image = image.resize(shrunk_size(image.size), Resampling.LANCZOS)
    width, height = cropped_size(image.size, multiple)
    left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
    cropped = image.crop((left, top, left + width, top + height)).convert("RGB")
    pixels = np.array(cropped).astype(np.float32) / np.float32(255)
    return (np.float32(2) * pixels - np.float32(1)).transpose(2, 0, 1)[None]
