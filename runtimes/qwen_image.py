"""How Qwen-Image is sampled: a described prompt, packed latents, guidance of the same length. NumPy only.

The order of operations is that of diffusers' ``QwenImagePipeline.__call__``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from intaglio.runtimes.evaluation import Feeds
from intaglio.runtimes.loop import Branch, Components
from intaglio.runtimes.packed import PackedSampler
from intaglio.runtimes.sampling import Clock, Parameter, Request, check_finite
from intaglio.runtimes.text import PromptTokenizer, fill_template

if TYPE_CHECKING:
    from intaglio.profiles.artifact import Artifact

ID_AXES = 3
BUCKET = 64  # tokens: prompts whose lengths end in the same one share calls of the denoiser


class QwenImage(PackedSampler):
    """The sampler of the family ``qwen_image``; ``guidance_scale`` is diffusers' ``true_cfg_scale``."""

    components = ("text_encoder", "transformer", "vae_decoder")
    denoiser = "transformer"
    guidance_is_true_cfg = True
    batched = False  # the prompts of the two branches have different lengths
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "max_sequence_length": Parameter(
            kind=int, default=512, help="tokens of a prompt, the template's end included", minimum=1, maximum=1024
        ),
    }

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.tokenizer = PromptTokenizer(artifact.folder / "tokenizer")

    def check(self, request: Request) -> None:
        """See `Sampler.check`.

        Raises:
            UsageError: a negative prompt without guidance; a text length the artifact does not allow.
        """
        super().check(request)
        self.refuse_unread(request)
        self.manifest.shapes["tokens"].check("max_sequence_length", request.options["max_sequence_length"])

    def guided(self, request: Request) -> bool:
        """See `Sampler.guided`: as in diffusers, guidance needs a negative prompt, be it empty."""
        return super().guided(request) and request.negative_prompt is not None

    def encode(self, engines: Components, request: Request, clock: Clock) -> list[Branch]:
        """See `Sampler.encode`; warns where guidance is there without a negative prompt."""
        guidance, negative = request.guidance_scale, request.negative_prompt
        if guidance > 1 and negative is None:
            message = f"guidance {guidance:g} has no effect without a negative prompt; give one, ' ' will do"
            warnings.warn(message, UserWarning, stacklevel=2)
        branches = [self.branch("conditional", request.prompts, engines, request, clock)]
        if self.guided(request):
            branches.append(self.branch("negative", [negative or ""], engines, request, clock))
        return branches

    def branch(self, name: str, prompts: Sequence[str], engines: Components, request: Request, clock: Clock) -> Branch:
        """Text states [pictures, T, D] without the template's beginning, zeros behind shorter ones, and their mask.

        The text encoder looks to the left only, so that cutting the ids is cutting the states.
        """
        drop = self.settings["prompt_template_drop"]
        with clock.stage("tokenize"):
            texts = [fill_template(self.settings["prompt_template"], prompt) for prompt in prompts]
            length = drop + request.options["max_sequence_length"]
            tokens = self.tokenizer(texts, length=length, padding="longest")
        with clock.stage("text_encoder"):
            feeds = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
            states = engines["text_encoder"].run(feeds)["last_hidden_state"]
        check_finite("text_encoder", states)
        rows = [row[mask.astype(bool)][drop:] for row, mask in zip(states, tokens.mask, strict=True)]
        longest = max(map(len, rows))
        padded = np.zeros((len(rows), longest, states.shape[-1]), np.float32)
        mask = np.zeros((len(rows), longest), np.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)], mask[i, : len(row)] = row, 1
        return Branch(
            name=name,
            feeds={
                "encoder_hidden_states": request.per_picture(padded),
                "encoder_hidden_states_mask": request.per_picture(mask),
                "img_ids": image_ids(*self.grid(request)),
                "txt_ids": text_ids(longest, *self.grid(request)),
            },
        )

    def widened(self, feeds: Feeds) -> Feeds:
        """See `Sampler.widened`: tokens that the mask hides, up to the next multiple of `BUCKET`."""
        states, mask, ids = (feeds[n] for n in ("encoder_hidden_states", "encoder_hidden_states_mask", "txt_ids"))
        length = states.shape[1]
        wanted = min(-(-length // BUCKET) * BUCKET, self.manifest.shapes["tokens"].max)
        if wanted <= length:
            return feeds
        more = np.arange(length, wanted, dtype=np.float32) + ids[0, 0]
        return {
            **feeds,
            "encoder_hidden_states": np.pad(states, ((0, 0), (0, wanted - length), (0, 0))),
            "encoder_hidden_states_mask": np.pad(mask, ((0, 0), (0, wanted - length))),
            "txt_ids": np.concatenate([ids, np.repeat(more[:, None], ID_AXES, axis=1)]),
        }

    def combine(self, request: Request, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Sampler.combine`; then each token is given the length it has in the conditional prediction."""
        mixed = super().combine(request, predictions)
        if "negative" not in predictions:
            return mixed
        tokens, conditional = self.pack(mixed), self.pack(predictions["conditional"])
        ratio = np.linalg.norm(conditional, axis=-1, keepdims=True) / np.linalg.norm(tokens, axis=-1, keepdims=True)
        return self.unpack(request, tokens * ratio)

    def unscale(self, latents: np.ndarray) -> np.ndarray:
        """See `Sampler.unscale`: times each channel's standard deviation, plus its mean."""
        mean, deviation = (
            np.asarray(self.settings[name], np.float32)[None, :, None, None] for name in ("latents_mean", "latents_std")
        )
        unscaled: np.ndarray = latents / (np.float32(1) / deviation) + mean
        return unscaled

    def report(self, request: Request) -> dict[str, Any]:
        """See `Sampler.report`: the guidance under diffusers' name, 1 where it took no part."""
        report = super().report(request)
        return {**report, "true_cfg_scale": request.guidance_scale if self.guided(request) else 1.0}


def image_ids(rows: int, columns: int) -> np.ndarray:
    """Position ids float32 [rows * columns, 3]: frame 0, row and column from the centre, where 0 comes after it."""
    ids = np.zeros((rows, columns, ID_AXES), np.float32)
    ids[..., 1] = np.arange(rows)[:, None] - (rows - rows // 2)
    ids[..., 2] = np.arange(columns)[None] - (columns - columns // 2)
    return ids.reshape(rows * columns, ID_AXES)


def text_ids(length: int, rows: int, columns: int) -> np.ndarray:
    """Position ids float32 [length, 3], the same on every axis: on from where the picture's end."""
    start = max(rows // 2, columns // 2)
    ids = np.arange(start, start + length, dtype=np.float32)
    return np.repeat(ids[:, None], ID_AXES, axis=1)
