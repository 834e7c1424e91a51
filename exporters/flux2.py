"""FLUX.2 (klein and dev): traceable components and their tensor facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters.component import Component
from intaglio.exporters.decoder_text_encoder import decoder_text_encoder, text_config
from intaglio.exporters.flux import rotary_table, time_table
from intaglio.exporters.parts import (
    PATCH,
    autoencoder,
    check_classes,
    check_files,
    copy_pipeline_files,
    default_sides,
    pretrained,
    sampling_defaults,
    spec,
    vae_scale_factor,
)
from intaglio.exporters.tokenizer_files import load_tokenizer, prompt_template
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.spec import Range
from intaglio.runtimes.text import MARKER

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.profiles.family import Family

TOKENIZERS = ("tokenizer",)
TOKENS_OF_REFERENCE = 4096  # diffusers shrinks reference pictures to 1024 x 1024 pixels
ID_AXES = 4
OUT_LAYERS, REFERENCES = "text_encoder_out_layers", "reference_images"
DISTILLED = {"num_inference_steps": 4, "guidance_scale": 1.0}  # model cards of FLUX.2-klein-4B and -9B
KLEIN, DEV = "Flux2KleinPipeline", "Flux2Pipeline"
LONGEST_TEXT = 512
MOST_REFERENCES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a pipeline class does in its own way.

    Attributes:
        text_encoder: class of its text encoder.
        states: hidden states of the released checkpoints that become the embedding.
        template: options of the tokenizer's chat template.
        forbidden: what diffusers takes out of prompts, because the text encoder would see a picture there.
    """

    text_encoder: str
    states: tuple[int, ...]
    template: Mapping[str, Any]
    forbidden: tuple[str, ...] = ()


VARIANTS: Mapping[str, Variant] = {
    KLEIN: Variant(
        text_encoder="Qwen3ForCausalLM",
        states=(9, 18, 27),
        template={"add_generation_prompt": True, "enable_thinking": False},
    ),
    DEV: Variant(
        text_encoder="Mistral3ForConditionalGeneration",
        states=(10, 20, 30),
        template={"add_generation_prompt": False},
        forbidden=("[IMG]",),
    ),
}


def transformer_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained transformer whose sinusoids, of positions, time and guidance, have constant frequencies."""
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel.from_config(config)
    positions, embed = transformer.pos_embed, transformer.time_guidance_embed
    transformer.pos_embed = rotary_table(positions.theta, positions.axes_dim)
    embed.time_proj = time_table(embed.time_proj.num_channels)
    return transformer


def wrap_transformer(model: Any) -> torch.nn.Module:
    """The transformer with its inputs in this order; `guidance` is there in dev.

    Packed latents and reference pictures [B, L, C], text states [B, T, D], ``timestep`` (0 to 1) [B], position ids
    [L, 4] and [T, 4], ``guidance`` [B] to [B, L, C]. Time and guidance are multiplied by 1000 inside.
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
            timestep: torch.Tensor,
            img_ids: torch.Tensor,
            txt_ids: torch.Tensor,
            guidance: torch.Tensor | None = None,
        ) -> torch.Tensor:
            predicted: torch.Tensor = self.model(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                img_ids=img_ids,
                txt_ids=txt_ids,
                guidance=guidance,
                return_dict=False,
            )[0]
            return predicted

    return Transformer()


