"""Tiny Stable Diffusion XL checkpoints (base, Turbo, refiner) and the ways they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from tiny_tokenizers import clip_tokenizer

LENGTH = 77
TIME_WIDTH = 8  # channels of each of the sizes and scores the UNet is told
PROJECTION = 32
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_config(tokenizer: Any, width: int, layers: int, act: str) -> Any:
    """A text encoder's configuration; ``eos_token_id`` 2 as in every SDXL repository: the largest id is the end."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        projection_dim=PROJECTION,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def lively(model: Any, gains: dict[str, float]) -> Any:
    """`model` with the parameters whose names contain a key of `gains` multiplied: default weights barely listen."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, gain in gains.items():
                if part in name:
                    parameter.mul_(gain)
    return model.eval()


def text_encoders(folder: Path) -> dict[str, Any]:
    """Both tokenizers (the second pads with ``!``) and text encoders, of different widths and depths."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    one = clip_tokenizer(folder / "tokenizer", LENGTH)
    two = clip_tokenizer(folder / "tokenizer_2", LENGTH, pad_token="!")
    gains = {"embedding.weight": 40.0}
    return {
        "tokenizer": one,
        "tokenizer_2": two,
        "text_encoder": lively(CLIPTextModel(clip_config(one, 32, 2, "quick_gelu")), gains),
        "text_encoder_2": lively(CLIPTextModelWithProjection(clip_config(two, 64, 3, "gelu")), gains),
    }


def unet(width: int, ids: int) -> Any:
    """A UNet told `ids` numbers, with attention in its second level alone."""
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=ids * TIME_WIDTH + PROJECTION,
    )
    return lively(model, {"attn2.to_": 2.0, "add_embedding": 2.0, "conv_out": 2.0})


def autoencoder() -> Any:
    """The 8x VAE, to be kept in float32 as SDXL's own."""
    import diffusers

    vae = diffusers.AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    return vae.eval()


def base(folder: Path, *, scheduler: str = "EulerDiscreteScheduler", **more: Any) -> Path:
    """A StableDiffusionXLPipeline; `more` goes to the scheduler."""
    import diffusers
    import torch

    torch.manual_seed(5)
    diffusers.StableDiffusionXLPipeline(
        **text_encoders(folder),
        unet=unet(96, 6),
        vae=autoencoder(),
        scheduler=getattr(diffusers, scheduler)(**{**NOISE, "steps_offset": 1, "timestep_spacing": "leading", **more}),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder


def turbo(folder: Path) -> Path:
    """As SDXL-Turbo's repository is: ancestral, trailing."""
    return base(folder, scheduler="EulerAncestralDiscreteScheduler", timestep_spacing="trailing")


def refiner(folder: Path) -> Path:
    """A StableDiffusionXLImg2ImgPipeline with the second text encoder alone, told a score instead of a target size."""
    import diffusers
    import torch

    torch.manual_seed(6)
    parts = {**text_encoders(folder), "text_encoder": None, "tokenizer": None}
    diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts,
        unet=unet(64, 5),
        vae=autoencoder(),
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    ).save_pretrained(folder)
    return folder


def picture(width: int = 70, height: int = 101) -> Any:
    """A smooth RGB picture whose sides are not multiples of anything: 64x96 once rounded down."""
    from PIL import Image

    y, x = np.mgrid[:height, :width] / 16
    waves = [np.sin(x + y), np.cos(x * 1.3 - y), np.sin(2 * y) * np.cos(x)]
    return Image.fromarray(np.uint8(np.stack(waves, axis=-1) * 110 + 127))


GUIDED = {"guidance_scale": 5.0, "negative_prompt": "a blue car"}
REFINED = {**GUIDED, "strength": 0.75}
CASES = {
    "sdxl": Case(family="sdxl", checkpoint=base, pipeline="StableDiffusionXLPipeline", request=GUIDED, theirs=GUIDED),
    "sdxl turbo": Case(
        family="sdxl",
        checkpoint=turbo,
        pipeline="StableDiffusionXLPipeline",
        request={"guidance_scale": 0.0, "num_inference_steps": 2},
        theirs={"guidance_scale": 0.0},
    ),
    "sdxl refiner": Case(
        family="sdxl",
        checkpoint=refiner,
        pipeline="StableDiffusionXLImg2ImgPipeline",
        request={**REFINED, "images": (picture(),)},
        theirs={**REFINED, "image": picture()},
    ),
}
