"""How Stable Diffusion 3 and 3.5 are sampled: three text encoders, guidance, skip-layer guidance. NumPy only.

The order of operations is that of diffusers' ``StableDiffusion3Pipeline.__call__``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from intaglio.profiles.errors import ArtifactError, UsageError
from intaglio.runtimes.evaluation import Feeds
from intaglio.runtimes.loop import Branch, Components, Sampler
from intaglio.runtimes.sampling import Clock, Parameter, Request, check_finite
from intaglio.runtimes.scheduler_flow_match_euler import line_shift
from intaglio.runtimes.text import PromptTokenizer

if TYPE_CHECKING:
    from intaglio.profiles.artifact import Artifact

CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # encoder -> tokenizer
T5, T5_TOKENIZER = "text_encoder_3", "tokenizer_3"
ENCODERS = (*CLIPS, T5)
SKIP_LAYERS = "skip_layers"
LONGEST_TEXT = 512  # T5 tokens, StableDiffusion3Pipeline.check_inputs
# diffusers' values, which are those Stability AI recommends for SD 3.5 Medium
START, STOP = "skip_layer_guidance_start", "skip_layer_guidance_stop"
SKIP_GUIDANCE = {"skip_layer_guidance_scale": 2.8, START: 0.01, STOP: 0.2}


@dataclass(frozen=True, slots=True)
class Texts:
    """What each of ENCODERS reads for one branch, a text a prompt or one for all; layers of CLIP to leave out."""

    prompts: tuple[Sequence[str], ...]
    clip_skip: int


class StableDiffusion3(Sampler):
    """The sampler of the family ``sd3``."""

    denoiser = "transformer"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "prompt_2": Parameter(kind=str, default="", help="what the second encoder reads; empty: the prompt"),
        "prompt_3": Parameter(kind=str, default="", help="what T5 reads; empty: the prompt"),
        "negative_prompt_2": Parameter(kind=str, default="", help="likewise; empty: the negative prompt"),
        "negative_prompt_3": Parameter(kind=str, default="", help="likewise; empty: the negative prompt"),
        "max_sequence_length": Parameter(
            kind=int, default=256, help="T5 tokens, zeros without T5", minimum=1, maximum=LONGEST_TEXT
        ),
        "clip_skip": Parameter(kind=int, default=0, help="last layers of CLIP the prompt leaves out", minimum=0),
        "skip_layer_guidance": Parameter(
            kind=bool, default=None, help="steer away from the picture without some blocks; needs a build for it"
        ),
        "skip_layer_guidance_scale": Parameter(kind=float, default=None, help="how strongly; 2.8 if not given"),
        "skip_layer_guidance_start": Parameter(
            kind=float, default=None, help="share of the steps before it; 0.01 if not given", minimum=0, maximum=1
        ),
        "skip_layer_guidance_stop": Parameter(
            kind=float, default=None, help="share of the steps at its end; 0.2 if not given", minimum=0, maximum=1
        ),
    }

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        encoders = [name for name in ENCODERS if name in artifact.manifest.components]
        self.components = (*encoders, "transformer", "vae_decoder")
        names = {**CLIPS, T5: T5_TOKENIZER}
        self.tokenizers = {name: PromptTokenizer(artifact.folder / names[name]) for name in encoders}
        length = self.tokenizers["text_encoder"].length
        if length is None:
            file = artifact.folder / "tokenizer/tokenizer_config.json"
            raise ArtifactError(f"{file} has no model_max_length; build the artifact again")
        self.clip_length: int = length  # of both, as in diffusers
        self.layers = {name: self.count_layers(name) for name in CLIPS}

    def count_layers(self, name: str) -> int:
        """Layers of a CLIP text encoder, from its outputs: one more hidden state."""
        outputs = self.manifest.components[name].outputs
        return sum(output.name.startswith("hidden_states.") for output in outputs) - 1

    def skip_guidance(self, request: Request) -> dict[str, float] | None:
        """Scale, start and stop of skip-layer guidance by their parameters; None where it is off."""
        given = {key: request.options[key] for key in SKIP_GUIDANCE if request.options[key] is not None}
        asked = request.options["skip_layer_guidance"]
        return {**SKIP_GUIDANCE, **given} if asked or (asked is None and given) else None

    def check(self, request: Request) -> None:
        """See `Sampler.check`.

        Raises:
            UsageError: a text length, a layer or a batch the artifact does not have; a text nobody would read;
                skip-layer guidance without guidance, without a step, or in an artifact without it.
        """
        super().check(request)
        options = request.options
        self.manifest.shapes["t5_tokens"].check("max_sequence_length", options["max_sequence_length"])
        deepest = min(self.layers.values()) - 1
        if options["clip_skip"] > deepest:
            raise UsageError(f"clip_skip {options['clip_skip']} is not allowed: 0 to {deepest}")
        self.check_texts(request)
        self.check_skip_guidance(request)

    def check_texts(self, request: Request) -> None:
        """Refuse texts that take no part."""
        for key in ("prompt_3", "negative_prompt_3"):
            if request.options[key] and T5 not in self.tokenizers:
                raise UsageError(f"{key} is what T5 reads, and this artifact was built without it; leave {key} out")
        self.refuse_unread(request, ("negative_prompt_2", "negative_prompt_3"))

    def check_skip_guidance(self, request: Request) -> None:
        """Refuse skip-layer guidance that would do nothing, or cannot be done."""
        given = [key for key in SKIP_GUIDANCE if request.options[key] is not None]
        if request.options["skip_layer_guidance"] is False and given:
            raise UsageError(f"{given[0]} was given with skip_layer_guidance false; leave one of them out")
        window = self.skip_guidance(request)
        if window is None:
            return
        if not self.settings[SKIP_LAYERS]:
            name = self.manifest.provenance["checkpoint"]
            raise UsageError(
                "skip_layer_guidance: this artifact was built without it; "
                f"intaglio build {name} -o ARTIFACT --set sd3.skip_layers=7,8,9 makes one with it"
            )
        if not self.guided(request):
            scale = request.guidance_scale
            raise UsageError(f"skip_layer_guidance takes part with guidance above 1 only, it is {scale:g}")
        rows, limit = 3 * request.pictures, self.manifest.shapes["batch"].max
        if rows > limit:
            raise UsageError(
                f"{request.pictures} pictures with skip_layer_guidance need a batch of {rows}; "
                f"the artifact allows {limit}: ask for fewer"
            )
        start, stop, steps = window[START], window[STOP], request.num_inference_steps
        if not any(in_window(window, index, steps) for index in range(steps)):
            raise UsageError(
                f"no step of {steps} lies between skip_layer_guidance_start {start:g} and skip_layer_guidance_stop "
                f"{stop:g}; ask for more steps, or set them further apart"
            )

    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """See `Sampler.encode`; the skip-layer branch has the conditional one's texts."""
        options, negative = request.options, request.negative_prompt or ""
        positives = (request.prompts, *((t,) if (t := options[f"prompt_{n}"]) else request.prompts for n in (2, 3)))
        texts = {"conditional": Texts(positives, options["clip_skip"])}
        if self.guided(request):
            negatives = (negative, *(options[f"negative_prompt_{n}"] or negative for n in (2, 3)))
            texts["negative"] = Texts(tuple((text,) for text in negatives), 0)  # diffusers skips no layers here
        states: dict[str, list[np.ndarray]] = {name: [] for name in texts}
        pooled: dict[str, list[np.ndarray]] = {name: [] for name in texts}
        for place, encoder in enumerate(CLIPS):
            outputs = self.run_encoder(engines, encoder, texts, place, self.clip_length, clock)
            for name, output in outputs.items():
                layer = self.layers[encoder] - 1 - texts[name].clip_skip
                states[name].append(request.per_picture(output[f"hidden_states.{layer}"]))
                pooled[name].append(request.per_picture(output["text_embeds"]))
        length, width = options["max_sequence_length"], self.settings["joint_attention_dim"]
        zeros = {"last_hidden_state": np.zeros((1, length, width), np.float32)}
        outputs = dict.fromkeys(texts, zeros)
        if T5 in self.tokenizers:
            outputs = self.run_encoder(engines, T5, texts, len(CLIPS), length, clock)
        branches = []
        for name, output in outputs.items():
            clip = np.concatenate(states[name], axis=-1)
            clip = np.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
            t5 = request.per_picture(output["last_hidden_state"])
            feeds = {
                "encoder_hidden_states": np.concatenate([clip, t5], axis=1),
                "pooled_projections": np.concatenate(pooled[name], axis=-1),
            }
            branches.append(Branch(name=name, feeds={**feeds, **self.skip_flags(request, 0)}))
        if self.skip_guidance(request) is not None:
            feeds = {**branches[0].feeds, **self.skip_flags(request, 1)}
            branches.append(Branch(name="skip", feeds=feeds))
        return branches

    def run_encoder(
        self, engines: Components, encoder: str, texts: Mapping[str, Texts], place: int, length: int, clock: Clock
    ) -> dict[str, Feeds]:
        """The outputs of one text encoder for every branch, run as one batch: one row a text."""
        rows = [text for branch in texts.values() for text in branch.prompts[place]]
        with clock.stage("tokenize"):
            ids = self.tokenizers[encoder](rows, length=length).ids
        with clock.stage(encoder):
            outputs = engines[encoder].run({"input_ids": ids})
        for values in outputs.values():
            check_finite(encoder, values)
        engines.release(encoder)
        result, first = {}, 0
        for name, branch in texts.items():
            last = first + len(branch.prompts[place])
            result[name] = {key: values[first:last] for key, values in outputs.items()}
            first = last
        return result

    def skip_flags(self, request: Request, value: int) -> Feeds:
        """The input `skip_layers`, where the transformer has it."""
        if not self.settings[SKIP_LAYERS]:
            return {}
        return {SKIP_LAYERS: np.full(request.pictures, value, np.float32)}

    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """See `Sampler.model_feeds`."""
        return {"hidden_states": sample, "timestep": np.full(len(sample), timestep, np.float32)}

    def active(self, request: Request, branches: Sequence[Branch], index: int, total: int) -> Sequence[Branch]:
        """See `Sampler.active`: the skip-layer branch runs in its share of the steps."""
        window = self.skip_guidance(request)
        if window is None:
            return branches
        return branches if in_window(window, index, total) else branches[:-1]

    def combine(self, request: Request, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Sampler.combine`; skip-layer guidance as Stability AI's SD 3.5 and diffusers add it."""
        mixed = super().combine(request, predictions)
        window = self.skip_guidance(request)
        if window is None or "skip" not in predictions:
            return mixed
        scale = np.float32(window["skip_layer_guidance_scale"])
        return np.asarray(mixed + (predictions["conditional"] - predictions["skip"]) * scale)

    def schedule(self, request: Request) -> dict[str, Any]:
        """See `Sampler.schedule`: the shift grows with the picture where the scheduler's configuration says so."""
        if not self.scheduler_config.values.get("use_dynamic_shifting"):
            return {}
        side = self.settings["patch_size"] * self.settings["vae_scale_factor"]
        tokens = (request.height // side) * (request.width // side)
        return {"mu": line_shift(self.scheduler_config, tokens)}


def in_window(window: Mapping[str, float], index: int, total: int) -> bool:
    """Whether step `index` of `total` has skip-layer guidance, as diffusers counts."""
    return total * window[START] < index < total * window[STOP]
