"""LoRA files against a checkpoint: every tensor of a file means something there, or the file is refused by name."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.exporters.lora import Delta, LoraFile, Loras
from intaglio.exporters.lora_names import Catalogue, Piece, grouped, place
from intaglio.exporters.weights import PICKLES, Parameter, Weights, read_header, read_metadata
from intaglio.profiles.artifact import sha256
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError

FLOATS = ("F32", "F16", "BF16")
PEFT_METADATA = "lora_adapter_metadata"  # where diffusers writes PEFT's settings in a safetensors header
PEFT_CONFIG = "adapter_config.json"  # where PEFT itself writes them, beside the file

# Tensors of other methods than LoRA, and of LoRAs that do more than add a product: refused by name.
REFUSED = (
    (r"\.hada_[wt]\d", "is a LoHa (LyCORIS)"),
    (r"\.lokr_[wt]\d", "is a LoKr (LyCORIS)"),
    (r"\.(oft_|boft_)|\.on_input$|\.ia3_", "is an OFT, BOFT or (IA)3"),
    (r"dora_scale|lora_magnitude_vector", "is a DoRA, whose magnitudes need the fused weight's norm"),
    (r"\.lora_embedding_[AB]", "changes token embeddings"),
    (r"\.lora_(A|B|up|down)(\.[^.]+)?\.bias$", "has biases in its layers"),
    (r"^lora_controlnet$", "is a Control-LoRA, which makes a ControlNet"),
    (
        r"(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$",
        "is a FLUX Control LoRA, which changes norms and inputs",
    ),
    (r"^bundle_emb\.", "has textual inversions bundled with it"),
    (r"^emb_params$|^clip_[lg]$|^string_to_param", "is a textual inversion; give it with --embedding"),
)
DIFFERENCES = r"\.diff(_b)?$"  # whole differences beside the products; some tools write them where they are all zero
INPUT_LAYERS = ("x_embedder.weight", "img_in.weight", "conv_in.weight", "pos_embed.proj.weight")

# What a LoRA was made for, by its layers' names; the first row with a match counts.
FAMILIES = (
    (r"single_stream_modulation|to_qkv_mlp_proj", "FLUX.2"),
    (r"double_blocks|single_(transformer_)?blocks", "FLUX.1 or FLUX.2"),
    (r"joint_blocks", "Stable Diffusion 3"),
    (r"(img|txt)_(mlp[._]net|mod[._]\d)", "Qwen-Image"),
    (r"blocks[._]\d+[._](self|cross)_attn[._]", "Wan"),
    (r"lora_te2_|^text_encoder_2\.", "Stable Diffusion XL"),
    (r"attention[._](to_q|qkv)|(noise|context)_refiner", "Lumina 2 or Z-Image"),
    (r"transformer_blocks[._]\d+[._]attn[._](add_|to_add)", "a transformer such as Stable Diffusion 3's or FLUX's"),
    (r"(down|up|input|output)_blocks", "a UNet such as Stable Diffusion's"),
)
CONTEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}


def parse_lora(text: str) -> LoraFile:
    """``PATH[:WEIGHT]``; the weight is 1 where none is given. A path may have colons.

    Raises:
        UsageError: there is no such file, or the weight is not a finite number.
        CheckpointError: the file is a pickle, or not safetensors.
    """
    path, rest = split_suffix(text, "--lora", "WEIGHT")
    try:
        weight = 1.0 if rest is None else float(rest)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"--lora {text}: the weight {rest!r} is not a number; for example --lora {path}:0.8")
    check_safetensors(path, "--lora")
    return LoraFile(path=path, weight=weight, digest=digest_of_lora(path))


def split_suffix(text: str, option: str, suffix: str) -> tuple[Path, str | None]:
    """``PATH[:SUFFIX]`` at the colon that leaves an existing path, from the right.

    Raises:
        UsageError: no part of it is a file; or it is a folder.
    """
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        path = Path(":".join(parts[:count]))
        if path.is_dir():
            inside = ", ".join(sorted(p.name for p in path.glob("*.safetensors"))[:3]) or "none there"
            raise UsageError(f"{option} {path} is a folder; give the safetensors file in it: {inside}")
        if path.is_file():
            return path, ":".join(parts[count:]) if count < len(parts) else None
    raise UsageError(f"{option} {text}: there is no such file; allowed: PATH[:{suffix}] of a safetensors file")


def check_safetensors(path: Path, option: str) -> None:
    """A file with tensors that can be read without running code.

    Raises:
        CheckpointError: it is a pickle, not safetensors, or empty.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{option} {path} is a pickle ({path.suffix}) and can run code when it is read; convert it to safetensors"
        )
    if not read_header(path):
        raise CheckpointError(f"{option} {path} has no tensors in it")


