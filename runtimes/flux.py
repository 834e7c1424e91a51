"""How FLUX.1 is sampled: CLIP and T5 conditioning, packed latents, embedded guidance, true guidance. NumPy only.

The order of operations is that of diffusers' ``FluxPipeline.__call__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.evaluation import Feeds
from intaglio.runtimes.loop import Branch, Components
from intaglio.runtimes.packed import PackedSampler
from intaglio.runtimes.sampling import Clock, Parameter, Request, check_finite
from intaglio.runtimes.text import PromptTokenizer

if TYPE_CHECKING:
    from intaglio.profiles.artifact import Artifact

LONGEST_TEXT = 512  # T5 tokens, FluxPipeline.check_inputs
ID_AXES = 3


class Flux(PackedSampler):
    """The sampler of the family ``flux``."""

    components = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
    denoiser = "transformer"
    guidance_parameter = "true_cfg_scale"
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
        self.refuse_unread(request, ("negative_prompt_2",))
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


def image_ids(rows: int, columns: int) -> np.ndarray:
    """Position ids float32 [rows * columns, 3]: 0, row, column."""
    ids = np.zeros((rows, columns, ID_AXES), np.float32)
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None]
    return ids.reshape(rows * columns, ID_AXES)
