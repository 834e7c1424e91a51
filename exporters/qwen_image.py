"""Qwen-Image and its distillations: traceable components and their tensor facts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.checkpoint import Checkpoint
from intaglio.exporters.component import Component
from intaglio.exporters.config_files import section
from intaglio.exporters.parts import (
    PATCH,
    check_classes,
    check_files,
    copy_pipeline_files,
    default_sides,
    pretrained,
    sampling_defaults,
    spec,
    untrained,
)
from intaglio.exporters.presets import OPTION, preset_of, preset_settings, write_preset_scheduler
from intaglio.exporters.qwen_image_transformer import wrap_transformer
from intaglio.exporters.qwen_image_vae import one_frame_autoencoder, scale_factor
from intaglio.profiles.errors import CheckpointError, Unsupported
from intaglio.profiles.spec import Range

if TYPE_CHECKING:
    import torch

    from intaglio.profiles.family import Family

NAME = "qwen_image"
TEXT_ENCODER, TRANSFORMER = "Qwen2_5_VLForConditionalGeneration", "QwenImageTransformer2DModel"
CLASSES = {"text_encoder": (TEXT_ENCODER,), "transformer": (TRANSFORMER,), "vae": ("AutoencoderKLQwenImage",)}
# Switches of the transformer's configuration that need inputs or layers this family does not feed. The guidance
# embedding has no layer in diffusers' class, which fails on it.
UNFED = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
TOKENIZERS = ("tokenizer",)
ID_AXES = 3
# `model.layers.0...` and `visual...` before transformers 4.52, `model.language_model.layers.0...` and
# `model.visual...` since.
TEXT_MODEL = ((r"^model\.", ""), (r"^language_model\.", ""))
# QwenImagePipeline.__init__; the drop counts the template's tokens before the prompt with Qwen's own tokenizer.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_DROP = 34


def text_model_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained language model of Qwen2.5-VL, without vision tower and head."""
    import transformers

    full = transformers.Qwen2_5_VLConfig.from_dict(dict(config))
    return transformers.Qwen2_5_VLTextModel(full.text_config)


def text_model(checkpoint: Checkpoint) -> Any:
    """The trained language model inside of Qwen2.5-VL."""
    return pretrained("transformers", TEXT_ENCODER, "text_encoder")(checkpoint).model.language_model


def wrap_text_model(model: Any) -> torch.nn.Module:
    """``input_ids`` and ``attention_mask`` int64 [B, T] to the last hidden states after the final norm [B, T, D].

    Without pictures the three axes of the multimodal rotary embedding (arXiv:2409.12191) are equal: 0, 1, 2, …
    """
    import torch

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            batch, length = input_ids.shape
            positions = torch.arange(length, device=input_ids.device)
            causal = positions[None, :] <= positions[:, None]
            allowed = causal[None, None] & attention_mask.bool()[:, None, None, :]
            states: torch.Tensor = self.model(
                input_ids=input_ids,
                attention_mask={"full_attention": allowed},
                position_ids=positions[None, None].expand(3, batch, length),
                use_cache=False,
            ).last_hidden_state
            return states

    return TextEncoder()


class QwenImage:
    """The exporter of the family."""

    options: Mapping[str, str] = OPTION

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """Text encoder, transformer, VAE encoder and decoder."""
        config = checkpoint.config("transformer")
        check_parts(checkpoint, config)
        check_files(checkpoint, TOKENIZERS)
        preset_of(checkpoint, NAME)
        channels, width = config["in_channels"], config["joint_attention_dim"]
        return (
            Component(
                name="text_encoder",
                source="text_encoder",
                model=text_model_from_config,
                reference=text_model,
                wrap=wrap_text_model,
                inputs=(
                    spec("input_ids", "batch", "tokens", dtype="int64"),
                    spec("attention_mask", "batch", "tokens", dtype="int64"),
                ),
                outputs=(spec("last_hidden_state", "batch", "tokens", width),),
                rename=TEXT_MODEL,
                ignore=r"^visual\.|^lm_head\.",
            ),
            Component(
                name="transformer",
                source="transformer",
                model=untrained("diffusers", TRANSFORMER),
                reference=pretrained("diffusers", TRANSFORMER, "transformer"),
                wrap=wrap_transformer,
                repeats=("transformer_blocks",),
                inputs=(
                    spec("hidden_states", "batch", "image_tokens", channels),
                    spec("encoder_hidden_states", "batch", "tokens", width),
                    spec("encoder_hidden_states_mask", "batch", "tokens", dtype="int64"),
                    spec("timestep", "batch"),
                    spec("img_ids", "image_tokens", ID_AXES),
                    spec("txt_ids", "tokens", ID_AXES),
                ),
                outputs=(spec("out_hidden_states", "batch", "image_tokens", channels),),
            ),
            *one_frame_autoencoder(checkpoint),
        )

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """Sides in steps of a token around diffusers' default."""
        return default_sides(profile.shapes, scale_factor(checkpoint))

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Prompt template, latent geometry and statistics, and what a preset says of steps and guidance."""
        vae = checkpoint.config("vae")
        return {
            **sampling_defaults(checkpoint),
            **preset_settings(checkpoint, NAME),
            "prompt_template": TEMPLATE,
            "prompt_template_drop": TEMPLATE_DROP,
            "latent_channels": vae["z_dim"],
            "vae_scale_factor": scale_factor(checkpoint),
            "latents_mean": vae["latents_mean"],
            "latents_std": vae["latents_std"],
        }

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Pipeline index, tokenizer, and the scheduler's configuration or the preset's."""
        copy_pipeline_files(checkpoint, folder, TOKENIZERS)
        write_preset_scheduler(checkpoint, NAME, folder)


def check_parts(checkpoint: Checkpoint, transformer: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be dropped in silence, or fail at the first picture.

    Raises:
        CheckpointError: a part of another class; a transformer that does not fit the VAE or the text encoder.
        Unsupported: a transformer that needs inputs this family does not feed; a text encoder with a sliding window.
    """
    check_classes(checkpoint, CLASSES)
    for key in UNFED:
        if transformer.get(key):
            raise Unsupported(f"transformer/config.json has {key} = true, which the family '{NAME}' does not feed")
    text: Mapping[str, Any] = checkpoint.config("text_encoder")
    if text.get("text_config"):
        text = section(text, "text_config", checkpoint.folder / "text_encoder/config.json")
    if text.get("use_sliding_window"):
        raise Unsupported(f"text_encoder/config.json has use_sliding_window = true, which '{NAME}' does not export")
    place, latents = "transformer/config.json", checkpoint.config("vae")["z_dim"]
    out_channels = transformer.get("out_channels") or transformer["in_channels"]
    wanted_sizes = {
        "in_channels": (transformer["in_channels"], PATCH * PATCH * latents),
        "patch_size**2 * out_channels": (transformer["patch_size"] ** 2 * out_channels, PATCH * PATCH * latents),
        "joint_attention_dim": (transformer["joint_attention_dim"], text["hidden_size"]),
    }
    for key, (size, needed) in wanted_sizes.items():
        if size != needed:
            raise CheckpointError(f"{place} has {key} = {size}, the VAE and the text encoder need {needed}")


EXPORTER = QwenImage()
