"""The way back: a diffusers folder into one file in the CompVis/LDM layout, as the webuis save it.

Written from the original code's module names (CompVis/stable-diffusion, Stability-AI/generative-models,
mlfoundations/open_clip), not from the conversion that it tests.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
TEXTS = {  # part to (OpenCLIP?, prefix), by layout
    "sd1": {"text_encoder": (False, "cond_stage_model.transformer.")},
    "sd2": {"text_encoder": (True, "cond_stage_model.model.")},
    "sdxl": {
        "text_encoder": (False, "conditioner.embedders.0.transformer."),
        "text_encoder_2": (True, "conditioner.embedders.1.model."),
    },
    "sdxl_refiner": {"text_encoder_2": (True, "conditioner.embedders.0.model.")},
}


def unet_name(name: str, config: dict[str, Any]) -> str:
    """A UNet2DConditionModel parameter in the original UNetModel."""
    for ours, theirs in UNET.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    step = config["layers_per_block"] + 1
    side, rest = name.split(".", 1)
    if side == "mid_block":
        kind, index, rest = rest.split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        block, kind, index, rest = rest.split(".", 3)
        first, layer = int(block) * step, int(index)
        if kind == "downsamplers":
            return f"input_blocks.{first + step}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            attention = "CrossAttn" in config["up_block_types"][int(block)]
            return f"output_blocks.{first + step - 1}.{1 + attention}.{rest}"
        position = int(kind == "attentions")
        number = first + layer + (side == "down_blocks")
        place = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{position}"
    if kind == "resnets":
        module, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[module]}.{leaf}"
    return f"{place}.{rest}"


def vae_entry(name: str, value: Any, config: dict[str, Any]) -> tuple[str, Any]:
    """An AutoencoderKL parameter in the original one; its attention's linears are 1x1 convolutions there."""
    last = len(config["up_block_types"]) - 1
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if "mid_block.attentions.0." in name:
        head, _, tail = name.partition("mid_block.attentions.0.")
        module, _, leaf = tail.rpartition(".")
        name = f"{head}mid.attn_1.{VAE_ATTENTION[module]}.{leaf}"
        value = value[:, :, None, None] if value.ndim == 2 else value
    return name, value


def open_clip_entries(state: dict[str, Any]) -> dict[str, Any]:
    """A CLIP text model in OpenCLIP's names: q, k and v fused, the projection transposed and no linear."""
    import torch

    result: dict[str, Any] = {}
    for name, value in state.items():
        plain = name.removeprefix("text_model.")
        if plain in OPEN_CLIP:
            result[OPEN_CLIP[plain]] = value
        elif plain == "text_projection.weight":
            result["text_projection"] = value.T.contiguous()
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", plain):
            fused = torch.cat([state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            result[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = fused
        elif not re.search(r"\.[kv]_proj\.", plain):
            layer, module, leaf = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", plain).groups()
            result[f"transformer.resblocks.{layer}.{OPEN_CLIP_LAYER[module]}.{leaf}"] = value
    return result


def to_ldm(layout: str, states: dict[str, dict[str, Any]], configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One state dict from those of the parts, with what else such files carry.

    Args:
        layout: key of TEXTS.
        states: part to parameter name to tensor, meta tensors too.
        configs: part to ``config.json``.
    """
    import torch

    result: dict[str, Any] = {}
    for name, value in states["unet"].items():
        result[f"model.diffusion_model.{unet_name(name, configs['unet'])}"] = value
    for name, value in states["vae"].items():
        theirs, value = vae_entry(name, value, configs["vae"])
        result[f"first_stage_model.{theirs}"] = value
    for part, (open_clip, prefix) in TEXTS[layout].items():
        state = {n: v for n, v in states[part].items() if not n.endswith("position_ids")}
        if open_clip:
            entries = {**open_clip_entries(state), "logit_scale": torch.tensor(4.6)}
            # Stable Diffusion 2 stores the projection too, and does not use it.
            embedding = entries["positional_embedding"]
            entries.setdefault("text_projection", embedding.new_zeros(embedding.shape[1], embedding.shape[1]))
        else:
            entries = {f"text_model.{n.removeprefix('text_model.')}": v for n, v in state.items()}
            entries["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        result.update({prefix + n: v for n, v in entries.items()})
    result["betas"] = result["alphas_cumprod"] = torch.linspace(0, 1, 1000)
    return result


def read_folder(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """State dicts and configurations of a diffusers folder."""
    from safetensors.torch import load_file

    parts = [path.parent for path in sorted(folder.glob("*/*.safetensors"))]
    states = {path.name: load_file(next(path.glob("*.safetensors"))) for path in parts}
    configs = {path.name: json.loads((path / "config.json").read_text()) for path in parts}
    return states, configs


def write_ldm(folder: Path, layout: str, file: Path, *, dtype: str = "float32", **metadata: str) -> Path:
    """The checkpoint of a diffusers folder as one file."""
    import torch
    from safetensors.torch import save_file

    tensors = to_ldm(layout, *read_folder(folder))
    kind = getattr(torch, dtype)
    ready = {n: (v.to(kind) if v.is_floating_point() else v).clone().contiguous() for n, v in tensors.items()}
    save_file(ready, file, metadata={"format": "pt", **metadata})
    return file


def configuration(folder: Path, target: Path) -> Path:
    """A diffusers folder's configuration and tokenizers without its weights."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def write_header(tensors: dict[str, Any], file: Path, *, dtype: str = "F16", **metadata: str) -> Path:
    """A safetensors file with these names and shapes and a hole for the values: gigabytes that take no room."""
    bytes_each, offset, header = {"F16": 2, "F32": 4, "F8_E4M3": 1}[dtype], 0, {}
    for name, value in tensors.items():
        size = bytes_each * value.numel()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return file


def untrained(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Parameters, on the meta device, and configurations of the models that a diffusers folder describes."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    states, configs = {}, {}
    for part in (p for p in index if (folder / p / "config.json").exists()):
        library, name = index[part]
        configs[part] = json.loads((folder / part / "config.json").read_text())
        with init_empty_weights():
            if library == "diffusers":
                model = getattr(diffusers, name).from_config(configs[part])
            else:
                model = getattr(transformers, name)(transformers.CLIPTextConfig(**configs[part]))
        states[part] = dict(model.named_parameters())
    return states, configs


@functools.cache
def full_size(name: str) -> dict[str, Any]:
    """The tensors, without values, of a full-size single file for a bundled configuration."""
    from intaglio.exporters.single_file_config import bundled_folder

    layout = "sd2" if name.startswith("sd2") else name
    return to_ldm(layout, *untrained(bundled_folder(name)))
