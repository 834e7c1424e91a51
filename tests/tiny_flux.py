"""Tiny FLUX.1 checkpoints (schnell and dev) and the ways they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from tiny_tokenizers import clip_tokenizer, t5_tokenizer

LATENT_CHANNELS = 4
TEXT_WIDTH = 32
# schnell's own shift is 1, which a sampler that forgets to shift gets right as well.
SCHNELL_SHIFT = 2.0
GAIN = 2.0  # of the transformer's matrices: another prompt changes the latents by 0.2 to 0.6, guidance + 5 % by 0.3


def flux(folder: Path, *, guidance_embeds: bool = True) -> Path:
    """A FluxPipeline of about 300 thousand random parameters: dev's parts, or schnell's without guidance embedding."""
    import diffusers
    import torch

    torch.manual_seed(7)
    tokenizer = clip_tokenizer(folder / "tokenizer", 77)
    tokenizer_2 = t5_tokenizer(folder / "tokenizer_2", 512)
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0}  # dev ignores its shift
    fixed = {"use_dynamic_shifting": False, "shift": SCHNELL_SHIFT}
    diffusers.FluxPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(),
        tokenizer_2=tokenizer_2,
        transformer=transformer(guidance_embeds),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            max_image_seq_len=4096,
            base_shift=0.5,
            max_shift=1.15,
            **(dynamic if guidance_embeds else fixed),
        ),
    ).save_pretrained(folder)
    return folder


def clip(tokenizer: Any) -> Any:
    """A CLIP text model of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5() -> Any:
    """A T5 encoder of two layers with gated feed-forwards and more embeddings than tokens, as T5 v1.1 XXL has."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=640,  # also above the other tokenizer's ids
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def transformer(guidance_embeds: bool) -> Any:
    """One double and two single blocks of two heads; matrices scaled up, so that text, time and guidance matter."""
    import diffusers
    import torch

    model = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and name.endswith("weight"):
                parameter.mul_(GAIN)
    return model


def vae() -> Any:
    """An AutoencoderKL of factor 8 without the convolutions around the latents, as FLUX.1's."""
    import diffusers

    return diffusers.AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def schnell(folder: Path) -> Path:
    """A checkpoint without guidance embedding and with a fixed shift."""
    return flux(folder, guidance_embeds=False)


def unpacked(packed: np.ndarray, height: int, width: int) -> np.ndarray:
    """Tokens [B, h/2 * w/2, 4C] to latents [B, C, h, w], with diffusers' own function."""
    import torch
    from diffusers import FluxPipeline

    return np.asarray(FluxPipeline._unpack_latents(torch.from_numpy(packed), height, width, 8))


TEXT = {"max_sequence_length": 64}
DEV = {"guidance_scale": 3.5, **TEXT}
TRUE = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0, **DEV}
SCHNELL = {"num_inference_steps": 4, "guidance_scale": 0.0, **TEXT}
PIPELINE: dict[str, Any] = {"family": "flux", "pipeline": "FluxPipeline", "latents": unpacked}
CASES = {
    "flux dev": Case(checkpoint=flux, request=DEV, theirs=DEV, **PIPELINE),
    "flux dev true guidance": Case(checkpoint=flux, request=TRUE, theirs=TRUE, **PIPELINE),
    "flux schnell": Case(checkpoint=schnell, request=SCHNELL, theirs={"guidance_scale": 0.0, **TEXT}, **PIPELINE),
}
