"""Every layout of LoRA files that diffusers reads, by family: what ``fuse_lora`` makes of each is what we must."""

from __future__ import annotations

import re

import numpy as np
from lora_cases import KOHYA, PEFT, attention, compvis, dotted, flat, lora_of, original

DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
DIFFUSERS_TEXT = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
PROCESSORS = (".down.weight", ".up.weight")
DOWN_UP = KOHYA[:2]
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
ENCODERS = ("text_encoder", "text_encoder_2")


def xlabs(layers, name):
    """XLabs' processors end in ``_lora``, or ``_lora1`` and ``_lora2`` where there are two."""
    return lora_of(layers, lambda n: name(n) if name(n)[-1] in "12" else name(n) + "_lora", *PROCESSORS)


def blocks_alone(prefix):
    return lambda layer: prefix + layer if "transformer_blocks" in layer else None


def dora_of(layers, prefix, ending="lora_magnitude_vector", seed=0):
    """A LoRA and magnitudes between 0.5 and 1.5 for every row, in PEFT's shapes."""
    rng, tensors = np.random.default_rng(seed + 9), lora_of(layers, dotted(prefix), *PEFT, seed=seed)
    for layer, shape in layers.items():
        rows = (rng.random(shape[0]) + 0.5).astype(np.float32)
        tensors[f"{prefix}{layer}.{ending}"] = rows if len(shape) == 2 else rows.reshape(1, -1, 1, 1)
    return tensors


def texts(parts, ends, *, inside="", encoders=ENCODERS):
    """The text encoders' part of a LoRA in diffusers' names."""
    return merged(
        lora_of(parts[e], dotted(f"{e}.{inside}"), *ends, seed=i + 1) for i, e in enumerate(encoders) if e in parts
    )


def merged(dicts):
    return {key: value for tensors in dicts for key, value in tensors.items()}


def converted_sdxl(layer):
    """diffusers takes ``add_embedding`` under CompVis' name alone, and drops the other."""
    return None if "add_embedding" in layer else flat("lora_unet_")(layer)


def converted_flux(name):
    """What diffusers' converter has right for a FLUX of any width: it has linear1's widths written in it."""
    return not re.search(r"linear1|processor|final_layer|_in\.|_in$|embedder", name)


def converted_flux2(name):
    return not re.search(r"modulation|guidance_in|embedder", name)


def converted_ai_toolkit(name):
    """diffusers gives FLUX.2's last modulation the original's order of scale and shift."""
    return not re.search(r"adaLN|embedder", name)


def converted_mixture(layer):
    """What diffusers' converter has of files with ``lora_transformer_``: attention, and layers outside of blocks."""
    return None if re.search(r"blocks.*(ff|norm|proj_mlp)|proj_out", layer) else flat("lora_transformer_")(layer)


def flux_original(parts, prefix, separator, only, ends, **more):
    return lora_of(*original(prefix, parts["transformer"], separator=separator, only=only), *ends, **more)


def processors_alone(name):
    return "processor" in name


