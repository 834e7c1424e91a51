"""How FLUX.1 is sampled: CLIP and T5 conditioning, packed latents, embedded guidance, true guidance. NumPy only.

The order of operations is that of diffusers' ``FluxPipeline.__call__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.loop import Branch, Components, Feeds, Sampler
from intaglio.runtimes.sampling import Clock, Parameter, Request, check_finite
from intaglio.runtimes.scheduler_flow_match_euler import calculate_shift
from intaglio.runtimes.text import PromptTokenizer

if TYPE_CHECKING:
    from intaglio.profiles.artifact import Artifact

LONGEST_TEXT = 512  # T5 tokens, FluxPipeline.check_inputs
ID_AXES = 3
TIMESTEPS = np.float32(1000)
# Arguments of `calculate_shift` and the scheduler's keys for them.
SHIFT_KEYS = {
    "base_seq_len": "base_image_seq_len",
    "max_seq_len": "max_image_seq_len",
    "base_shift": "base_shift",
    "max_shift": "max_shift",
}


class Flux(Sampler):
    """The sampler of the family ``flux``."""

    components = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
    denoiser = "transformer"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "true_cfg_scale": Parameter(
            kind=float, default=1.0, help="classifier-free guidance; above 1 it needs a negative prompt", minimum=1.0
        ),
        "prompt_2": Parameter(kind=str, default="", help="what T5 reads; empty: the prompt"),
        "negative_prompt_2": Parameter(kind=str, default="", help="what T5 reads; empty: the negative prompt"),
        "max_sequence_length": Parameter(
            kind=int, default=LONGEST_TEXT, help="T5 tokens; schnell was made for 256", minimum=1, maximum=LONGEST_TEXT
        ),
    }

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.tokenizer = PromptTokenizer(artifact.folder / "tokenizer")
        self.tokenizer_2 = PromptTokenizer(artifact.folder / "tokenizer_2")

    def guided(self, request: Request) -> bool:
        """See `Sampler.guided`."""
        return bool(request.options["true_cfg_scale"] > 1)

    def check(self, request: Request) -> None:
        """See `Sampler.check`.

        Raises:
            UsageError: a guidance without a guidance embedding; a negative prompt without true guidance, or the other
                way round; a text length or size the artifact does not allow.
        """
        options = request.options
        if not self.settings["guidance_embeds"] and request.guidance_scale != self.settings["guidance_scale"]:
            default = self.settings["guidance_scale"]
            raise UsageError(
                f"guidance {request.guidance_scale:g} is not allowed: this checkpoint has no guidance embedding; leave "
                f"it out, it is {default:g}, or use --set true_cfg_scale=N with a negative prompt"
            )
        if self.guided(request) and request.negative_prompt is None:
            raise UsageError(
                f"true_cfg_scale {options['true_cfg_scale']:g} needs a negative prompt: --negative-prompt TEXT"
            )
        if not self.guided(request) and (request.negative_prompt or options["negative_prompt_2"]):
            raise UsageError(
                "a negative prompt takes part with true_cfg_scale above 1 only: --set true_cfg_scale=N, or leave it out"
            )
        self.manifest.shapes["t5_tokens"].check("max_sequence_length", options["max_sequence_length"])
        super().check(request)

    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """See `Sampler.encode`: pooled CLIP, and T5 states of the same text or of the second prompt."""
        options = request.options
        texts = {"conditional": (list(request.prompts), options["prompt_2"])}
        if self.guided(request):
            texts["negative"] = ([request.negative_prompt or ""], options["negative_prompt_2"])
        clip_texts = [text for first, _ in texts.values() for text in first]
        t5_texts = [text for first, second in texts.values() for text in ([second] if second else first)]
        length = options["max_sequence_length"]
        with clock.stage("tokenize"):
            ids, ids_2 = self.tokenizer(clip_texts).ids, self.tokenizer_2(t5_texts, length=length).ids
        with clock.stage("text_encoder"):
            pooled = engines["text_encoder"].run({"input_ids": ids})["pooler_output"]
        engines.release("text_encoder")
        with clock.stage("text_encoder_2"):
            states = engines["text_encoder_2"].run({"input_ids": ids_2})["last_hidden_state"]
        check_finite("text_encoder", pooled)
        check_finite("text_encoder_2", states)
        branches, row, row_2 = [], 0, 0
        for name, (first, second) in texts.items():
            rows, rows_2 = len(first), 1 if second else len(first)
            feeds = {
                "pooled_projections": request.per_picture(pooled[row : row + rows]),
                "encoder_hidden_states": request.per_picture(states[row_2 : row_2 + rows_2]),
            }
            branches.append(Branch(name=name, feeds={**feeds, **self.constant_feeds(request)}))
            row, row_2 = row + rows, row_2 + rows_2
        return branches

    def constant_feeds(self, request: Request) -> Feeds:
        """Position ids float32 [tokens, 3], and the guidance [pictures] where the transformer takes one."""
        feeds = {
            "img_ids": image_ids(*self.grid(request)),
            "txt_ids": np.zeros((request.options["max_sequence_length"], ID_AXES), np.float32),
        }
        if self.settings["guidance_embeds"]:
            feeds["guidance"] = np.full(request.pictures, request.guidance_scale, np.float32)
        return feeds

    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """See `Sampler.model_feeds`."""
        times = np.full(len(sample), np.float32(timestep) / TIMESTEPS, np.float32)
        return {"hidden_states": pack(sample), "timestep": times}

    def prediction(self, request: Request, output: np.ndarray) -> np.ndarray:
        """See `Sampler.prediction`."""
        return unpack(output, *self.grid(request))

    def combine(self, request: Request, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Sampler.combine`, with ``true_cfg_scale``."""
        conditional = predictions["conditional"]
        if "negative" not in predictions:
            return conditional
        negative = predictions["negative"]
        mixed: np.ndarray = negative + np.float32(request.options["true_cfg_scale"]) * (conditional - negative)
        return mixed

    def schedule(self, request: Request) -> dict[str, Any]:
        """See `Sampler.schedule`: evenly spaced sigmas, shifted by the number of image tokens."""
        steps, rows, columns = request.num_inference_steps, *self.grid(request)
        given = {name: self.scheduler_config.values.get(key) for name, key in SHIFT_KEYS.items()}
        line = {name: value for name, value in given.items() if value is not None}
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": calculate_shift(rows * columns, **line)}

    def grid(self, request: Request) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        side = 2 * self.settings["vae_scale_factor"]
        return request.height // side, request.width // side


def image_ids(rows: int, columns: int) -> np.ndarray:
    """Position ids float32 [rows * columns, 3]: 0, row, column."""
    ids = np.zeros((rows, columns, ID_AXES), np.float32)
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None]
    return ids.reshape(rows * columns, ID_AXES)


def pack(latents: np.ndarray) -> np.ndarray:
    """Latents [B, C, h, w] as tokens [B, h/2 * w/2, 4C]: each a patch of 2 x 2, channel by channel."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(patches).reshape(batch, -1, 4 * channels)


def unpack(tokens: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`pack` backwards: tokens [B, rows * columns, 4C] as latents [B, C, 2 rows, 2 columns]."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, rows, columns, channels // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(patches).reshape(batch, channels // 4, 2 * rows, 2 * columns)
