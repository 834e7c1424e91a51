"""What a LoRA was made for, by its names and shapes: said when it is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

Header = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name to dtype and shape

UNET = r"(^|[._])(down|up|mid|input|output|middle)_blocks?[._]"
# Patterns that must each be in some name; the first row counts. Names have dots or underscores for them.
FAMILIES: tuple[tuple[tuple[str, ...], str], ...] = (
    ((r"stream_modulation|time_guidance_embed|to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)",), "FLUX.2"),
    ((r"single_transformer_blocks[._]\d+[._]attn[._]to_out",), "FLUX.2"),
    ((r"single_transformer_blocks[._]\d+[._](proj_mlp|norm[._]|attn[._]to_[qkv])",), "FLUX.1"),
    ((r"(img|txt)_mod[._]lin([._]|$)|single_blocks[._]\d+[._]modulation|vector_in[._]",), "FLUX.1"),
    ((r"(double|single)_blocks[._]\d+[._]processor|time_text_embed[._]guidance",), "FLUX.1"),
    ((r"joint_blocks[._]|(^|[._])pos_embed[._]proj",), "Stable Diffusion 3"),
    ((r"(img|txt)_(mlp[._]net|mod[._]\d)",), "Qwen-Image"),
    ((r"blocks[._]\d+[._](self|cross)_attn[._]",), "Wan"),
    ((r"(^|[._])layers[._]\d+[._]attention[._](to_q|qkv)|(noise|context)_refiner",), "Lumina 2 or Z-Image"),
    ((UNET, r"lora_te2_|^text_encoder_2\.|(add_embedding|label_emb)[._]"), "Stable Diffusion XL"),
    ((UNET, r"(attentions[._]\d+|put_blocks[._]\d+[._]1)[._]transformer_blocks[._][1-9]"), "Stable Diffusion XL"),
    ((r"(down|up)_blocks[._]3[._]|down_blocks[._]0[._]attentions",), "Stable Diffusion 1.x or 2.x"),
)
# By the width of what a matrix takes: cross-attention's keys in a UNet, an MMDiT's queries and keys. Widths from
# the released models' config.json.
UNET_CONTEXTS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "Stable Diffusion XL's refiner",
    2048: "Stable Diffusion XL",
}
TRANSFORMER_WIDTHS = {
    1536: "Stable Diffusion 3",
    2432: "Stable Diffusion 3.5 large",
    4096: "FLUX.2",
    6144: "FLUX.2",
}
# By how many times wider than its input a block's first matrix is: FLUX.2's MLPs are gated and three times as wide.
BLOCK_RATIOS = {7.0: "FLUX.1", 4.0: "FLUX.1", 9.0: "FLUX.2", 6.0: "FLUX.2"}
FLUX1_BLOCKS = 19  # of two streams; Qwen-Image has 60 as wide
# Where neither tells.
KINDS: tuple[tuple[str, str], ...] = (
    (r"(double|single)_blocks[._]", "FLUX.1 or FLUX.2"),
    (UNET, "a UNet such as Stable Diffusion's"),
    (r"transformer_blocks[._]\d+[._]attn", "a transformer such as Stable Diffusion 3's, FLUX's or Qwen-Image's"),
)
DOWN = r"(\.lora_down|\.lora_A(\.[^.]+)?|\.down)\.weight$"


def made_for(header: Header, metadata: Mapping[str, str]) -> str:
    """The model a LoRA seems to be for; empty where nothing tells.

    Args:
        header: of the file.
        metadata: of the file; trainers such as kohya's write the model's name.
    """
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if metadata.get(key):
            return metadata[key]
    by_context = (UNET_CONTEXTS.get(w) for w in _widths(header, r"attn2[._](processor[._])?to_k"))
    found = next((name for name in by_context if name), "") or _by_names(header)
    return found or _by_shapes(header) or next((n for p, n in KINDS if any(re.search(p, k) for k in header)), "")


def _by_names(header: Header) -> str:
    for patterns, name in FAMILIES:
        if all(any(re.search(pattern, key) for key in header) for pattern in patterns):
            return name
    return ""


def _by_shapes(header: Header) -> str:
    for key, (_, shape) in header.items():
        if re.search(r"single_blocks[._]\d+[._]linear1|double_blocks[._]\d+[._](img|txt)_mlp[._]0", key):
            up = re.sub("lora_down", "lora_up", re.sub("lora_A", "lora_B", key))
            if re.search(DOWN, key) and up in header and (name := BLOCK_RATIOS.get(header[up][1][0] / shape[1])):
                return name
    attention = r"(^|[._])transformer_blocks[._](\d+)[._]attn[._](to|add)_[qkv]"
    widths = set() if any(re.search(UNET, k) for k in header) else set(_widths(header, attention))
    blocks = [int(m[2]) for k in header if (m := re.search(attention, k))]
    if widths == {3072}:
        return "Qwen-Image" if max(blocks) >= FLUX1_BLOCKS else "FLUX.1 or Qwen-Image"
    return next((TRANSFORMER_WIDTHS[w] for w in sorted(widths) if w in TRANSFORMER_WIDTHS), "")


def _widths(header: Header, layer: str) -> list[int]:
    found = [shape for key, (_, shape) in header.items() if re.search(layer, key) and re.search(DOWN, key)]
    return [shape[1] for shape in found if len(shape) > 1]
