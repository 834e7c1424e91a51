"""What a single file of weights is, told from its tensor names: layouts we read, and what we refuse by name.

Names and shapes are as diffusers' ``infer_diffusers_model_type`` and ComfyUI's ``model_detection`` know them; nothing
here reads a value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from intaglio.profiles.errors import CheckpointError, Unsupported

Header = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name to dtype (as safetensors names it) and shape

UNET_PREFIXES = ("model.diffusion_model.",)
VAE_PREFIXES = ("first_stage_model.", "vae.")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, slots=True)
class Part:
    """A component's tensors in the file: names with one of `prefixes`, read by the converter `kind`."""

    name: str
    kind: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of writing a whole pipeline into one file.

    `configurations` are folders of ``profiles/single_file`` by prediction type. Where there are several, names and
    shapes do not tell which one fits.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    configurations: Mapping[str, str]


def _layout(name: str, title: str, texts: Mapping[str, tuple[str, str]], configurations: Mapping[str, str]) -> Layout:
    denoiser = (Part("unet", "unet", UNET_PREFIXES), Part("vae", "vae", VAE_PREFIXES))
    encoders = tuple(Part(part, kind, (prefix,)) for part, (kind, prefix) in texts.items())
    return Layout(name, title, (*denoiser, *encoders), configurations)


LAYOUTS = (  # the first whose text encoders are all there
    _layout(
        "sdxl",
        "Stable Diffusion XL",
        {
            "text_encoder": ("clip", "conditioner.embedders.0.transformer."),
            "text_encoder_2": ("open_clip", "conditioner.embedders.1.model."),
        },
        {"epsilon": "sdxl"},
    ),
    _layout(
        "sdxl_refiner",
        "the Stable Diffusion XL refiner",
        {"text_encoder_2": ("open_clip", "conditioner.embedders.0.model.")},
        {"epsilon": "sdxl_refiner"},
    ),
    _layout(
        "sd2",
        "Stable Diffusion 2.x",
        {"text_encoder": ("open_clip", "cond_stage_model.model.")},
        {"epsilon": "sd2_epsilon", "v_prediction": "sd2_v_prediction"},
    ),
    _layout(
        "sd1",
        "Stable Diffusion 1.x",
        {"text_encoder": ("clip", "cond_stage_model.transformer.")},
        {"epsilon": "sd1"},
    ),
)

# Tensors of a checkpoint that no component takes: regular expressions, and what they are.
LEFT_OUT = (
    (r"^model_ema\.", "EMA weights"),
    (r"^(alphas_cumprod|alphas_cumprod_prev|betas|lvlb_weights|logvar|scale_factor)$", "training's noise schedule"),
    (r"^(sqrt_(recip_|recipm1_|one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod)$", "training's noise schedule"),
    (r"^posterior_(variance|log_variance_clipped|mean_coef[12])$|^denoiser\.sigmas$", "training's noise schedule"),
    (r"^(optimizer|optimizer_states|lr_schedulers|callbacks|loops)(\.|$)|^(global_step|epoch)$", "training's state"),
    (r"^(first_stage_model|vae)\.(loss|model_ema)\.", "the VAE's training losses"),
    (r"^(cond_stage_model|conditioner\.embedders\.\d)\.(model\.|transformer\.)?(logit_scale|attn_mask)$", "CLIP's"),
    # The penultimate layer is what Stable Diffusion 2 conditions on: the last one and the projection are unused.
    (r"^cond_stage_model\.model\.(transformer\.resblocks\.23\.|text_projection$)", "OpenCLIP's last layer"),
    (r"^(v_pred|ztsnr)$", "marks of the prediction type"),
)

INPUT_CHANNELS = {9: "an inpainting", 8: "an InstructPix2Pix", 7: "an upscaler", 5: "a depth-conditioned"}

WHOLE = "give the whole checkpoint"
FOLDER = "give its diffusers folder, the one with model_index.json"
# Regular expressions over tensor names, what such a file is, and what to give instead. The first match counts.
OTHERS = (
    (r"lora_(down|up|A|B)\b|^lora_|\.lora\.|\.hada_w\d|\.lokr_w\d", "a LoRA", "give the checkpoint it was made for"),
    (r"^control_model\.|^input_hint_block\.|controlnet_cond_embedding\.|^controlnet_", "a ControlNet", WHOLE),
    (r"^control_(layers|all_x_embedder)\.", "a ControlNet", WHOLE),
    (r"^(adapter\.)?body\.\d+\.(resnets|block|in_conv)", "a T2I adapter", WHOLE),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter", WHOLE),
    (r"motion_modules\.", "an AnimateDiff motion module", WHOLE),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion", "give the checkpoint it was made for"),
    (r"single_stream_modulation\.lin\.", "FLUX.2", FOLDER),
    (r"distilled_guidance_layer\.in_proj\.", "Chroma", FOLDER),
    (r"double_blocks\.0\.img_attn\.", "FLUX.1", FOLDER),
    (r"joint_blocks\.0\.context_block\.", "Stable Diffusion 3", FOLDER),
    (r"transformer_blocks\.0\.img_mlp\.net\.|txt_in\.text_norm\.", "Qwen-Image", FOLDER),
    (r"(^|\.)cap_embedder\.0\.weight$", "Lumina 2 or Z-Image", FOLDER),
    (r"double_layers\.0\.attn\.w[12]q\.", "AuraFlow", FOLDER),
    (r"txt_in\.individual_token_refiner\.", "HunyuanVideo", FOLDER),
    (r"(^|\.)head\.modulation$", "Wan", FOLDER),
    (r"patchify_proj\.weight$", "LTX-Video", FOLDER),
    (r"double_stream_blocks\.0\.block\.", "HiDream", FOLDER),
    (r"^edm_mean$", "Playground 2.5", FOLDER),
    (r"^(down_blocks|up_blocks|mid_block)\.\d*\.?(resnets|attentions)\.", "the UNet of a diffusers folder", FOLDER),
    (r"^(single_)?transformer_blocks\.\d+\.", "the transformer of a diffusers folder", FOLDER),
    (r"^(first_stage_model\.|vae\.)?(en|de)coder\.conv_in\.weight$", "a VAE", WHOLE),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.|^encoder\.block\.\d+\.layer\.", "a text encoder", WHOLE),
    (r"^(text_model|model)\.(encoder\.)?(embeddings|embed_tokens|layers)\.", "a text encoder", WHOLE),
)