SD = {
    "peft": lambda p: lora_of(p["unet"], dotted("unet."), *PEFT),
    "peft text": lambda p: lora_of(p["unet"], dotted("unet."), *PEFT) | texts(p, PEFT),
    "diffusers": lambda p: (
        lora_of(p["unet"], dotted("unet."), *DIFFUSERS) | texts(p, DIFFUSERS_TEXT, inside="text_model.")
    ),
    "attention processors": lambda p: (
        lora_of(p["unet"], attention("unet.", ".processor"), *PROCESSORS)
        | lora_of(p["text_encoder"], attention("text_encoder.text_model.", ""), *PROCESSORS, seed=1)
    ),
    "kohya": lambda p: (
        lora_of(p["unet"], flat("lora_unet_"), *KOHYA, steps=1)
        | lora_of(p["text_encoder"], flat("lora_te_text_model_"), *KOHYA, seed=1, steps=1)
    ),
    "kohya te1": lambda p: lora_of(p["text_encoder"], flat("lora_te1_text_model_"), *KOHYA, steps=1),
    "kohya without alphas": lambda p: lora_of(p["unet"], flat("lora_unet_"), *DOWN_UP),
    "dora": lambda p: dora_of(p["unet"], "unet."),
    "dora text": lambda p: (
        dora_of(p["unet"], "unet.") | dora_of(p["text_encoder"], "text_encoder.", "lora_magnitude_vector.weight", 1)
    ),
}
SDXL = {
    "peft": lambda p: lora_of(p["unet"], dotted("unet."), *PEFT) | texts(p, PEFT),
    "diffusers": lambda p: (
        lora_of(p["unet"], dotted("unet."), *DIFFUSERS)
        | texts(p, DIFFUSERS_TEXT, inside="text_model.", encoders=("text_encoder",))
    ),
    "attention processors": lambda p: lora_of(p["unet"], attention("unet.", ".processor"), *PROCESSORS),
    "kohya": lambda p: (
        lora_of(p["unet"], converted_sdxl, *KOHYA, steps=1)
        | lora_of(p["text_encoder"], flat("lora_te1_text_model_"), *KOHYA, seed=1, steps=1)
        | lora_of(p["text_encoder_2"], flat("lora_te2_"), *KOHYA, seed=2, steps=1)
    ),
    "kohya compvis": lambda p: lora_of(p["unet"], compvis(p["unet"]), *KOHYA, steps=1),
    "dora": lambda p: (
        dora_of(p["unet"], "unet.") | dora_of(p["text_encoder"], "text_encoder.", "lora_magnitude_vector.weight", 1)
    ),
}
SD3 = {
    "peft": lambda p: lora_of(p["transformer"], dotted("transformer."), *PEFT) | texts(p, PEFT),
    "diffusers": lambda p: lora_of(p["transformer"], dotted("transformer."), *DIFFUSERS),
    "attention processors": lambda p: lora_of(
        {n: s for n, s in p["transformer"].items() if ".attn." in n},
        attention("transformer.", ".processor"),
        *PROCESSORS,
    ),
    "dora": lambda p: (
        dora_of(p["transformer"], "transformer.")
        | dora_of(p["text_encoder"], "text_encoder.", "lora_magnitude_vector.weight", 1)
    ),
}
FLUX = {
    "peft": lambda p: lora_of(p["transformer"], dotted("transformer."), *PEFT),
    "peft text": lambda p: (
        lora_of(p["transformer"], dotted("transformer."), *PEFT) | texts(p, PEFT, encoders=("text_encoder",))
    ),
    "peft alphas": lambda p: lora_of(p["transformer"], dotted("transformer."), *PEFT, ".alpha", steps=1),
    "down and up": lambda p: lora_of(p["transformer"], dotted("transformer."), *DOWN_UP),
    "diffusers": lambda p: lora_of(p["transformer"], dotted("transformer."), *DIFFUSERS),
    "kohya": lambda p: (
        flux_original(p, "lora_unet_", "_", converted_flux, KOHYA)
        | lora_of(p["text_encoder"], flat("lora_te1_text_model_"), *KOHYA, seed=1)
    ),
    "comfyui": lambda p: (
        flux_original(p, "diffusion_model.", ".", converted_flux, DOWN_UP)
        | lora_of(p["text_encoder"], dotted("text_encoders.clip_l.transformer.text_model."), *DOWN_UP, seed=1)
    ),
    "lora_transformer": lambda p: (
        lora_of(p["transformer"], converted_mixture, *KOHYA)
        | lora_of(p["text_encoder"], flat("lora_te1_text_model_"), *KOHYA, seed=1)
    ),
    "xlabs": lambda p: xlabs(*original("", p["transformer"], separator=".", only=processors_alone)),
    "xlabs diffusion_model": lambda p: xlabs(
        *original("diffusion_model.", p["transformer"], separator=".", only=processors_alone)
    ),
    "dora": lambda p: (
        dora_of(p["transformer"], "transformer.")
        | dora_of(p["text_encoder"], "text_encoder.", "lora_magnitude_vector.weight", 1)
    ),
}
FLUX2 = {
    "peft": lambda p: lora_of(p["transformer"], dotted("transformer."), *PEFT),
    "diffusers": lambda p: lora_of(p["transformer"], dotted("transformer."), *DIFFUSERS),
    "ai-toolkit": lambda p: flux_original(p, "diffusion_model.", ".", converted_ai_toolkit, PEFT),
    "blocks": lambda p: lora_of(p["transformer"], blocks_alone("diffusion_model."), *PEFT),
    "sformer_blocks": lambda p: lora_of(
        {n: s for n, s in p["transformer"].items() if n.startswith("transformer_blocks.")},
        lambda layer: "diffusion_model." + layer.removeprefix("tran"),
        *PEFT,
    ),
    "base_model": lambda p: lora_of(p["transformer"], blocks_alone("base_model.model."), *PEFT),
    "base_model original": lambda p: flux_original(p, "base_model.model.", ".", converted_ai_toolkit, PEFT),
    "kohya": lambda p: flux_original(p, "lora_unet_", "_", converted_flux2, KOHYA),
    "dora": lambda p: dora_of(p["transformer"], "transformer."),
}
QWEN_IMAGE = {
    "lightning": lambda p: lora_of(p["transformer"], dotted(""), *KOHYA),
    "peft": lambda p: lora_of(p["transformer"], dotted("transformer."), *PEFT),
    "diffusers": lambda p: lora_of(p["transformer"], dotted("transformer."), *DIFFUSERS),
    "diffusion_model": lambda p: lora_of(p["transformer"], dotted("diffusion_model."), *PEFT),
    "diffusion_model alphas": lambda p: lora_of(p["transformer"], dotted("diffusion_model."), *PEFT, ".alpha"),
    "diffusion_model down and up": lambda p: lora_of(p["transformer"], dotted("diffusion_model."), *KOHYA),
    "kohya": lambda p: lora_of(p["transformer"], flat("lora_unet_"), *KOHYA),
    "default": lambda p: lora_of(p["transformer"], dotted(""), *DEFAULT),
    "dora": lambda p: dora_of(p["transformer"], "transformer."),
}
FORMATS = {"sd": SD, "sdxl": SDXL, "sd3": SD3, "flux": FLUX, "flux2": FLUX2, "qwen_image": QWEN_IMAGE}
LAYOUTS = {
    f"{family} {layout}": (family, make) for family, layouts in FORMATS.items() for layout, make in layouts.items()
}
