"""Stable Diffusion 3 and 3.5: traceable components and their tensor facts, with or without T5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.checkpoint import write_config
from intaglio.exporters.component import Component
from intaglio.exporters.parts import (
    autoencoder,
    check_classes,
    check_files,
    clip_text_encoder,
    copy_pipeline_files,
    pretrained,
    sampling_defaults,
    sides,
    spec,
    t5_text_encoder,
    vae_scale_factor,
)
from intaglio.exporters.presets import OPTION, preset_of, preset_settings, write_preset_scheduler
from intaglio.exporters.sd3_positions import TABLE, cropped_patch_embed, position_table
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.spec import Range

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.profiles.family import Family

NAME = "sd3"
CLASSES = {
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
CLIP_PARTS = ("text_encoder", "text_encoder_2")
T5, T5_CLASS, T5_TOKENIZER = "text_encoder_3", "T5EncoderModel", "tokenizer_3"
TOKENIZERS = ("tokenizer", "tokenizer_2")
BOOLEANS = {"true": True, "false": False}


def transformer_from_config(checkpoint: Checkpoint) -> Callable[[Mapping[str, Any]], Any]:
    """A maker of an untrained transformer that crops the checkpoint's own position table at any size."""

    def make(config: Mapping[str, Any]) -> Any:
        from diffusers import SD3Transformer2DModel

        # diffusers would compute the whole table first, 1.8 GB in float64 for SD 3.5 Medium, to see it replaced here.
        transformer = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 1})
        table = position_table(checkpoint.weights("transformer"), int(config["pos_embed_max_size"]))
        transformer.pos_embed = cropped_patch_embed(transformer.pos_embed, table)
        return transformer

    return make


def wrap_transformer(skip_layers: Sequence[int]) -> Callable[[Any], torch.nn.Module]:
    """A wrapper of diffusers' transformer with its inputs in optimum's order.

    Latents [B, C, h, w], text states [B, T, D], pooled CLIP [B, P], ``timestep`` (0 to 1000) [B] to velocities
    [B, C, h, w]. With `skip_layers` there is one more input, float32 [B]: in samples where it is 1 those blocks are
    left out, as diffusers' ``skip_layers`` does for a whole batch; where it is 0 nothing changes, to the last bit.
    """
    import torch

    class Transformer(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model
            self.skip: list[torch.Tensor] = []  # the flags of the call under way
            for layer in skip_layers:
                block = model.transformer_blocks[layer]
                block.forward = skippable(block.forward, self.skip)

        def forward(
            self,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            pooled_projections: torch.Tensor,
            timestep: torch.Tensor,
            skip_layers: torch.Tensor | None = None,
        ) -> torch.Tensor:
            self.skip[:] = [] if skip_layers is None else [skip_layers]
            predicted: torch.Tensor = self.model(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                return_dict=False,
            )[0]
            return predicted

    return Transformer


def skippable(forward: Callable[..., Any], flags: list[torch.Tensor]) -> Callable[..., Any]:
    """A block's `forward` that returns its inputs in the samples where ``flags[0]`` [B] is not 0."""
    import torch

    def call(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: Any) -> Any:
        outputs = forward(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **others)
        left_out = flags[0][:, None, None] != 0
        inputs = (encoder_hidden_states, hidden_states)
        # The last block has no text output.
        return tuple(None if o is None else torch.where(left_out, i, o) for i, o in zip(inputs, outputs, strict=True))

    return call


class StableDiffusion3:
    """The exporter of the family."""

    options: Mapping[str, str] = {
        **OPTION,
        "t5": "false leaves the T5 text encoder out, as diffusers' text_encoder_3=None does",
        "skip_layers": "transformer blocks that skip-layer guidance leaves out: 7,8,9 for SD 3.5 Medium",
    }

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """CLIP text encoders, T5 where it is used, transformer, VAE encoder and decoder."""
        config = checkpoint.config("transformer")
        check_parts(checkpoint, config)
        check_files(checkpoint, tokenizers(checkpoint))
        preset_of(checkpoint, NAME)
        factor, skipped = vae_scale_factor(checkpoint), skip_layers(checkpoint)
        latent = (f"height/{factor}", f"width/{factor}")
        encoders = [clip_text_encoder(checkpoint, part, axis="clip_tokens") for part in CLIP_PARTS]
        return (
            *encoders,
            *([t5_text_encoder(checkpoint, T5)] if with_t5(checkpoint) else []),
            Component(
                name="transformer",
                source="transformer",
                model=transformer_from_config(checkpoint),
                reference=pretrained("diffusers", "SD3Transformer2DModel", "transformer"),
                wrap=wrap_transformer(skipped),
                repeats=("transformer_blocks",),
                inputs=(
                    spec("hidden_states", "batch", config["in_channels"], *latent),
                    spec("encoder_hidden_states", "batch", "tokens", config["joint_attention_dim"]),
                    spec("pooled_projections", "batch", config["pooled_projection_dim"]),
                    spec("timestep", "batch"),
                    *([spec("skip_layers", "batch")] if skipped else []),
                ),
                outputs=(spec("out_hidden_states", "batch", config["out_channels"], *latent),),
                ignore=TABLE,
            ),
            *autoencoder(checkpoint),
        )

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """Sides in steps of a token, up to the position table's; text lengths as long as CLIP's and T5's together."""
        config, step = checkpoint.config("transformer"), token_side(checkpoint)
        own = dict.fromkeys(("height", "width"), config["sample_size"] * vae_scale_factor(checkpoint))
        # torch.export tells a side of one token from a longer one.
        ranges = sides(profile.shapes, own, smallest=2 * step, multiple=step)
        largest = config["pos_embed_max_size"] * step
        for axis in own:
            bounds = ranges[axis]
            limit = min(bounds.max, largest)
            ranges[axis] = Range(min=bounds.min, opt=min(bounds.opt, limit), max=limit, multiple=bounds.multiple)
        clip = min(int(checkpoint.config(part)["max_position_embeddings"]) for part in CLIP_PARTS)
        t5 = ranges["t5_tokens"]
        ranges["clip_tokens"] = Range(min=min(ranges["clip_tokens"].min, clip), opt=clip, max=clip)
        ranges["tokens"] = Range(min=clip + t5.min, opt=clip + t5.opt, max=clip + t5.max)
        return ranges

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Latent geometry and scaling, width of the text states, blocks that can be skipped."""
        config, vae = checkpoint.config("transformer"), checkpoint.config("vae")
        return {
            **sampling_defaults(checkpoint),
            **preset_settings(checkpoint, NAME),
            "joint_attention_dim": config["joint_attention_dim"],
            "latent_channels": vae["latent_channels"],
            "patch_size": config["patch_size"],
            "scaling_factor": vae["scaling_factor"],
            "shift_factor": vae["shift_factor"],
            "skip_layers": list(skip_layers(checkpoint)),
            "vae_scale_factor": vae_scale_factor(checkpoint),
        }

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Pipeline index, scheduler, tokenizers; without T5 the index says so, in diffusers' way."""
        copy_pipeline_files(checkpoint, folder, tokenizers(checkpoint))
        write_preset_scheduler(checkpoint, NAME, folder)
        if not with_t5(checkpoint):
            absent = {T5: [None, None], T5_TOKENIZER: [None, None]}
            write_config({**checkpoint.index, **absent}, folder / "model_index.json")


def with_t5(checkpoint: Checkpoint) -> bool:
    """Whether T5 takes part: where the checkpoint has it, unless the option ``t5`` says no.

    Raises:
        UsageError: the option is neither true nor false, or asks for what the checkpoint does not have.
    """
    there, asked = checkpoint.component_class(T5) is not None, checkpoint.options.get("t5")
    if asked is None:
        return there
    if asked not in BOOLEANS:
        raise UsageError(f"--set sd3.t5={asked} is not allowed: {', '.join(BOOLEANS)}")
    if BOOLEANS[asked] and not there:
        raise UsageError(f"--set sd3.t5=true: {checkpoint.folder / 'model_index.json'} has no {T5}; leave it out")
    return BOOLEANS[asked]


def skip_layers(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Blocks of the option ``skip_layers``, ascending; none without it.

    Raises:
        UsageError: they are not different numbers of blocks the transformer has.
    """
    text, count = checkpoint.options.get("skip_layers"), checkpoint.config("transformer")["num_layers"]
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    layers = sorted({int(word) for word in words if word.isdecimal() and int(word) < count})
    if len(layers) != len(words):
        raise UsageError(
            f"--set sd3.skip_layers={text} is not allowed: different numbers from 0 to {count - 1} with commas, "
            "for example 7,8,9"
        )
    return tuple(layers)


def tokenizers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Folders of the tokenizers in use."""
    return (*TOKENIZERS, T5_TOKENIZER) if with_t5(checkpoint) else TOKENIZERS


def token_side(checkpoint: Checkpoint) -> int:
    """Pixels along one side of a token."""
    return int(checkpoint.config("transformer")["patch_size"]) * vae_scale_factor(checkpoint)


def check_parts(checkpoint: Checkpoint, transformer: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be dropped in silence, or fail at the first picture.

    Raises:
        CheckpointError: a part of another class; text encoders that do not fit the transformer.
        Unsupported: an image encoder, which this family does not feed.
    """
    wanted = {**CLASSES, **({T5: (T5_CLASS,)} if with_t5(checkpoint) else {})}
    check_classes(checkpoint, wanted)
    if checkpoint.component_class("image_encoder") is not None:
        raise Unsupported("model_index.json has an image_encoder (IP-Adapter), which the family 'sd3' does not feed")
    clips = [checkpoint.config(part) for part in CLIP_PARTS]
    width, pooled = transformer["joint_attention_dim"], sum(clip["projection_dim"] for clip in clips)
    facts = {
        "pooled_projection_dim": (pooled, "the CLIP text encoders' projections are together"),
        **({"joint_attention_dim": (checkpoint.config(T5)["d_model"], "T5 is")} if with_t5(checkpoint) else {}),
    }
    for key, (value, words) in facts.items():
        if transformer[key] != value:
            raise CheckpointError(f"transformer/config.json has {key} = {transformer[key]}, {words} {value} wide")
    states = sum(clip["hidden_size"] for clip in clips)
    if states > width:
        raise CheckpointError(f"the CLIP text encoders are together {states} wide, the transformer takes {width}")


EXPORTER = StableDiffusion3()
