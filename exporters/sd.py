"""Stable Diffusion 1.x and 2.x: traceable components and their tensor facts."""

from __future__ import annotations

import dataclasses
import re
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
    sides,
    spec,
    vae_scale_factor,
)
from intaglio.profiles.errors import CheckpointError, Unsupported
from intaglio.profiles.family import Contract
from intaglio.profiles.spec import Range

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.profiles.family import Family

# diffusers resizes to explicit sizes only when a latent side is not divisible by 2**num_upsamplers, decided in
# Python; a huge value makes the general way the only one, so that one graph serves every size.
ALWAYS_RESIZE = 30
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
# Inputs of a UNet that this family does not feed, by the key of its configuration that asks for them.
UNFED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
# diffusers' StableDiffusionPipeline.__init__: fine-tunes saved by older versions say the size they were not made for.
TRUSTED_VERSION, TRUSTED_SIZE = (0, 9), 64
TOKENIZERS = ("tokenizer",)


def wrap_unet(model: Any) -> torch.nn.Module:
    """``sample`` [B, C, h, w], ``timestep`` float32 [B], ``encoder_hidden_states`` [B, T, D] to ``out_sample``."""
    import torch

    class UNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            predicted: torch.Tensor = self.model(sample, timestep, states, return_dict=False)[0]
            return predicted

    return UNet()


def unet_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained UNet whose resizing works at every size."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(config)
    unet.num_upsamplers = ALWAYS_RESIZE
    return unet


def wrap_text_encoder(model: Any) -> torch.nn.Module:
    """``input_ids`` int64 [B, T] to last hidden states, pooled state and, under the final norm, each earlier layer."""
    import torch

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = self.model(input_ids, output_hidden_states=True)
            norm = getattr(self.model, "text_model", self.model).final_layer_norm
            skipped = [norm(states) for states in output.hidden_states[-2:0:-1]]
            return (output.last_hidden_state, output.pooler_output, *skipped)

    return TextEncoder()


def text_encoder(checkpoint: Checkpoint) -> Component:
    """The CLIP text encoder; ``clip_skip.k`` is what the UNet reads when the last k layers are left out."""
    config, plain = checkpoint.config("text_encoder"), clip_text_encoder(checkpoint, "text_encoder")
    width, skips = config["hidden_size"], range(1, config["num_hidden_layers"])
    states = [
        spec(name, "batch", "tokens", width) for name in ("last_hidden_state", *(f"clip_skip.{k}" for k in skips))
    ]
    outputs = (states[0], spec("pooler_output", "batch", width), *states[1:])
    return dataclasses.replace(plain, wrap=wrap_text_encoder, outputs=outputs)


def upcast_attention(contract: Contract) -> Contract:
    """The numerics of a UNet whose attention overflows float16 (SD 2.1 at 768): ``upcast_attention`` in its config."""
    return dataclasses.replace(contract, float32_ops=(*contract.float32_ops, "Attention"))


class StableDiffusion:
    """The exporter of the family."""

    options: Mapping[str, str] = {}

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """Text encoder, UNet, VAE encoder and decoder."""
        unet = checkpoint.config("unet")
        check_parts(checkpoint, unet)
        check_files(checkpoint, TOKENIZERS)
        factor = vae_scale_factor(checkpoint)
        latent = (f"height/{factor}", f"width/{factor}")
        states = spec("encoder_hidden_states", "batch", "context_tokens", unet["cross_attention_dim"])
        return (
            text_encoder(checkpoint),
            Component(
                name="unet",
                source="unet",
                model=unet_from_config,
                reference=pretrained("diffusers", "UNet2DConditionModel", "unet"),
                wrap=wrap_unet,
                inputs=(spec("sample", "batch", unet["in_channels"], *latent), spec("timestep", "batch"), states),
                outputs=(spec("out_sample", "batch", unet["out_channels"], *latent),),
                contract=upcast_attention if unet.get("upcast_attention") else lambda contract: contract,
            ),
            *autoencoder(checkpoint),
        )

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """Sizes in steps of the VAE's factor around the checkpoint's own; tokens up to its position embeddings."""
        ranges = unet_sides(checkpoint, profile, sample_size(checkpoint.config("unet")))
        length = checkpoint.config("text_encoder")["max_position_embeddings"]
        return {**ranges, "tokens": fitted(ranges["tokens"], length), "context_tokens": context(ranges, length)}

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Latent geometry and scaling, the UNet's channels, the checkpoint's own steps and guidance."""
        unet, vae = checkpoint.config("unet"), checkpoint.config("vae")
        return {
            **sampling_defaults(checkpoint),
            "latent_channels": vae["latent_channels"],
            "vae_scale_factor": vae_scale_factor(checkpoint),
            "scaling_factor": vae.get("scaling_factor", 0.18215),
            "unet_in_channels": unet["in_channels"],
        }

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Pipeline index, scheduler, tokenizer."""
        copy_pipeline_files(checkpoint, folder, TOKENIZERS)


def sample_size(unet: Mapping[str, Any]) -> int | list[int]:
    """The latent side (or height and width) a UNet was made for, as diffusers' StableDiffusionPipeline reads it."""
    size: int | list[int] = unet["sample_size"]
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version", "")))
    old = version is not None and tuple(map(int, version.groups())) < TRUSTED_VERSION
    return TRUSTED_SIZE if old and isinstance(size, int) and size < TRUSTED_SIZE else size


def unet_sides(checkpoint: Checkpoint, profile: Family, sample: int | list[int]) -> dict[str, Range]:
    """The profile's ranges with sides in steps of the VAE's factor around the UNet's own, `sample` in latents."""
    factor, unet = vae_scale_factor(checkpoint), checkpoint.config("unet")
    height, width = sample if isinstance(sample, list) else (sample, sample)
    # torch.export tells a 1x1 feature map from a larger one: the UNet's lowest level keeps at least 2.
    smallest = factor * (2 ** (len(unet["block_out_channels"]) - 1) + 1)
    own = {"height": height * factor, "width": width * factor}
    return sides(profile.shapes, own, smallest=smallest, multiple=factor)


def check_parts(checkpoint: Checkpoint, unet: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be dropped in silence, or fail at the first picture.

    Raises:
        CheckpointError: a part of another class; a UNet that reads states of another width than the text encoder's.
        Unsupported: a UNet that needs inputs this family does not feed.
    """
    check_classes(checkpoint, CLASSES)
    for key in UNFED:
        if unet.get(key) is not None:
            raise Unsupported(f"unet/config.json has {key} = {unet[key]!r}, which the family 'sd' does not feed")
    read, made = unet["cross_attention_dim"], checkpoint.config("text_encoder")["hidden_size"]
    if read != made:
        raise CheckpointError(
            f"unet/config.json has cross_attention_dim = {read}; the text encoder's states are {made} wide"
        )


EXPORTER = StableDiffusion()
