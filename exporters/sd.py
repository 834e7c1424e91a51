"""Stable Diffusion 1.x and 2.x: traceable components and their tensor facts.

Names follow optimum's ONNX exports (``optimum/exporters/onnx/model_configs.py``), so other tools can load the parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.checkpoint import WEIGHT_FILES, write_config
from intaglio.exporters.component import Component
from intaglio.profiles.errors import CheckpointError, Unsupported
from intaglio.profiles.spec import Range, TensorSpec

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.profiles.family import Family

OLD_VAE_ATTENTION = (
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
)
OLD_TEXT_MODEL = ((r"^text_model\.", ""),)  # transformers 5 flattened CLIPTextModel
# diffusers resizes to explicit sizes only when a latent side is not divisible by 2**num_upsamplers, decided in
# Python; a huge value makes the general way the only one, so that one graph serves every size.
ALWAYS_RESIZE = 30
TEXT_ENCODERS = ("CLIPTextModel",)


def wrap_text_encoder(model: Any) -> torch.nn.Module:
    """``input_ids`` int64 [B, T] to last hidden states [B, T, D] and pooled state [B, D], float32."""
    import torch

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output = self.model(input_ids)
            return output.last_hidden_state, output.pooler_output

    return TextEncoder()


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


def wrap_vae_encoder(vae: Any) -> torch.nn.Module:
    """Pixels in [-1, 1] [B, 3, H, W] to posterior mean and log variance [B, 2C, h, w]: nothing random in a graph."""
    import torch

    class VaeEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            moments: torch.Tensor = self.encoder(sample)
            return moments if self.quant_conv is None else self.quant_conv(moments)

    return VaeEncoder()


def wrap_vae_decoder(vae: Any) -> torch.nn.Module:
    """Unscaled latents [B, C, h, w] to pixels in about [-1, 1] [B, 3, H, W]."""
    import torch

    class VaeDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = self.decoder(
                latents if self.post_quant_conv is None else self.post_quant_conv(latents)
            )
            return decoded

    return VaeDecoder()


def text_encoder_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def unet_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained UNet whose resizing works at every size."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(config)
    unet.num_upsamplers = ALWAYS_RESIZE
    return unet


def vae_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained AutoencoderKL."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def pretrained(library: str, name: str) -> Callable[[Path], Any]:
    """A loader of the library's own class in float32: the reference, independent of our reading of the weights."""

    def read(folder: Path) -> Any:
        import importlib

        import torch

        kind = getattr(importlib.import_module(library), name)
        variant = (
            None if any((folder / f).exists() for f in WEIGHT_FILES) or any(folder.glob("*.index.json")) else "fp16"
        )
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "variant": variant}
        return kind.from_pretrained(folder, torch_dtype=torch.float32, **options)

    return read


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    """A tensor fact in one line."""
    return TensorSpec(name=name, dtype=dtype, shape=shape)


