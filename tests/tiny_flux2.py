"""Tiny FLUX.2 checkpoints (klein distilled, klein base, dev) and the ways they are asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from tiny_tokenizers import mistral_tokenizer, qwen_tokenizer

LATENT_CHANNELS = 4
PACKED = 4 * LATENT_CHANNELS
BN_EPS = 1e-4
BN_MEAN = np.linspace(-0.4, 0.6, PACKED, dtype=np.float32)
BN_VAR = np.linspace(0.5, 2.5, PACKED, dtype=np.float32)[::-1].copy()
TEXT_WIDTH = 32
NORMS_OF_QUERIES_AND_KEYS = re.compile(r"norm_(added_)?[qk]\.|[qk]_norm\.")
KLEIN_LAYERS, DEV_LAYERS = (1, 2, 3), (1, 2, 3)
KLEIN_DEPTH, DEV_DEPTH = 5, 3  # klein's encoder is cut; dev's last state is behind the final norm


def enliven(model: Any, gain: float = 1.0) -> Any:
    """Random weights at which every layer matters: fan-in scaling by `gain`, norms around one, small biases.

    Norms of queries and keys are larger, so that attention chooses and the text is not averaged away.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=gain / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
                if NORMS_OF_QUERIES_AND_KEYS.search(name):
                    parameter.mul_(1.6)
    return model


def transformer(*, joint: int, guidance_embeds: bool) -> Any:
    """Two double and two single blocks of width 64, rotary axes of 8 channels."""
    import diffusers

    return enliven(
        diffusers.Flux2Transformer2DModel(
            in_channels=PACKED,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=joint,
            timestep_guidance_channels=64,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=guidance_embeds,
        )
    )


def autoencoder() -> Any:
    """Factor 8, four channels, running statistics that are not the identity."""
    import diffusers
    import torch

    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        batch_norm_eps=BN_EPS,
    )
    enliven(vae)
    vae.bn.running_mean.copy_(torch.from_numpy(BN_MEAN))
    vae.bn.running_var.copy_(torch.from_numpy(BN_VAR))
    return vae


def scheduler() -> Any:
    """As in the released checkpoints."""
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def language_model(vocabulary: int, depth: int) -> dict[str, Any]:
    """Configuration of both text encoders: grouped queries, heads that are not the width's share."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    }


def klein(folder: Path, *, is_distilled: bool = False) -> Path:
    """A Flux2KleinPipeline; the base one takes guidance."""
    import diffusers
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(21)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    config = Qwen3Config(**language_model(len(tokenizer), KLEIN_DEPTH), tie_word_embeddings=True)
    diffusers.Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=autoencoder(),
        text_encoder=enliven(Qwen3ForCausalLM(config)),
        tokenizer=tokenizer,
        transformer=transformer(joint=TEXT_WIDTH * len(KLEIN_LAYERS), guidance_embeds=False),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


def klein_distilled(folder: Path) -> Path:
    """The one of few steps, without guidance."""
    return klein(folder, is_distilled=True)


def dev(folder: Path) -> Path:
    """A Flux2Pipeline: Mistral 3 with its vision tower, padding on the left, embedded guidance.

    Released ones have a PixtralProcessor around the tokenizer, which needs torchvision; for text it changes nothing
    (``tests/test_tokenizers.py``).
    """
    import diffusers
    import torch
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(22)
    tokenizer = mistral_tokenizer(folder / "tokenizer")
    text = {"model_type": "mistral", **language_model(len(tokenizer), DEV_DEPTH), "sliding_window": None}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    diffusers.Flux2Pipeline(
        scheduler=scheduler(),
        vae=autoencoder(),
        text_encoder=enliven(encoder),
        tokenizer=tokenizer,
        transformer=transformer(joint=TEXT_WIDTH * len(DEV_LAYERS), guidance_embeds=True),
    ).save_pretrained(folder)
    return folder


def klein_latents(decoded: np.ndarray, height: int, width: int) -> np.ndarray:
    """diffusers' klein latents are ready for the decoder: patchified and normalised again."""
    batch, channels, rows, columns = decoded.shape
    patches = decoded.reshape(batch, channels, rows // 2, 2, columns // 2, 2).transpose(0, 1, 3, 5, 2, 4)
    packed = patches.reshape(batch, 4 * channels, rows // 2, columns // 2)
    deviation = np.sqrt(BN_VAR + np.float32(BN_EPS))
    return (packed - BN_MEAN.reshape(1, -1, 1, 1)) / deviation.reshape(1, -1, 1, 1)


def dev_latents(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """diffusers' dev latents are tokens."""
    return tokens.transpose(0, 2, 1).reshape(len(tokens), -1, height // 16, width // 16)


def picture(width: int, height: int, seed: int) -> Any:
    """A reference picture: smooth colours and noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 9 + seed), np.cos(columns / 7), np.sin((rows + columns) / 13)], axis=-1)
    pixels = 127 + 90 * waves + 30 * rng.standard_normal((height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


KLEIN = {"family": "flux2", "pipeline": "Flux2KleinPipeline", "latents": klein_latents}
KLEIN_OPTIONS = {"text_encoder_out_layers": ",".join(map(str, KLEIN_LAYERS))}
DEV_OPTIONS = {"text_encoder_out_layers": ",".join(map(str, DEV_LAYERS))}
ONE, TWO = [picture(70, 90, 1)], [picture(100, 66, 2), picture(64, 64, 3)]

CASES = {
    "flux2-klein": Case(
        **KLEIN,
        checkpoint=klein_distilled,
        request={},
        theirs={"guidance_scale": 1.0, "text_encoder_out_layers": KLEIN_LAYERS},
        options=KLEIN_OPTIONS,
    ),
    "flux2-klein-base": Case(
        **KLEIN,
        checkpoint=klein,
        request={"guidance_scale": 4.0},
        theirs={"guidance_scale": 4.0, "text_encoder_out_layers": KLEIN_LAYERS},
        options=KLEIN_OPTIONS,
    ),
    "flux2-klein-one-image": Case(
        **KLEIN,
        checkpoint=klein_distilled,
        request={"images": ONE},
        theirs={"image": ONE, "guidance_scale": 1.0, "text_encoder_out_layers": KLEIN_LAYERS},
        options=KLEIN_OPTIONS,
    ),
    "flux2-klein-base-two-images": Case(
        **KLEIN,
        checkpoint=klein,
        request={"images": TWO, "guidance_scale": 3.0},
        theirs={"image": TWO, "guidance_scale": 3.0, "text_encoder_out_layers": KLEIN_LAYERS},
        options=KLEIN_OPTIONS,
    ),
    "flux2-dev": Case(
        family="flux2",
        pipeline="Flux2Pipeline",
        latents=dev_latents,
        checkpoint=dev,
        request={"guidance_scale": 4.0},
        theirs={"guidance_scale": 4.0, "text_encoder_out_layers": DEV_LAYERS},
        options=DEV_OPTIONS,
    ),
}
