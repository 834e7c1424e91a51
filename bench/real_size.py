"""A checkpoint with Stable Diffusion 1.5's UNet at its real size and random weights: real work, no real pictures.

``python -m intaglio.bench.real_size DIR``. The UNet (860 M parameters) and the text encoder (CLIP ViT-L's layers) have
the published dimensions; the VAE is small, so that the UNet is what is measured, and the tokenizer is the embedded
checkpoint's. Source of the dimensions: stable-diffusion-v1-5's configurations, Rombach et al. 2022 (arXiv:2112.10752).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.exporters.checkpoint import embedded_folder
from intaglio.profiles.staging import writing

SEED = 0
UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TEXT: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
}
VAE: Mapping[str, Any] = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "sample_size": 512,
}
SCHEDULER: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def make(folder: Path, unet: Mapping[str, Any] = UNET, text: Mapping[str, Any] = TEXT) -> Path:
    """Write the checkpoint, whole or not at all: fp16 safetensors, about 1.9 GB at the real size."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    own = embedded_folder("emoji")
    known = json.loads((own / "text_encoder/config.json").read_text(encoding="utf-8"))
    tokens = {k: known[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(SEED)
    with writing(folder) as content:
        for name, module in (
            ("unet", UNet2DConditionModel(**unet)),
            ("vae", AutoencoderKL(**VAE)),
            ("text_encoder", CLIPTextModel(CLIPTextConfig(**text, **tokens))),
        ):
            module.half().save_pretrained(content / name)
        DDIMScheduler(**SCHEDULER).save_pretrained(content / "scheduler")
        shutil.copytree(own / "tokenizer", content / "tokenizer")
        config = json.loads((own / "tokenizer/tokenizer_config.json").read_text(encoding="utf-8"))
        config["model_max_length"] = text["max_position_embeddings"]
        (content / "tokenizer/tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        shutil.copy(own / "model_index.json", content / "model_index.json")
    return folder


def main() -> int:
    """The command line."""
    print(make(Path(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
