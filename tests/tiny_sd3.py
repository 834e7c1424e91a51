"""Tiny Stable Diffusion 3 checkpoints, shaped as SD 3.5 Medium, Large, Large-Turbo and SD 3 without T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases import Case
from tiny_tokenizers import clip_tokenizer, t5_tokenizer

CLIP_TOKENS = 24
WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
T5_WIDTH = 96  # wider than both CLIPs together: the padding must be there
POSITIONS = 13  # odd, so that crops are off centre both ways; 208 pixels
NEGATIVE = "a blue car at night"


def stable_diffusion_3(
    folder: Path,
    *,
    layers: int = 3,
    dual: tuple[int, ...] = (0, 1),
    qk_norm: str | None = "rms_norm",
    t5: bool = True,
    seed: int = 7,
    **scheduler: Any,
) -> Path:
    """A StableDiffusion3Pipeline of some hundred thousand random parameters, whose text and position matter."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    tokenizers = {
        "text_encoder": clip_tokenizer(folder / "tokenizer", CLIP_TOKENS),
        "text_encoder_2": clip_tokenizer(folder / "tokenizer_2", CLIP_TOKENS, pad_token="!"),
    }
    encoders = {name: clip(tokenizer, WIDTHS[name]) for name, tokenizer in tokenizers.items()}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(WIDTHS.values()),
        out_channels=16,
        pos_embed_max_size=POSITIONS,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    vae = diffusers.AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for module in (transformer, vae):
        enliven(module)
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae,
        **encoders,
        tokenizer=tokenizers["text_encoder"],
        tokenizer_2=tokenizers["text_encoder_2"],
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer_3=t5_tokenizer(folder / "tokenizer_3", 512) if t5 else None,
    ).save_pretrained(folder)
    return folder


def clip(tokenizer: Any, width: int) -> Any:
    """A CLIPTextModelWithProjection of two layers; the wide one has CLIP-G's activation."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 8,
        max_position_embeddings=CLIP_TOKENS,
        hidden_act="gelu" if width == WIDTHS["text_encoder_2"] else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return enliven(CLIPTextModelWithProjection(config))


def t5_encoder() -> Any:
    """A T5EncoderModel of two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=256,
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return enliven(T5EncoderModel(config))


def enliven(module: Any, gain: float = 1.0) -> Any:
    """Weights that keep activations of order 1: normal, of standard deviation `gain` over the root of the inputs."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                continue
            fan_in = 1 if "embedding" in name or "shared" in name else parameter[0].numel()
            parameter.normal_(0, gain * fan_in**-0.5)
    return module.eval()


def medium(folder: Path) -> Path:
    """As SD 3.5 Medium: a second attention in the first blocks, QK norm, T5."""
    return stable_diffusion_3(folder)


def large(folder: Path) -> Path:
    """As SD 3.5 Large and Large-Turbo: QK norm, no second attention; and with the shift that grows with the picture."""
    return stable_diffusion_3(
        folder, layers=2, dual=(), seed=8, use_dynamic_shifting=True, base_shift=0.4, max_shift=1.2
    )


def without_t5(folder: Path) -> Path:
    """As SD 3 Medium, which has neither QK norm nor a second attention, saved without T5."""
    return stable_diffusion_3(folder, layers=2, dual=(), qk_norm=None, t5=False, seed=9)


ASKED = {"guidance_scale": 4.5, "negative_prompt": NEGATIVE}

CASES = {
    "sd3": Case(
        family="sd3",
        checkpoint=medium,
        pipeline="StableDiffusion3Pipeline",
        request=ASKED,
        theirs=ASKED,
    ),
    "sd3-large": Case(
        family="sd3",
        checkpoint=large,
        pipeline="StableDiffusion3Pipeline",
        request={**ASKED, "max_sequence_length": 40},
        theirs={**ASKED, "max_sequence_length": 40},
    ),
    "sd3-turbo": Case(
        family="sd3",
        checkpoint=large,
        pipeline="StableDiffusion3Pipeline",
        request={"guidance_scale": 0.0, "num_inference_steps": 4, "max_sequence_length": 40},
        theirs={"guidance_scale": 0.0, "max_sequence_length": 40},
    ),
    "sd3-without-t5": Case(
        family="sd3",
        checkpoint=without_t5,
        pipeline="StableDiffusion3Pipeline",
        request={**ASKED, "max_sequence_length": 24},
        theirs={**ASKED, "max_sequence_length": 24},
    ),
}
