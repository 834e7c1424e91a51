"""Names inside LoRA files: which tensors belong together, and which parameters of a checkpoint they mean.

Trainers name a layer by its path in diffusers' or transformers' modules, or by its path in the model's original code;
some write underscores for the dots. Both kinds of path are made from the checkpoint's own parameters here and compared
whole, so a name means one layer or none: diffusers' converters (``loaders/lora_conversion_utils.py``), which know the
same layouts, leave out what they do not know, and have the widths of the released models written in them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]  # tensor name to shape

# What a tensor of a LoRA is, by how its name ends; what stands before is the layer's name.
ROLES = {
    "down": r"\.lora_down\.weight$|\.lora_A(\.[^.]+)?\.weight$|(\.lora_linear_layer|\.lora|_lora)?\.down\.weight$",
    "up": r"\.lora_up\.weight$|\.lora_B(\.[^.]+)?\.weight$|(\.lora_linear_layer|\.lora|_lora)?\.up\.weight$",
    "mid": r"\.lora_mid\.weight$",
    "alpha": r"(\.lora_linear_layer|\.lora|_lora)?\.alpha$",
    "magnitude": r"\.lora_magnitude_vector(\.[^.]+)*$",
}

DENOISERS = ("unet", "transformer")
T5 = ("text_encoder_3", "text_encoder_2")  # of Stable Diffusion 3 and of FLUX.1
WRAPPERS = ("base_model.model.",)  # around whole models, by PEFT
# How a layer's name begins, and the components that may mean, the first that the checkpoint has. Those that end in an
# underscore have underscores for dots behind it.
PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_te1_", ("text_encoder",)),
    ("lora_te2_", ("text_encoder_2",)),
    ("lora_te3_", T5),
    ("lora_te_", ("text_encoder",)),
    ("lora_unet_", DENOISERS),
    ("lora_transformer_", DENOISERS),
    ("text_encoders.clip_l.transformer.", ("text_encoder",)),
    ("text_encoders.clip_g.transformer.", ("text_encoder_2",)),
    ("text_encoders.t5xxl.transformer.", T5),
    ("text_encoder.", ("text_encoder",)),
    ("text_encoder_2.", ("text_encoder_2",)),
    ("text_encoder_3.", ("text_encoder_3",)),
    ("unet.", DENOISERS),
    ("transformer.", DENOISERS),
    ("model.diffusion_model.", DENOISERS),
    ("diffusion_model.", DENOISERS),
    ("", DENOISERS),
)

# diffusers' attention processors held the LoRA's layers before 0.22, text encoders called them as the UNet does.
OLD_ATTENTION = (
    (r"\.processor\.", "."),
    (r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj"),
    (r"\.self_attn\.to_out$", ".self_attn.out_proj"),
    (r"\.to_out$", ".to_out.0"),
    (r"^sformer_blocks\.", "transformer_blocks."),  # of exports that cut a prefix of four letters off FLUX.2's names
)

IMAGE_QKV = tuple("transformer_blocks.{n}.attn." + name for name in ("to_q", "to_k", "to_v"))
TEXT_QKV = tuple("transformer_blocks.{n}.attn." + name for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
SINGLE_QKV = tuple("single_transformer_blocks.{n}.attn." + name for name in ("to_q", "to_k", "to_v"))
# Layers of transformers in their original code and in diffusers', where one may be several, below each other. The first
# row whose layers the checkpoint has counts. FLUX.1 and FLUX.2: black-forest-labs/flux, flux2 (``model.py``) and the
# processors of XLabs-AI/x-flux; Stable Diffusion 3: Stability-AI/sd3.5 (``mmditx.py``).
ORIGINAL: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("double_blocks.{n}.img_attn.qkv", IMAGE_QKV),
    ("double_blocks.{n}.txt_attn.qkv", TEXT_QKV),
    ("double_blocks.{n}.img_attn.proj", ("transformer_blocks.{n}.attn.to_out.0",)),
    ("double_blocks.{n}.txt_attn.proj", ("transformer_blocks.{n}.attn.to_add_out",)),
    ("double_blocks.{n}.img_mlp.0", ("transformer_blocks.{n}.ff.net.0.proj",)),
    ("double_blocks.{n}.img_mlp.2", ("transformer_blocks.{n}.ff.net.2",)),
    ("double_blocks.{n}.txt_mlp.0", ("transformer_blocks.{n}.ff_context.net.0.proj",)),
    ("double_blocks.{n}.txt_mlp.2", ("transformer_blocks.{n}.ff_context.net.2",)),
    ("double_blocks.{n}.img_mod.lin", ("transformer_blocks.{n}.norm1.linear",)),
    ("double_blocks.{n}.txt_mod.lin", ("transformer_blocks.{n}.norm1_context.linear",)),
    ("single_blocks.{n}.linear1", (*SINGLE_QKV, "single_transformer_blocks.{n}.proj_mlp")),
    ("single_blocks.{n}.linear2", ("single_transformer_blocks.{n}.proj_out",)),
    ("single_blocks.{n}.modulation.lin", ("single_transformer_blocks.{n}.norm.linear",)),
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    ("double_blocks.{n}.processor.qkv_lora1", IMAGE_QKV),
    ("double_blocks.{n}.processor.qkv_lora2", TEXT_QKV),
    ("double_blocks.{n}.processor.proj_lora1", ("transformer_blocks.{n}.attn.to_out.0",)),
    ("double_blocks.{n}.processor.proj_lora2", ("transformer_blocks.{n}.attn.to_add_out",)),
    ("single_blocks.{n}.processor.qkv", SINGLE_QKV),
    ("single_blocks.{n}.processor.proj", ("single_transformer_blocks.{n}.proj_out",)),
    ("double_blocks.{n}.img_mlp.0", ("transformer_blocks.{n}.ff.linear_in",)),
    ("double_blocks.{n}.img_mlp.2", ("transformer_blocks.{n}.ff.linear_out",)),
    ("double_blocks.{n}.txt_mlp.0", ("transformer_blocks.{n}.ff_context.linear_in",)),
    ("double_blocks.{n}.txt_mlp.2", ("transformer_blocks.{n}.ff_context.linear_out",)),
    ("single_blocks.{n}.linear1", ("single_transformer_blocks.{n}.attn.to_qkv_mlp_proj",)),
    ("single_blocks.{n}.linear2", ("single_transformer_blocks.{n}.attn.to_out",)),
    ("time_in.in_layer", ("time_guidance_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_guidance_embed.timestep_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_guidance_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_guidance_embed.guidance_embedder.linear_2",)),
    ("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
    ("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
    ("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
    ("joint_blocks.{n}.x_block.attn.qkv", IMAGE_QKV),
    ("joint_blocks.{n}.context_block.attn.qkv", TEXT_QKV),
    ("joint_blocks.{n}.x_block.attn2.qkv", tuple(name.replace("attn", "attn2") for name in IMAGE_QKV)),
    ("joint_blocks.{n}.x_block.attn.proj", ("transformer_blocks.{n}.attn.to_out.0",)),
    ("joint_blocks.{n}.context_block.attn.proj", ("transformer_blocks.{n}.attn.to_add_out",)),
    ("joint_blocks.{n}.x_block.attn2.proj", ("transformer_blocks.{n}.attn2.to_out.0",)),
    ("joint_blocks.{n}.x_block.mlp.fc1", ("transformer_blocks.{n}.ff.net.0.proj",)),
    ("joint_blocks.{n}.x_block.mlp.fc2", ("transformer_blocks.{n}.ff.net.2",)),
    ("joint_blocks.{n}.context_block.mlp.fc1", ("transformer_blocks.{n}.ff_context.net.0.proj",)),
    ("joint_blocks.{n}.context_block.mlp.fc2", ("transformer_blocks.{n}.ff_context.net.2",)),
    ("joint_blocks.{n}.x_block.adaLN_modulation.1", ("transformer_blocks.{n}.norm1.linear",)),
    ("joint_blocks.{n}.context_block.adaLN_modulation.1", ("transformer_blocks.{n}.norm1_context.linear",)),
    ("x_embedder.proj", ("pos_embed.proj",)),
    ("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    ("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    ("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
)
# Layers that make scale and shift, where these are all they make, in the other order than diffusers'.
SWAPPED = ("norm_out.linear", "norm1_context.linear")

# Layers of a UNet in diffusers' and in CompVis' code, outside of its blocks and inside of a residual block.
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESIDUAL = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(
    r"(?P<side>down_blocks|up_blocks|mid_block)\.((?P<level>\d+)\.)?"
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter, the rows of the LoRA's product that are added to it, and whether their halves change places."""

    parameter: str
    rows: tuple[int, int]
    swapped: bool = False


