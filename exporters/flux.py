"""FLUX.1 (schnell, dev and their fine-tunes): traceable components and their tensor facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.component import Component
from intaglio.exporters.parts import (
    PATCH,
    autoencoder,
    check_classes,
    check_files,
    clip_text_encoder,
    copy_pipeline_files,
    default_sides,
    fitted,
    pretrained,
    sampling_defaults,
    spec,
    t5_text_encoder,
    vae_scale_factor,
)
from intaglio.exporters.presets import OPTION, preset_of, preset_settings, write_preset_scheduler
from intaglio.profiles.errors import CheckpointError, Unsupported
from intaglio.profiles.spec import Range

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.profiles.family import Family

NAME = "flux"
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "transformer": ("FluxTransformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
ID_AXES = 3


def rotary_table(theta: float, widths: Sequence[int]) -> torch.nn.Module:
    """Position ids float32 [T, axes] to cos and sin float32 [T, sum(widths)], each frequency twice in a row.

    RoFormer, arXiv:2104.09864, one band of channels an axis. diffusers multiplies in float64, which TensorRT does not
    have: here the frequencies are computed in float64 and rounded once, the angles are float32.
    """
    import torch

    class RotaryTable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for axis, width in enumerate(widths):
                exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
                frequencies = (theta**-exponents).float().repeat_interleave(2)
                self.register_buffer(f"frequencies_{axis}", frequencies, persistent=False)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            bands = [ids[:, i : i + 1] * self.get_buffer(f"frequencies_{i}") for i in range(len(widths))]
            angles = torch.cat(bands, dim=-1)
            return angles.cos(), angles.sin()

    return RotaryTable()


def time_table(channels: int) -> torch.nn.Module:
    """Time or guidance float32 [B] to its sinusoids [B, channels], cosines first: section 3.5 of arXiv:1706.03762.

    The frequencies are torch's own. Folded from the graph they differ in the last bit, which a guidance of 3.5, 3500
    here, turns into 2e-4 radians.
    """
    import torch

    class TimeTable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            half = channels // 2
            exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
            self.register_buffer("frequencies", exponents.exp(), persistent=False)

        def forward(self, time: torch.Tensor) -> torch.Tensor:
            angles = time[:, None] * self.get_buffer("frequencies")
            return torch.cat([angles.cos(), angles.sin()], dim=-1)

    return TimeTable()


def transformer_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained transformer whose sinusoids, of positions and of time, have constant frequencies."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_config(config)
    positions, embed = transformer.pos_embed, transformer.time_text_embed
    transformer.pos_embed = rotary_table(positions.theta, positions.axes_dim)
    embed.time_proj = time_table(embed.time_proj.num_channels)
    return transformer


def wrap_transformer(model: Any) -> torch.nn.Module:
    """The transformer with its inputs in diffusers' order; `guidance` is there in guidance-distilled models.

    Packed latents [B, L, 4C], T5 states [B, T, D], pooled CLIP [B, P], ``timestep`` (0 to 1) [B], position ids [L, 3]
    and [T, 3], ``guidance`` [B] to [B, L, 4C]. Time and guidance are multiplied by 1000 inside.
    """
    import torch

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            pooled_projections: torch.Tensor,
            timestep: torch.Tensor,
            img_ids: torch.Tensor,
            txt_ids: torch.Tensor,
            guidance: torch.Tensor | None = None,
        ) -> torch.Tensor:
            predicted: torch.Tensor = self.model(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                img_ids=img_ids,
                txt_ids=txt_ids,
                guidance=guidance,
                return_dict=False,
            )[0]
            return predicted

    return Transformer()


class Flux:
    """The exporter of the family."""

    options: Mapping[str, str] = OPTION

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """CLIP and T5 text encoders, transformer, VAE encoder and decoder."""
        config = checkpoint.config("transformer")
        check_parts(checkpoint, config)
        check_files(checkpoint, TOKENIZERS)
        preset_of(checkpoint, NAME)
        guided = config.get("guidance_embeds", False)
        channels = config["in_channels"]
        return (
            clip_text_encoder(checkpoint, "text_encoder"),
            t5_text_encoder(checkpoint, "text_encoder_2"),
            Component(
                name="transformer",
                source="transformer",
                model=transformer_from_config,
                reference=pretrained("diffusers", "FluxTransformer2DModel", "transformer"),
                wrap=wrap_transformer,
                repeats=("transformer_blocks", "single_transformer_blocks"),
                inputs=(
                    spec("hidden_states", "batch", "image_tokens", channels),
                    spec("encoder_hidden_states", "batch", "t5_tokens", config["joint_attention_dim"]),
                    spec("pooled_projections", "batch", config["pooled_projection_dim"]),
                    spec("timestep", "batch"),
                    spec("img_ids", "image_tokens", ID_AXES),
                    spec("txt_ids", "t5_tokens", ID_AXES),
                    *([spec("guidance", "batch")] if guided else []),
                ),
                outputs=(spec("out_hidden_states", "batch", "image_tokens", config.get("out_channels") or channels),),
            ),
            *autoencoder(checkpoint),
        )

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """Sides in steps of a token around diffusers' default; CLIP's tokens up to its position embeddings."""
        ranges = default_sides(profile.shapes, vae_scale_factor(checkpoint))
        length = checkpoint.config("text_encoder")["max_position_embeddings"]
        return {**ranges, "tokens": fitted(ranges["tokens"], length)}

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Latent geometry and scaling; whether guidance is an input. Without it, the default guidance is none, 0."""
        vae, guided = checkpoint.config("vae"), checkpoint.config("transformer").get("guidance_embeds", False)
        return {
            **({} if guided else {"guidance_scale": 0.0}),
            **sampling_defaults(checkpoint),
            **preset_settings(checkpoint, NAME),
            "guidance_embeds": guided,
            "latent_channels": vae["latent_channels"],
            "vae_scale_factor": vae_scale_factor(checkpoint),
            "scaling_factor": vae["scaling_factor"],
            "shift_factor": vae["shift_factor"],
        }

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Pipeline index, tokenizers, and the scheduler's configuration or the preset's."""
        copy_pipeline_files(checkpoint, folder, TOKENIZERS)
        write_preset_scheduler(checkpoint, NAME, folder)


def check_parts(checkpoint: Checkpoint, transformer: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be dropped in silence, or fail at the first picture.

    Raises:
        CheckpointError: a part of another class; a transformer that does not fit the VAE's latents.
        Unsupported: a transformer whose output has other channels than its input.
    """
    check_classes(checkpoint, CLASSES)
    channels, place = transformer["in_channels"], "transformer/config.json"
    latent_channels = checkpoint.config("vae")["latent_channels"]
    if channels != PATCH * PATCH * latent_channels:
        raise CheckpointError(
            f"{place} has in_channels = {channels}, the VAE's {latent_channels} latent channels need "
            f"{PATCH * PATCH * latent_channels}"
        )
    patch, out_channels = transformer.get("patch_size", 1), transformer.get("out_channels") or channels
    if patch * patch * out_channels != channels:
        raise Unsupported(
            f"{place} has patch_size = {patch} and out_channels = {out_channels}: the family 'flux' needs an output "
            f"of {channels} channels"
        )


EXPORTER = Flux()
