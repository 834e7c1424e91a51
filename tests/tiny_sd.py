"""A tiny Stable Diffusion 1.x checkpoint and the ways it is asked."""

from __future__ import annotations

from pathlib import Path

from cases import Case
from tiny_tokenizers import clip_tokenizer


def stable_diffusion(
    folder: Path, *, prediction_type: str = "epsilon", scheduler: str = "DDIMScheduler", length: int = 16
) -> Path:
    """A StableDiffusionPipeline of a few hundred thousand random parameters: 8x VAE, two-level UNet, few tokens."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(7)
    tokenizer = clip_tokenizer(folder / "tokenizer", length)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )
    schedule = getattr(diffusers, scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
    )
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def real_length(folder: Path) -> Path:
    """The same with 77 tokens."""
    return stable_diffusion(folder, length=77)


def v_prediction(folder: Path) -> Path:
    """A checkpoint that predicts v."""
    return stable_diffusion(folder, prediction_type="v_prediction", length=77)


GUIDED = {"guidance_scale": 7.5, "negative_prompt": "a blue car"}
CASES = {
    "sd": Case(family="sd", checkpoint=real_length, pipeline="StableDiffusionPipeline", request=GUIDED, theirs=GUIDED),
    "sd v-prediction": Case(
        family="sd", checkpoint=v_prediction, pipeline="StableDiffusionPipeline", request=GUIDED, theirs=GUIDED
    ),
}
