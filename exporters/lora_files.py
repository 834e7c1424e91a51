"""LoRA files against a checkpoint: every tensor of a file means something there, or the file is refused by name."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from intaglio.exporters.lora import Delta, LoraFile, Loras, fused_parameter
from intaglio.exporters.lora_names import PREFIXES, Catalogue, Piece, grouped, place
from intaglio.exporters.lora_origin import made_for
from intaglio.exporters.lora_settings import PEFT_METADATA, peft_settings, scale_of
from intaglio.exporters.weights import PICKLES, Parameter, Weights, read_header, read_metadata
from intaglio.profiles.artifact import sha256
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError

FLOATS = ("F32", "F16", "BF16")
ADAPTERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # in folders of PEFT and of diffusers
SHOWN = 3  # names in a message

# Tensors of other methods than LoRA, and of LoRAs that do more than add a product: refused by name.
REFUSED = (
    (r"\.hada_[wt]\d", "is a LoHa (LyCORIS)"),
    (r"\.lokr_[wt]\d", "is a LoKr (LyCORIS)"),
    (r"\.(oft_|boft_)|\.on_input$|\.ia3_", "is an OFT, BOFT or (IA)3"),
    (r"\.dora_scale$", "is a DoRA whose magnitudes are called dora_scale, along an axis that trainers do not agree on"),
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
ALLOWED = "LoRA, LoCon, and DoRA with PEFT's lora_magnitude_vector"
INPUT_LAYERS = ("x_embedder.weight", "img_in.weight", "conv_in.weight", "pos_embed.proj.weight")


def parse_lora(text: str) -> LoraFile:
    """``PATH[:WEIGHT]``; the weight is 1 where none is given. A path may have colons.

    The path is a file, or a folder as PEFT's or diffusers' ``save_pretrained`` and ``save_lora_weights`` write it.

    Raises:
        UsageError: there is no such file, or the weight is not a finite number or 0.
        CheckpointError: the file is a pickle, or not safetensors.
    """
    path, rest = split_suffix(text, "--lora", "WEIGHT", within=ADAPTERS)
    try:
        weight = 1.0 if rest is None else float(rest)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"--lora {text}: the weight {rest!r} is not a number; for example --lora {path}:0.8")
    if weight == 0:
        raise UsageError(f"--lora {text}: a LoRA of weight 0 changes nothing; leave it out, or for example {path}:0.8")
    check_safetensors(path, "--lora")
    return LoraFile(path=path, weight=weight, digest=digest_of_lora(path))


def split_suffix(text: str, option: str, suffix: str, within: Sequence[str] = ()) -> tuple[Path, str | None]:
    """``PATH[:SUFFIX]`` at the colon that leaves an existing path, from the right.

    A folder that has one file of those names `within` it means that file.

    Raises:
        UsageError: no part of it is a file; or it is a folder.
    """
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        path = Path(":".join(parts[:count]))
        known = [path / name for name in within if (path / name).is_file()]
        if len(known) == 1:
            path = known[0]
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
    """Find out what each tensor of each file means for a checkpoint.

    Headers and alphas are read, and of each file as many tensors, the smallest first, as it takes to see one of the
    checkpoint's change: one, of a file that changes anything.

    Args:
        files: in the order they are added; one that is there twice is added twice, as diffusers does under two names.
        parts: the stored weights of every component folder that is built.

    Raises:
        CheckpointError: a LoRA of another model, with tensors that mean nothing here, or that changes nothing.
        Unsupported: a method other than LoRA, or one that changes more than weights.
    """
    catalogues = {part: Catalogue({n: p.shape for n, p in weights.items()}) for part, weights in parts.items()}
    deltas: dict[str, dict[str, tuple[Delta, ...]]] = {}
    for file in files:
        found = _Reader(file, parts, catalogues).read()
        check_changes(file, found, parts)
        for part, name, delta in found:
            entries = deltas.setdefault(part, {})
            entries[name] = (*entries.get(name, ()), delta)
    return Loras(files=tuple(files), deltas=deltas)


def check_changes(file: LoraFile, found: Sequence[tuple[str, str, Delta]], parts: Mapping[str, Weights]) -> None:
    """A LoRA that leaves every weight as it is would be a build without it under another name.

    Raises:
        CheckpointError: it is one.
    """
    for part, name, delta in sorted(found, key=lambda entry: math.prod(parts[entry[0]][entry[1]].shape)):
        if fused_parameter(parts[part][name], (delta,)).changes():
            return
    raise CheckpointError(
        f"{file.path} at weight {file.weight:g} changes nothing: {len(found)} tensors of the checkpoint stay as they "
        "are, to the last bit; its products are zero or too small, so leave it out or fetch it again"
    )


class _Reader:
    """One file against a checkpoint."""

    def __init__(self, file: LoraFile, parts: Mapping[str, Weights], catalogues: Mapping[str, Catalogue]) -> None:
        self.file, self.parts, self.catalogues = file, parts, catalogues
        self.header = read_header(file.path)
        self.settings, _ = peft_settings(file.path)
        self.misfits: list[str] = []  # layers of another shape than the checkpoint's, by the first tensor's name

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
        bare = next((name for name, roles in groups.items() if "magnitude" not in roles), None)
        if bare is not None and self.is_dora(groups):
            raise CheckpointError(f"{self.file.path} is a DoRA, but has no lora_magnitude_vector for {bare}")
        for name, roles in groups.items():
            for part, delta in self.deltas(name, roles):
                key = (part, delta.piece.parameter)
                if key in taken:
                    raise CheckpointError(f"{self.file.path} has {'.'.join(key)} twice: {taken[key]} and {name}")
                taken[key] = name
                found.append((*key, delta))
        if self.misfits:
            raise CheckpointError(
                f"{self.file.path}: {len(self.misfits)} of {len(groups)} layers have another shape than the "
                f"checkpoint's ({len(groups) - len(self.misfits)} fit), the first: {self.misfits[0]}{self.seems()}"
            )
        return found

    def is_dora(self, groups: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether any layer has magnitudes, or PEFT's settings say that all do."""
        stated = any(settings.get("use_dora") for settings in self.settings.values())
        return stated or any("magnitude" in roles for roles in groups.values())

    def refuse(self) -> None:
        """Name what is not a LoRA, or more than one."""
        for pattern, what in REFUSED:
            key = next((k for k in sorted(self.header) if re.search(pattern, k)), None)
            if key is not None:
                raise Unsupported(f"{self.file.path} {what} ({key}), which cannot be fused; allowed: {ALLOWED}")
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
        mid, magnitude = (self.tensor(roles[role]) if role in roles else None for role in ("mid", "magnitude"))
        misfit = self.misfit(part, pieces, up, down, mid)
        if magnitude is not None and math.prod(magnitude.shape) != pieces[-1].rows[1]:
            misfit = misfit or f"{magnitude.key} {list(magnitude.shape)} is not one for each of {pieces[-1].rows[1]}"
        if misfit:
            self.misfits.append(misfit)
            return []
        scale = self.file.weight * self.scale(roles.get("alpha"), part, inner, down.shape[0])
        made = Delta(up=up, down=down, mid=mid, scale=scale, piece=pieces[0], magnitude=magnitude)
        return [(part, replace(made, piece=piece)) for piece in pieces]

    def misfit(self, part: str, pieces: Sequence[Piece], up: Parameter, down: Parameter, mid: Parameter | None) -> str:
        """Why the product has not the shape of the weights; empty where it has."""
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
        if product == wanted and pointwise and set(inside) == {rank} and rank:
            return ""
        fits = f"{part}'s {pieces[0].parameter} has {list(weight.shape)}"
        if len(product) > 1 and product[1] != wanted[1] and pieces[0].parameter.endswith(INPUT_LAYERS):
            raise Unsupported(f"{where} changes the input channels ({product[1]}, {fits}), as FLUX Control LoRAs do")
        return f"{down.key} {list(down.shape)} and {up.key} {list(up.shape)}, but {fits}"

    def scale(self, alpha: str | None, part: str, layer: str, rank: int) -> float:
        """Alpha over rank: of a tensor, or of PEFT's settings; 1 where nothing is said."""
        settings = self.settings.get(part)
        if alpha is not None:
            if settings is not None:
                raise CheckpointError(f"{self.file.path} has its scale twice: {alpha} and {PEFT_METADATA}")
            values = self.tensor(alpha).read().reshape(-1)
            value = float(values[0]) if values.size == 1 else math.nan
            if not math.isfinite(value):
                raise CheckpointError(f"{self.file.path}: {alpha} is {value}, not one finite number")
            return value / rank
        return 1.0 if settings is None else scale_of(settings, layer, rank)

    def seems(self) -> str:
        """The end of a message: what the LoRA seems to be for; empty where nothing tells."""
        name = made_for(self.header, read_metadata(self.file.path))
        return f"; it seems to be for {name}" if name else ""

    def foreign(self, groups: Mapping[str, Mapping[str, str]], unknown: Sequence[str]) -> str:
        """Counts of the tensors whose layer is `unknown` to the checkpoint and of those whose is not."""
        count = sum(len(groups[name]) for name in unknown)
        total = sum(len(roles) for roles in groups.values())
        takers = [part for part in self.catalogues if any(part in parts for _, parts in PREFIXES)]
        return (
            f"{self.file.path}: {count} of {total} keys match no layer of this checkpoint's {', '.join(takers)} "
            f"({total - count} match), the first: {', '.join(unknown[:SHOWN])}{self.seems()}"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape, a pointwise convolution's as that of a matrix."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape
