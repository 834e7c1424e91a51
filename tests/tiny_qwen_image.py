"""A tiny Qwen-Image checkpoint and the ways it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from tiny_tokenizers import qwen_tokenizer

LIGHTNING = {  # generate_with_diffusers.py of ModelTC/Qwen-Image-Lightning
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
SCHEDULER = {  # of Qwen/Qwen-Image
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
PIXELS_PER_TOKEN = 16


def text_encoder(vocabulary: int) -> Any:
    """Qwen2.5-VL with a vision tower nobody asks, two layers, two key heads for four queries."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48}
    text = {
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
        "initializer_range": 0.3,  # the default is so tame that every prompt has nearly the same states
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def transformer() -> Any:
    """Two joint blocks of four heads, looking sharply: with default weights the long template drowns the prompt."""
    import diffusers
    import torch

    model = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=48,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn.norm_added_k.weight.mul_(3)
            block.attn.norm_q.weight.mul_(1.5)
            block.attn.add_v_proj.weight.mul_(3)
            block.attn.to_out[0].weight.mul_(2)
        model.proj_out.weight.mul_(1.5)
    return model


def qwen_image(folder: Path, *, scheduler: Mapping[str, Any] = SCHEDULER) -> Path:
    """A QwenImagePipeline of about a million random parameters, the VAE with all its levels."""
    import diffusers
    import torch

    tokenizer = qwen_tokenizer(folder / "tokenizer")
    torch.manual_seed(11)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1)
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=vae,
        text_encoder=text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer(),
    ).save_pretrained(folder)
    return folder


def unpacked(packed: np.ndarray, height: int, width: int) -> np.ndarray:
    """diffusers' tokens [B, L, 64] as latents [B, 16, h, w]."""
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    patches = packed.reshape(len(packed), rows, columns, 16, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(packed), 16, 2 * rows, 2 * columns)


def lightning(folder: Path) -> Path:
    """The same with the scheduler that the distillation's authors give diffusers; ours comes from the preset."""
    return qwen_image(folder, scheduler=LIGHTNING)


def case(
    request: dict[str, Any],
    theirs: dict[str, Any],
    checkpoint: Callable[[Path], Path] = qwen_image,
    **options: str,
) -> Case:
    """One way to ask."""
    return Case(
        family="qwen_image",
        checkpoint=checkpoint,
        pipeline="QwenImagePipeline",
        request=request,
        theirs=theirs,
        latents=unpacked,
        drops_padding=True,
        options=options,
    )


NEGATIVE = "模糊, a blue car"
CASES = {
    "qwen_image": case(
        {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}, {"true_cfg_scale": 4.0, "negative_prompt": NEGATIVE}
    ),
    "qwen_image without guidance": case({"guidance_scale": 1.0}, {"true_cfg_scale": 1.0}),
    "qwen_image lightning": case({}, {"true_cfg_scale": 1.0}, lightning, preset="lightning-4"),
}