# Regular expressions over tensor names that only stored quantized weights have.
QUANTIZED = (
    (r"\.(absmax|quant_map|nested_absmax|quant_state)(\.|$)", "bitsandbytes nf4 or fp4"),
    (r"\.(SCB|weight_format)$", "bitsandbytes int8"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ, AWQ or nunchaku"),
    (r"\.(wscales|wtscale|wcscales|smooth_factor)$", "nunchaku"),
    (
        r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|weight_scale_inv|input_scale|comfy_quant)$",
        "scaled fp8",
    ),
)
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
UNQUANTIZED = "give the float16, bfloat16 or float32 weights and let the build quantize: --quant int8"


def refuse_quantized(place: Path, header: Header) -> None:
    """Weights that are quantized already cannot be captured, compared or quantized again.

    Raises:
        Unsupported: naming the format and the tensor that gives it away.
    """
    for key, (dtype, _) in header.items():
        if dtype in FLOAT8:
            raise Unsupported(f"{place} is quantized already ({key} is {dtype}); {UNQUANTIZED}")
    for pattern, what in QUANTIZED:
        found = next((key for key in header if re.search(pattern, key)), None)
        if found is not None:
            raise Unsupported(f"{place} is quantized already ({what}: {found}); {UNQUANTIZED}")


def layout_of(file: Path, header: Header) -> Layout:
    """The layout of a single-file checkpoint.

    Raises:
        CheckpointError: it is something else, or incomplete; the message says what, and what to give instead.
        Unsupported: its weights are quantized already.
    """
    refuse_quantized(file, header)

    def has(prefixes: tuple[str, ...]) -> bool:
        return any(key.startswith(prefixes) for key in header)

    if "edm_mean" in header or not has(("model.diffusion_model.input_blocks.",)):
        raise CheckpointError(f"{file} {foreign(header)}")
    for layout in LAYOUTS:
        if all(has(part.prefixes) for part in layout.parts if part.name.startswith("text_encoder")):
            break
    else:
        raise CheckpointError(
            f"{file} holds a UNet without a text encoder (cond_stage_model.*, conditioner.*); {WHOLE}"
        )
    if not has(VAE_PREFIXES):
        raise CheckpointError(f"{file} is {layout.title} without a VAE (first_stage_model.*); {WHOLE}")
    return layout


def foreign(header: Header) -> str:
    """``is …; give …`` for a file that is not a checkpoint we read."""
    for pattern, what, instead in OTHERS:
        if any(re.search(pattern, key) for key in header):
            return f"is {what}, not a Stable Diffusion checkpoint in one file; {instead}"
    if 0 < len(header) <= 2 and all(len(shape) == 2 for _, shape in header.values()):
        return "is a textual inversion, not a checkpoint; give the checkpoint it was made for"
    first = ", ".join(sorted(header)[:3]) or "none"
    titles = ", ".join(layout.title for layout in LAYOUTS)
    return f"has tensors of no layout we know ({first}); allowed in one file: {titles}; otherwise {FOLDER}"


def input_channels(header: Header) -> int:
    """Channels that the UNet takes: 4 of latents, more with a mask or a picture beside them."""
    return header["model.diffusion_model.input_blocks.0.0.weight"][1][1]


def stated_prediction(file: Path, header: Header, metadata: Mapping[str, str]) -> str | None:
    """The prediction type that the file itself states, if it does.

    Marks: the empty tensor ``v_pred`` (NoobAI-XL, ComfyUI) and ``modelspec.prediction_type``
    (https://github.com/Stability-AI/ModelSpec).

    Raises:
        CheckpointError: it states one that nobody knows.
    """
    if "v_pred" in header:
        return "v_prediction"
    stated = metadata.get("modelspec.prediction_type")
    if stated is None:
        return None
    known = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    if stated.lower() not in known:
        raise CheckpointError(f"{file} states modelspec.prediction_type {stated!r}; allowed: {', '.join(known)}")
    return known[stated.lower()]


def unknown_tensors(header: Header, taken: set[str]) -> list[str]:
    """Tensors that no component took and `LEFT_OUT` does not name."""
    return sorted(k for k in header.keys() - taken if not any(re.search(pattern, k) for pattern, _ in LEFT_OUT))