class Catalogue:
    """The layers of a component under every name that a LoRA may give them.

    Args:
        shapes: of its parameters, by name; layers are those with a ``weight`` of two axes or more.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes: Shapes = {n: s for n, s in shapes.items() if n.endswith(".weight") and len(s) > 1}
        self.layers = {name.removesuffix(".weight"): name for name in self.shapes}
        self.dotted: dict[str, str] = {}
        self.flat: dict[str, str] = {}
        doubles = set()
        for layer in self.layers:
            for name in self._names(layer):
                flat = name.replace(".", "_")
                doubles |= {flat} if self.flat.get(flat, layer) != layer else set()
                self.dotted[name] = self.flat[flat] = layer
        for name in doubles:  # underscores that could be dots in two ways mean no layer
            del self.flat[name]

    def _names(self, layer: str) -> Iterator[str]:
        yield layer
        # transformers 5 dropped this prefix from CLIPTextModel; files of both kinds are about.
        yield layer.removeprefix("text_model.") if layer.startswith("text_model.") else f"text_model.{layer}"
        if (compvis := self._compvis(layer)) is not None:
            yield compvis

    def _compvis(self, layer: str) -> str | None:
        """A UNet layer's path in CompVis' and sgm's code, which numbers the blocks of all levels through."""
        if layer in UNET:
            return UNET[layer]
        match = BLOCK.fullmatch(layer)
        if match is None:
            return None
        side, level, kind, index = match["side"], int(match["level"] or 0), match["kind"], int(match["index"])
        inner = {"resnets": 0, "attentions": 1}.get(kind)
        rest = RESIDUAL.get(match["rest"], match["rest"]) if kind == "resnets" else match["rest"]
        residuals = self._residuals
        step = residuals + 1  # a level is its residual blocks and a sampler; upwards it has a residual block more
        if side == "mid_block":
            return f"middle_block.{2 * index if inner == 0 else 1}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{step * (level + 1)}.0.op"
        if kind == "upsamplers":
            attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in self.layers)
            return f"output_blocks.{step * level + residuals}.{1 + attends}.conv"
        if side == "down_blocks":
            return f"input_blocks.{step * level + index + 1}.{inner}.{rest}"
        return f"output_blocks.{step * level + index}.{inner}.{rest}"

    @functools.cached_property
    def _residuals(self) -> int:
        """A UNet's residual blocks in each level on the way down."""
        first = re.compile(r"down_blocks\.0\.resnets\.\d+\.conv1")
        return sum(first.fullmatch(layer) is not None for layer in self.layers)

    def find(self, name: str, *, flat: bool) -> tuple[Piece, ...]:
        """What a layer's name means, with dots or with underscores for them; nothing where it means no layer here."""
        direct = (self.flat if flat else self.dotted).get(name)
        if direct is not None:
            return self._pieces((direct,))
        for pattern, targets in original_layers(flat):
            match = pattern.fullmatch(name)
            layers = tuple(t.format(n=match[1] if match.groups() else "") for t in targets) if match else ()
            if layers and all(layer in self.layers for layer in layers):
                return self._pieces(layers, original=True)
        old = name
        for expression, replacement in OLD_ATTENTION:
            old = re.sub(expression, replacement, old)
        return self.find(old, flat=flat) if old != name else ()

    def _pieces(self, layers: Iterable[str], *, original: bool = False) -> tuple[Piece, ...]:
        pieces, start = [], 0
        for layer in layers:
            rows, columns = self.shapes[self.layers[layer]][:2]
            swapped = original and layer.endswith(SWAPPED) and rows == 2 * columns
            pieces.append(Piece(self.layers[layer], (start, start + rows), swapped))
            start += rows
        return tuple(pieces)