class StableDiffusion:
    """The exporter of the family."""

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """Text encoder, UNet, VAE encoder and decoder."""
        text, unet, vae = (checkpoint.config(part) for part in ("text_encoder", "unet", "vae"))
        check_classes(checkpoint, unet)
        check_files(checkpoint)
        factor = vae_scale_factor(vae)
        latent = (f"height/{factor}", f"width/{factor}")
        image = spec("sample", "batch", vae["in_channels"], "height", "width")
        states = spec("encoder_hidden_states", "batch", "tokens", unet["cross_attention_dim"])
        width = text["hidden_size"]
        return (
            Component(
                name="text_encoder",
                source="text_encoder",
                model=text_encoder_from_config,
                reference=pretrained("transformers", "CLIPTextModel"),
                wrap=wrap_text_encoder,
                inputs=(spec("input_ids", "batch", "tokens", dtype="int64"),),
                outputs=(spec("last_hidden_state", "batch", "tokens", width), spec("pooler_output", "batch", width)),
                rename=OLD_TEXT_MODEL,
                ignore=r"embeddings\.position_ids$|^text_projection\.",
            ),
            Component(
                name="unet",
                source="unet",
                model=unet_from_config,
                reference=pretrained("diffusers", "UNet2DConditionModel"),
                wrap=wrap_unet,
                inputs=(spec("sample", "batch", unet["in_channels"], *latent), spec("timestep", "batch"), states),
                outputs=(spec("out_sample", "batch", unet["out_channels"], *latent),),
            ),
            Component(
                name="vae_encoder",
                source="vae",
                model=vae_from_config,
                reference=pretrained("diffusers", "AutoencoderKL"),
                wrap=wrap_vae_encoder,
                inputs=(image,),
                outputs=(spec("latent_parameters", "batch", 2 * vae["latent_channels"], *latent),),
                prefix="",
                rename=OLD_VAE_ATTENTION,
                ignore=r"^(decoder|post_quant_conv)\.",
            ),
            Component(
                name="vae_decoder",
                source="vae",
                model=vae_from_config,
                reference=pretrained("diffusers", "AutoencoderKL"),
                wrap=wrap_vae_decoder,
                inputs=(spec("latent_sample", "batch", vae["latent_channels"], *latent),),
                outputs=(image,),
                prefix="",
                rename=OLD_VAE_ATTENTION,
                ignore=r"^(encoder|quant_conv)\.",
            ),
        )

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """Sizes in steps of the VAE's factor around the checkpoint's own; tokens up to its position embeddings."""
        factor = vae_scale_factor(checkpoint.config("vae"))
        length = checkpoint.config("text_encoder")["max_position_embeddings"]
        unet = checkpoint.config("unet")
        # torch.export tells a 1x1 feature map from a larger one: the UNet's lowest level keeps at least 2.
        smallest = factor * (2 ** (len(unet["block_out_channels"]) - 1) + 1)
        sample = unet["sample_size"]
        sides = dict(zip(("height", "width"), sample if isinstance(sample, list) else (sample, sample), strict=True))
        ranges = dict(profile.shapes)
        for axis, side in sides.items():
            bounds = ranges[axis]
            opt = side * factor
            low, high = max(smallest, min(bounds.min, opt)), max(bounds.max, opt)
            ranges[axis] = Range(min=low, opt=opt, max=high, multiple=max(factor, bounds.multiple))
        tokens = ranges["tokens"]
        ranges["tokens"] = Range(min=min(tokens.min, length), opt=length, max=length)
        return ranges

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Latent geometry and scaling, tokenizer length."""
        unet, vae = checkpoint.config("unet"), checkpoint.config("vae")
        return {
            **sampling_defaults(checkpoint),
            "latent_channels": vae["latent_channels"],
            "vae_scale_factor": vae_scale_factor(vae),
            "scaling_factor": vae.get("scaling_factor", 0.18215),
            "unet_in_channels": unet["in_channels"],
        }

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Pipeline index, scheduler, and tokenizer (with a ``tokenizer.json`` made where there is none)."""
        from transformers import CLIPTokenizer

        write_config(checkpoint.index, folder / "model_index.json")
        (folder / "scheduler").mkdir(parents=True)
        shutil.copyfile(
            checkpoint.folder / "scheduler/scheduler_config.json", folder / "scheduler/scheduler_config.json"
        )
        source, target = checkpoint.folder / "tokenizer", folder / "tokenizer"
        target.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
        if not (source / "tokenizer.json").exists():
            CLIPTokenizer.from_pretrained(source).save_pretrained(target)


def sampling_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's own ``sampling_defaults.json``, where it has one: steps and guidance it was made for.

    Raises:
        CheckpointError: it has another key.
    """
    if not (checkpoint.folder / "sampling_defaults.json").exists():
        return {}
    defaults = checkpoint.config(".", "sampling_defaults.json")
    unknown = sorted(defaults.keys() - {"num_inference_steps", "guidance_scale"})
    if unknown:
        raise CheckpointError(f"{checkpoint.folder / 'sampling_defaults.json'} has the unknown key {unknown[0]!r}")
    return defaults


def check_classes(checkpoint: Checkpoint, unet: Mapping[str, Any]) -> None:
    """Refuse what would otherwise be dropped in silence.

    Raises:
        CheckpointError: a text encoder of another class.
        Unsupported: a UNet that needs inputs this family does not feed.
    """
    text_class = checkpoint.index.get("text_encoder", [None, None])[1]
    if text_class not in TEXT_ENCODERS:
        raise CheckpointError(f"text_encoder is a {text_class}, allowed: {', '.join(TEXT_ENCODERS)}")
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.get(key) is not None:
            raise Unsupported(f"unet/config.json has {key} = {unet[key]!r}, which the family 'sd' does not feed")


def check_files(checkpoint: Checkpoint) -> None:
    """What `copy_files` will need is there.

    Raises:
        CheckpointError: naming the file of the tokenizer or the scheduler that is missing or not JSON.
    """
    checkpoint.config("scheduler", "scheduler_config.json")
    checkpoint.config("tokenizer", "tokenizer_config.json")
    names = ("tokenizer.json", "vocab.json")
    if not any((checkpoint.folder / "tokenizer" / name).exists() for name in names):
        raise CheckpointError(f"{checkpoint.folder / 'tokenizer' / names[1]} is missing; the checkpoint is incomplete")


def vae_scale_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along one side."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


EXPORTER = StableDiffusion()