def transformer(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Component:
    """The denoiser's component."""
    channels = config["in_channels"]
    return Component(
        name="transformer",
        source="transformer",
        model=transformer_from_config,
        reference=pretrained("diffusers", "Flux2Transformer2DModel", "transformer"),
        wrap=wrap_transformer,
        repeats=("transformer_blocks", "single_transformer_blocks"),
        inputs=(
            spec("hidden_states", "batch", "image_tokens", channels),
            spec("encoder_hidden_states", "batch", "tokens", config["joint_attention_dim"]),
            spec("timestep", "batch"),
            spec("img_ids", "image_tokens", ID_AXES),
            spec("txt_ids", "tokens", ID_AXES),
            *([spec("guidance", "batch")] if guidance_kind(checkpoint) == "embedded" else []),
        ),
        outputs=(spec("out_hidden_states", "batch", "image_tokens", config.get("out_channels") or channels),),
    )


class Flux2:
    """The exporter of the family."""

    options: Mapping[str, str] = {
        OUT_LAYERS: "hidden states of the text encoder that become the embedding; 9,18,27 in klein, 10,20,30 in dev",
        REFERENCES: f"most reference pictures of a request, 0 to {MOST_REFERENCES}; fewer make smaller TensorRT plans",
    }

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """Text encoder, transformer, VAE encoder and decoder."""
        config = checkpoint.config("transformer")
        check_parts(checkpoint, config)
        check_files(checkpoint, TOKENIZERS)
        states = out_layers(checkpoint)
        text = decoder_text_encoder(checkpoint, "text_encoder", states=states, longest=LONGEST_TEXT)
        width = text.outputs[0].shape[-1]
        if width != config["joint_attention_dim"]:
            raise CheckpointError(
                f"the transformer takes embeddings of {config['joint_attention_dim']}, the text encoder's states "
                f"{states} make {width}; choose others: --set flux2.{OUT_LAYERS}=A,B,C"
            )
        return (text, transformer(checkpoint, config), *autoencoder(checkpoint, "AutoencoderKLFlux2", ignore=r"^bn\."))

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """Sides in steps of a token around diffusers' default; image tokens with those of the reference pictures."""
        ranges = default_sides(profile.shapes, vae_scale_factor(checkpoint))
        tokens = ranges["image_tokens"]
        unused = MOST_REFERENCES - references(checkpoint)
        return {**ranges, "image_tokens": replace(tokens, max=tokens.max - unused * TOKENS_OF_REFERENCE)}

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Latent geometry and statistics, prompt template, what guidance there is."""
        guidance = guidance_kind(checkpoint)
        return {
            **(DISTILLED if guidance == "none" else {}),
            **sampling_defaults(checkpoint),
            "guidance": guidance,
            "latent_channels": checkpoint.config("vae")["latent_channels"],
            "vae_scale_factor": vae_scale_factor(checkpoint),
            "reference_images": references(checkpoint),
            **latent_statistics(checkpoint),
            **prompt_settings(checkpoint),
        }

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Pipeline index, scheduler, tokenizer."""
        copy_pipeline_files(checkpoint, folder, TOKENIZERS)


def guidance_kind(checkpoint: Checkpoint) -> str:
    """``embedded``: an input of the transformer (dev); ``true``: a second branch (klein base); ``none`` (distilled)."""
    if checkpoint.pipeline_class == DEV:
        return "embedded"
    return "none" if checkpoint.index.get("is_distilled", False) else "true"


def out_layers(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The hidden states that become the embedding: the build option's, or those of the released checkpoints.

    Raises:
        UsageError: they are not ascending numbers of hidden states that the text encoder has.
    """
    variant = VARIANTS[checkpoint.pipeline_class]
    text = checkpoint.options.get(OUT_LAYERS, ",".join(map(str, variant.states)))
    depth = text_config(checkpoint, "text_encoder")["num_hidden_layers"]
    words = [word.strip() for word in text.split(",")]
    states = tuple(int(word) for word in words if word.isdecimal())
    if len(states) != len(words) or list(states) != sorted(set(states)) or states[-1] > depth:
        raise UsageError(
            f"{OUT_LAYERS} {text!r} is not allowed: ascending numbers from 0 to {depth}, the text encoder's layers; "
            f"for example --set flux2.{OUT_LAYERS}={depth // 4},{depth // 2},{3 * depth // 4}"
        )
    return states


def references(checkpoint: Checkpoint) -> int:
    """The most reference pictures a request may have.

    Raises:
        UsageError: the build option is not a number from 0 to `MOST_REFERENCES`.
    """
    text = checkpoint.options.get(REFERENCES, str(MOST_REFERENCES))
    if not text.isdecimal() or int(text) > MOST_REFERENCES:
        raise UsageError(f"--set flux2.{REFERENCES}={text} is not allowed: 0 to {MOST_REFERENCES}")
    return int(text)


def latent_statistics(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Mean and standard deviation of each packed channel, from the VAE's batch norm; float32 values.

    Raises:
        CheckpointError: the VAE has none, or of another number of channels.
    """
    vae, weights = checkpoint.config("vae"), checkpoint.weights("vae")
    channels = PATCH * PATCH * vae["latent_channels"]
    for name in ("bn.running_mean", "bn.running_var"):
        if name not in weights or weights[name].shape != (channels,):
            raise CheckpointError(f"{weights.files[0]} has no {name} of {channels} channels; it is not FLUX.2's VAE")
    mean, variance = (weights[f"bn.running_{n}"].read().astype(np.float32) for n in ("mean", "var"))
    deviation = np.sqrt(variance + np.float32(vae.get("batch_norm_eps", 1e-4)))
    return {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}


def prompt_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The text around a prompt, whether the tokenizer adds its own tokens to that, and what a prompt must not have."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    def block(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    dev, variant = checkpoint.pipeline_class == DEV, VARIANTS[checkpoint.pipeline_class]
    messages: list[dict[str, Any]] = [{"role": "user", "content": block(MARKER) if dev else MARKER}]
    if dev:
        messages.insert(0, {"role": "system", "content": block(SYSTEM_MESSAGE)})
    folder = checkpoint.folder / "tokenizer"
    template = prompt_template(folder, messages, **variant.template)
    begin = load_tokenizer(folder).bos_token
    return {
        "prompt_template": template,
        # transformers' processors add none to a template that begins with the begin token; tokenizers always do.
        "add_special_tokens": not (dev and begin is not None and template.startswith(begin)),
        "forbidden_in_prompts": list(variant.forbidden),
    }


def check_parts(checkpoint: Checkpoint, transformer: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be dropped in silence, or fail at the first picture.

    Raises:
        CheckpointError: a part of another class; a transformer that does not fit the VAE's latents.
        Unsupported: patches that are not 2 x 2; klein with a guidance embedding, dev without.
    """
    wanted = {
        "text_encoder": (VARIANTS[checkpoint.pipeline_class].text_encoder,),
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
    }
    check_classes(checkpoint, wanted)
    vae = checkpoint.config("vae")
    channels, packed = transformer["in_channels"], PATCH * PATCH * vae["latent_channels"]
    if channels != packed or (transformer.get("out_channels") or channels) != packed:
        raise CheckpointError(f"transformer/config.json has {channels} channels, the VAE's latents make {packed}")
    if transformer.get("patch_size", 1) != 1 or tuple(vae.get("patch_size", (2, 2))) != (PATCH, PATCH):
        raise Unsupported("the family 'flux2' needs patch_size = 1 in the transformer and [2, 2] in the VAE")
    embeds = bool(transformer.get("guidance_embeds", True))
    if embeds != (checkpoint.pipeline_class == DEV):
        raise Unsupported(f"a {checkpoint.pipeline_class} with guidance_embeds = {embeds} (transformer/config.json)")


EXPORTER = Flux2()