@functools.cache
def original_layers(flat: bool) -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    """`ORIGINAL` with its names compiled, for names with dots or with underscores."""

    def compiled(name: str) -> re.Pattern[str]:
        written = name.replace(".", "_") if flat else name
        return re.compile(re.escape(written).replace(r"\{n\}", r"(\d+)"))

    return tuple((compiled(name), targets) for name, targets in ORIGINAL)


def grouped(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Tensors by the name of the layer they belong to and their role, and those that have no role in a LoRA."""
    groups: dict[str, dict[str, str]] = {}
    rest = []
    for key in sorted(keys):
        for role, pattern in ROLES.items():
            match = re.search(pattern, key)
            group = groups.setdefault(key[: match.start()], {}) if match else {}
            if match and role not in group:
                group[role] = key
                break
        else:
            rest.append(key)
    return groups, rest


def place(name: str, catalogues: Mapping[str, Catalogue]) -> tuple[str, str, tuple[Piece, ...]] | None:
    """The component that a layer's name is about, the name within it, and what it means there, if anything."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    for prefix, parts in PREFIXES:
        part = next((p for p in parts if p in catalogues), None)
        if name.startswith(prefix) and part is not None:
            inner = name.removeprefix(prefix)
            pieces = catalogues[part].find(inner, flat=prefix.endswith("_"))
            if pieces:
                return part, inner, pieces
    return None