def digest_of_lora(path: Path) -> str:
    """sha256 of the file, and of PEFT's settings beside it where those decide about its scale."""
    _, settings = peft_settings(path)
    digests = [sha256(file) for file in (path, settings) if file is not None]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_loras(files: Sequence[LoraFile], parts: Mapping[str, Weights]) -> Loras:
    """Find out what each tensor of each file means for a checkpoint. Only headers and alphas are read.

    Args:
        files: in the order they are added.
        parts: the stored weights of every component folder that is built.

    Raises:
        CheckpointError: a LoRA of another model, or with tensors that mean nothing here.
        Unsupported: a method other than LoRA, or one that changes more than weights.
    """
    catalogues = {part: Catalogue({n: p.shape for n, p in weights.items()}) for part, weights in parts.items()}
    deltas: dict[str, dict[str, tuple[Delta, ...]]] = {}
    for file in files:
        found = _Reader(file, parts, catalogues).read()
        for part, name, delta in found:
            entries = deltas.setdefault(part, {})
            entries[name] = (*entries.get(name, ()), delta)
    return Loras(files=tuple(files), deltas=deltas)


class _Reader:
    """One file against a checkpoint."""

    def __init__(self, file: LoraFile, parts: Mapping[str, Weights], catalogues: Mapping[str, Catalogue]) -> None:
        self.file, self.parts, self.catalogues = file, parts, catalogues
        self.header = read_header(file.path)
        self.settings, _ = peft_settings(file.path)

    def read(self) -> list[tuple[str, str, Delta]]:
        """Component, parameter and what is added, for all of the file."""
        self.refuse()
        groups, rest = grouped(k for k in self.header if not re.search(DIFFERENCES, k))
        if rest:
            raise CheckpointError(f"{self.file.path}: {len(rest)} tensors are of no LoRA, the first is {rest[0]}")
        found: list[tuple[str, str, Delta]] = []
        taken: dict[tuple[str, str], str] = {}
        unknown = [name for name in groups if place(name, self.catalogues) is None]
        if unknown:
            raise CheckpointError(self.foreign(groups, unknown))
        for name, roles in groups.items():
            for part, delta in self.deltas(name, roles):
                key = (part, delta.piece.parameter)
                if key in taken:
                    raise CheckpointError(f"{self.file.path} has {'.'.join(key)} twice: {taken[key]} and {name}")
                taken[key] = name
                found.append((*key, delta))
        return found

    def refuse(self) -> None:
        """Name what is not a LoRA, or more than one."""
        for pattern, what in REFUSED:
            key = next((k for k in sorted(self.header) if re.search(pattern, k)), None)
            if key is not None:
                raise Unsupported(f"{self.file.path} {what} ({key}), which cannot be fused; allowed: LoRA and LoCon")
        for key, (dtype, _) in self.header.items():
            if dtype not in FLOATS and not key.endswith(".alpha"):
                raise Unsupported(f"{self.file.path}: {key} is {dtype}; allowed: {', '.join(FLOATS)}")
            if re.search(DIFFERENCES, key) and np.any(self.tensor(key).read()):
                raise Unsupported(f"{self.file.path} has whole differences beside its products ({key}); allowed: LoRA")

    def tensor(self, key: str) -> Parameter:
        """A tensor of the file."""
        dtype, shape = self.header[key]
        return Parameter(file=self.file.path, key=key, dtype=dtype, shape=shape)

    def deltas(self, name: str, roles: Mapping[str, str]) -> list[tuple[str, Delta]]:
        """What the tensors of one layer add."""
        placed = place(name, self.catalogues)
        assert placed is not None  # `read` looked
        part, inner, pieces = placed
        if "up" not in roles or "down" not in roles:
            there = next(iter(roles.values()))
            raise CheckpointError(f"{self.file.path} has {there} without its other half; fetch the file again")
        up, down = self.tensor(roles["up"]), self.tensor(roles["down"])
        mid = self.tensor(roles["mid"]) if "mid" in roles else None
        self.check_shapes(part, pieces, up, down, mid)
        scale = self.file.weight * self.scale(roles.get("alpha"), part, inner, down.shape[0])
        return [(part, Delta(up=up, down=down, mid=mid, scale=scale, piece=piece)) for piece in pieces]

    def check_shapes(
        self, part: str, pieces: Sequence[Piece], up: Parameter, down: Parameter, mid: Parameter | None
    ) -> None:
        """The product has the shape of the weights."""
        where, rank = f"{self.file.path}: {down.key}", down.shape[0] if down.shape else 0
        weight = self.parts[part][pieces[0].parameter]
        if re.search(
            r"(^|[._])(token_|position_)?embedding\.weight$|embed_tokens\.|(^|\.)shared\.", pieces[0].parameter
        ):
            raise Unsupported(f"{where} changes embeddings ({pieces[0].parameter}), which is not a matrix product")
        if weight.dtype not in FLOATS:
            raise CheckpointError(f"{part}: {pieces[0].parameter} is {weight.dtype}; allowed: {', '.join(FLOATS)}")
        kernel = down.shape[2:] if mid is None else mid.shape[2:]
        product = _without_ones((up.shape[0], *down.shape[1:2], *kernel)) if len(down.shape) > 1 < len(up.shape) else ()
        wanted = _without_ones((pieces[-1].rows[1], *weight.shape[1:]))
        inside = (*up.shape[1:2], *(mid.shape[:2] if mid else ()))
        pointwise = math.prod(up.shape[2:]) == 1 and (mid is None or math.prod(down.shape[2:]) == 1)
        if product == wanted and pointwise and set(inside) == {rank}:
            return
        fits = f"{part}'s {pieces[0].parameter} has {list(weight.shape)}"
        if len(product) > 1 and product[1] != wanted[1] and pieces[0].parameter.endswith(INPUT_LAYERS):
            raise Unsupported(f"{where} changes the input channels ({product[1]}, {fits}), as FLUX Control LoRAs do")
        made_for = self.made_for()
        raise CheckpointError(
            f"{where} {list(down.shape)} and {up.key} {list(up.shape)} do not fit: {fits}"
            + (f"; the LoRA seems to be for {made_for}" if made_for else "")
        )

    def scale(self, alpha: str | None, part: str, layer: str, rank: int) -> float:
        """Alpha over rank: of a tensor, or of PEFT's settings; 1 where nothing is said."""
        settings = self.settings.get(part)
        if alpha is not None:
            if settings is not None:
                raise CheckpointError(f"{self.file.path} has its scale twice: {alpha} and {PEFT_METADATA}")
            value = float(self.tensor(alpha).read().reshape(-1)[0])
            if not math.isfinite(value) or math.prod(self.header[alpha][1]) != 1:
                raise CheckpointError(f"{self.file.path}: {alpha} is {value}, not one finite number")
            return value / rank
        if settings is None:
            return 1.0
        patterns = dict(settings.get("alpha_pattern") or {})
        own = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), None)  # as PEFT's `get_pattern_key`
        value = float(patterns[own] if own is not None else settings["lora_alpha"])
        return value / math.sqrt(rank) if settings.get("use_rslora") else value / rank

    def made_for(self) -> str:
        """What the LoRA seems to be for; empty where nothing tells."""
        metadata = read_metadata(self.file.path)
        for key in ("modelspec.architecture", "ss_base_model_version"):
            if metadata.get(key):
                return metadata[key]
        for key, (_, shape) in self.header.items():
            if re.search(r"attn2[._](processor[._])?to_k.*(down|lora_A)", key) and shape[1] in CONTEXT_WIDTHS:
                return CONTEXT_WIDTHS[shape[1]]
        return next((name for pattern, name in FAMILIES if any(re.search(pattern, k) for k in self.header)), "")

    def foreign(self, groups: Mapping[str, Mapping[str, str]], unknown: Sequence[str]) -> str:
        """Why no component takes the `unknown` layers."""
        key, parts, made_for = next(iter(groups[unknown[0]].values())), ", ".join(self.catalogues), self.made_for()
        if len(unknown) < len(groups):
            what = f"has {len(unknown)} of {len(groups)} layers that no component takes"
        else:
            what = "is for another model: no component takes any of its layers"
        looks = f"; it seems to be for {made_for}" if made_for else ""
        return f"{self.file.path} {what} ({parts}), the first is {key}{looks}"


