"""Stable Diffusion XL (base, refiner, Turbo, Lightning): traceable components and their tensor facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.component import Component
from intaglio.exporters.parts import (
    autoencoder,
    check_classes,
    check_files,
    clip_text_encoder,
    context,
    copy_pipeline_files,
    fitted,
    pretrained,
    sampling_defaults,
    spec,
    vae_scale_factor,
)
from intaglio.exporters.presets import OPTION, preset_of, preset_settings, write_preset_scheduler
from intaglio.exporters.sd import unet_from_config, unet_sides
from intaglio.profiles.errors import CheckpointError, Unsupported
from intaglio.profiles.family import Contract
from intaglio.profiles.spec import Range

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.profiles.family import Family

NAME = "sdxl"
CLASSES = {
    "text_encoder": ("CLIPTextModel", None),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
IMAGE_TO_IMAGE = "StableDiffusionXLImg2ImgPipeline"
# What `unet/config.json` must say for this family to feed everything it needs.
UNET = {
    "addition_embed_type": "text_time",
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
}


def wrap_unet(model: Any) -> torch.nn.Module:
    """The UNet with positional inputs, in the order of `unet_component`, to ``out_sample``."""
    import torch

    class UNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            sample: torch.Tensor,
            timestep: torch.Tensor,
            states: torch.Tensor,
            text_embeds: torch.Tensor,
            time_ids: torch.Tensor,
        ) -> torch.Tensor:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            predicted: torch.Tensor
            (predicted,) = self.model(sample, timestep, states, added_cond_kwargs=added, return_dict=False)
            return predicted

    return UNet()


def unet_component(checkpoint: Checkpoint) -> Component:
    """The UNet: ``sample`` [B, C, h, w], ``timestep`` [B], states [B, T, D], pooled [B, P] and numbers [B, ids]."""
    config, factor = checkpoint.config("unet"), vae_scale_factor(checkpoint)
    latent = (f"height/{factor}", f"width/{factor}")
    return Component(
        name="unet",
        source="unet",
        model=unet_from_config,
        reference=pretrained("diffusers", "UNet2DConditionModel", "unet"),
        wrap=wrap_unet,
        inputs=(
            spec("sample", "batch", config["in_channels"], *latent),
            spec("timestep", "batch"),
            spec("encoder_hidden_states", "batch", "context_tokens", config["cross_attention_dim"]),
            spec("text_embeds", "batch", checkpoint.config("text_encoder_2")["projection_dim"]),
            spec("time_ids", "batch", time_ids(checkpoint)),
        ),
        outputs=(spec("out_sample", "batch", config["out_channels"], *latent),),
    )


def made_for_float16(contract: Contract) -> Contract:
    """The numerics of a VAE that was scaled down so that it fits float16: it says ``force_upcast`` false."""
    return dataclasses.replace(contract, dtype="float16", allowed=("float16", "bfloat16", "float32"))


def text_encoders(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The text encoders there are; the refiner has the second alone."""
    return tuple(part for part in TOKENIZERS if checkpoint.component_class(part))


def tokenizers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Their tokenizers."""
    return tuple(TOKENIZERS[part] for part in text_encoders(checkpoint))


def time_ids(checkpoint: Checkpoint) -> int:
    """How many numbers the UNet is told: two sizes and a corner, or a size, a corner and a score."""
    return 5 if checkpoint.index.get("requires_aesthetics_score", False) else 6


class StableDiffusionXL:
    """The exporter of the family."""

    options: Mapping[str, str] = OPTION

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """One or two text encoders, UNet, VAE encoder and decoder."""
        check_parts(checkpoint)
        check_unet(checkpoint)
        preset_of(checkpoint, NAME)
        check_files(checkpoint, tokenizers(checkpoint))
        encoders = tuple(clip_text_encoder(checkpoint, part) for part in text_encoders(checkpoint))
        vae = autoencoder(checkpoint, tiny=False)
        if checkpoint.config("vae").get("force_upcast", True) is False:
            vae = tuple(dataclasses.replace(part, contract=made_for_float16) for part in vae)
        return (*encoders, unet_component(checkpoint), *vae)

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """Sizes in steps of the VAE's factor around the checkpoint's own; tokens up to the position embeddings.

        Raises:
            CheckpointError: the text encoders take texts of different lengths.
        """
        ranges = unet_sides(checkpoint, profile, checkpoint.config("unet")["sample_size"])
        lengths = {checkpoint.config(part)["max_position_embeddings"] for part in text_encoders(checkpoint)}
        if len(lengths) > 1:
            raise CheckpointError(f"the text encoders take {sorted(lengths)} tokens; both must take as many")
        length = lengths.pop()
        return {**ranges, "tokens": fitted(ranges["tokens"], length), "context_tokens": context(ranges, length)}

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Latent geometry and scaling, and what the pipeline does with prompts, pictures and scores."""
        vae, index = checkpoint.config("vae"), checkpoint.index
        return {
            **sampling_defaults(checkpoint),
            **preset_settings(checkpoint, NAME),
            "latent_channels": vae["latent_channels"],
            "vae_scale_factor": vae_scale_factor(checkpoint),
            "scaling_factor": vae.get("scaling_factor", 0.18215),
            "latents_mean": vae.get("latents_mean"),
            "latents_std": vae.get("latents_std"),
            "force_upcast": vae.get("force_upcast", True),
            "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
            "requires_aesthetics_score": index.get("requires_aesthetics_score", False),
            "needs_image": checkpoint.pipeline_class == IMAGE_TO_IMAGE,
        }

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Pipeline index, tokenizers, and the scheduler's configuration or the preset's."""
        copy_pipeline_files(checkpoint, folder, tokenizers(checkpoint))
        write_preset_scheduler(checkpoint, NAME, folder)


def check_parts(checkpoint: Checkpoint) -> None:
    """Refuse parts that this family cannot read.

    Raises:
        CheckpointError: a part of another class; a text encoder without its tokenizer or the other way round.
    """
    check_classes(checkpoint, CLASSES)
    for part, tokenizer in TOKENIZERS.items():
        if (checkpoint.component_class(part) is None) != (checkpoint.component_class(tokenizer) is None):
            raise CheckpointError(f"model_index.json has only one of {part} and {tokenizer}; it needs both or neither")


def check_unet(checkpoint: Checkpoint) -> None:
    """Refuse a UNet that would be fed too little, or other than it expects.

    Raises:
        Unsupported: it needs inputs this family does not feed (inpainting masks, a guidance embedding).
        CheckpointError: its widths are not those of the text encoders.
    """
    unet, latent = checkpoint.config("unet"), checkpoint.config("vae")["latent_channels"]
    for key, wanted in UNET.items():
        if unet.get(key) != wanted:
            raise Unsupported(f"unet/config.json has {key} = {unet.get(key)!r}; the family 'sdxl' feeds {wanted!r}")
    if unet["in_channels"] != latent:
        raise Unsupported(f"the UNet takes {unet['in_channels']} channels, the VAE makes {latent}; they must be equal")
    told = time_ids(checkpoint) * unet["addition_time_embed_dim"]
    found = {
        "cross_attention_dim": sum(checkpoint.config(part)["hidden_size"] for part in text_encoders(checkpoint)),
        "projection_class_embeddings_input_dim": told + checkpoint.config("text_encoder_2")["projection_dim"],
    }
    for key, value in found.items():
        if unet[key] != value:
            raise CheckpointError(f"unet/config.json has {key} = {unet[key]}; the text encoders and sizes give {value}")


EXPORTER = StableDiffusionXL()
