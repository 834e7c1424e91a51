"""How Stable Diffusion 1.x and 2.x are sampled: conditioning and classifier-free guidance. NumPy only.

The order of operations is that of diffusers' ``StableDiffusionPipeline.__call__``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.runtimes.clip_prompts import CONTEXT, PROMPT_WEIGHTS, chunked, encode_chunked
from intaglio.runtimes.evaluation import Feeds
from intaglio.runtimes.loop import Branch, Components, Sampler
from intaglio.runtimes.sampling import Clock, Parameter, Request, check_finite
from intaglio.runtimes.schedulers import SchedulerConfig
from intaglio.runtimes.text import PromptTokenizer

if TYPE_CHECKING:
    from intaglio.profiles.artifact import Artifact

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


class StableDiffusion(Sampler):
    """The sampler of the family ``sd``."""

    components = ("text_encoder", "unet", "vae_decoder")
    denoiser = "unet"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "clip_skip": Parameter(kind=int, default=0, help="last layers of CLIP the prompt leaves out", minimum=0),
        "prompt_weights": PROMPT_WEIGHTS,
    }

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.tokenizer = PromptTokenizer(artifact.folder / "tokenizer")
        self.scheduler_config = as_pipeline_expects(self.scheduler_config)
        outputs = artifact.manifest.components["text_encoder"].outputs
        self.deepest_skip = sum(output.name.startswith("clip_skip.") for output in outputs)

    def check(self, request: Request) -> None:
        """See `Sampler.check`.

        Raises:
            UsageError: a `clip_skip` beyond the layers there are; a negative prompt without guidance.
            Unsupported: a denoiser that wants a mask and a picture.
        """
        super().check(request)
        self.refuse_unread(request)
        if request.options["clip_skip"] > self.deepest_skip:
            raise UsageError(f"clip_skip {request.options['clip_skip']} is not allowed: 0 to {self.deepest_skip}")
        if self.settings["unet_in_channels"] != self.settings["latent_channels"]:
            raise Unsupported(
                f"the UNet takes {self.settings['unet_in_channels']} channels, so it paints into a masked picture; "
                "this version exports such a UNet and has no sampling loop for it"
            )

    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """See `Sampler.encode`."""
        prompts = list(request.prompts)
        texts = {"conditional": self.states(engines, request, prompts, request.options["clip_skip"], clock)}
        if self.guided(request):
            # diffusers skips layers of the prompt alone, webuis of both.
            skip = request.options["clip_skip"] if request.options["prompt_weights"] else 0
            negative = self.states(engines, request, [request.negative_prompt or ""], skip, clock)
            texts["negative"] = negative
        return [Branch(name=n, feeds={"encoder_hidden_states": request.per_picture(s)}) for n, s in texts.items()]

    def states(
        self, engines: Components, request: Request, prompts: Sequence[str], skip: int, clock: Clock
    ) -> np.ndarray:
        """Text states [prompts, T, D], of the layer `skip` before the last, under the final norm."""
        name = f"clip_skip.{skip}" if skip else "last_hidden_state"

        def encode(ids: np.ndarray) -> tuple[np.ndarray, None]:
            with clock.stage("text_encoder"):
                return check_finite("text_encoder", engines["text_encoder"].run({"input_ids": ids})[name]), None

        if not request.options["prompt_weights"]:
            with clock.stage("tokenize"):
                ids = self.tokenizer(prompts).ids
            return encode(ids)[0]
        with clock.stage("tokenize"):
            everything = [*request.prompts, *([request.negative_prompt or ""] if self.guided(request) else [])]
            chunks = dict(
                zip(everything, chunked(self.tokenizer, everything, self.manifest.shapes[CONTEXT]), strict=True)
            )
        return encode_chunked(encode, [chunks[p] for p in prompts])[0]

    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """See `Sampler.model_feeds`."""
        return {"sample": sample, "timestep": np.full(len(sample), timestep, np.float32)}


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