def peft_settings(path: Path) -> tuple[dict[str, dict[str, Any]], Path | None]:
    """PEFT's settings of a file by component, and the file they are in, where they are not in the file itself.

    diffusers writes them into the header, as ``COMPONENT.lora_alpha``; PEFT writes ``adapter_config.json``.

    Raises:
        CheckpointError: they cannot be read.
        Unsupported: they say that it is more than a LoRA.
    """
    config = path.parent / PEFT_CONFIG
    stated, source = read_metadata(path).get(PEFT_METADATA), None
    if stated is None and config.is_file() and any(k.startswith("base_model.model.") for k in read_header(path)):
        stated, source = config.read_text(encoding="utf-8"), config
    if stated is None:
        return {}, None
    try:
        flat: dict[str, Any] = dict(json.loads(stated))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source or path}: PEFT's settings cannot be read ({error})") from error
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, dot, name = key.partition(".")
        for component in (part,) if dot else ("unet", "transformer"):  # of a model that was saved alone
            by_part.setdefault(component, {})[name if dot else key] = value
    for settings in by_part.values():
        if "lora_alpha" not in settings:
            raise CheckpointError(f"{source or path}: PEFT's settings have no lora_alpha")
        for key in ("use_dora", "lora_bias"):
            if settings.get(key):
                raise Unsupported(f"{path} is a LoRA with {key}, which cannot be fused; allowed: LoRA and LoCon")
    return by_part, source


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape, a pointwise convolution's as that of a matrix."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape
