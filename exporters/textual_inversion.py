"""Textual inversions built in: learned vectors as new tokens of CLIP text encoders.

Gal et al., "An Image is Worth One Word" (https://arxiv.org/abs/2208.01618). A trigger word becomes one token for each
of its vectors; the rows go behind the token embedding and the trigger into ``tokenizer.json``, so neither the graph's
capture nor the runtime knows about them. Ids and vectors are those of diffusers' ``load_textual_inversion``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.exporters.lora_files import FLOATS, check_safetensors, split_suffix
from intaglio.exporters.textual_inversion_tokens import check_token, extend_tokenizer
from intaglio.exporters.weights import Parameter, Weights, read_header
from intaglio.profiles.artifact import sha256
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
POOLED = "text_encoder_2"  # the one whose pooled state a pipeline uses: Stable Diffusion XL's
TOKEN_EMBEDDING = "embeddings.token_embedding.weight"  # how its name ends in CLIPTextModel, of transformers 4 and 5
CLIP_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
# Names that stand for a text encoder and not for the trigger: of Stable Diffusion XL's inversions, and those of
# diffusers' pivotal tuning.
ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
NAMELESS = "emb_params"  # stable-diffusion-webui's, whose trigger is the file's name
LEGACY_END = 2  # an eos_token_id that makes transformers take the largest id for the end of the text


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingFile:
    """A textual inversion as the user gave it: the file, the trigger if one was given, and the file's sha256."""

    path: Path
    token: str | None
    digest: str


def parse_embedding(text: str) -> EmbeddingFile:
    """``PATH[:TOKEN]``. A path may have colons.

    Raises:
        UsageError: there is no such file, or the token is empty.
        CheckpointError: the file is a pickle, or not safetensors.
    """
    path, token = split_suffix(text, "--embedding", "TOKEN")
    if token is not None and not token.strip():
        raise UsageError(f"--embedding {text}: the token is empty; for example --embedding {path}:<cat-toy>")
    check_safetensors(path, "--embedding")
    return EmbeddingFile(path=path, token=token, digest=sha256(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inversion:
    """A textual inversion that fits a checkpoint: its trigger and, by text encoder, its vectors [n, D] or [D]."""

    file: EmbeddingFile
    token: str
    vectors: Mapping[str, Parameter]

    @property
    def count(self) -> int:
        """Number of vectors; as many in every text encoder."""
        return row_count([next(iter(self.vectors.values()))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Inversions:
    """All of them, in order."""

    items: tuple[Inversion, ...] = ()

    def apply(self, part: str, weights: Weights) -> Weights:
        """See `extend_weights`."""
        return extend_weights(weights, self.rows(part))

    def config(self, part: str, config: dict[str, Any]) -> dict[str, Any]:
        """See `changed_config`."""
        return changed_config(config, self.rows(part))

    def rows(self, part: str) -> tuple[Parameter, ...]:
        """The vectors that a text encoder gets, in the order of their ids; none for other parts."""
        return tuple(item.vectors[part] for item in self.items if part in item.vectors)

    def extend_model(self, part: str, model: Any) -> None:
        """See `extend_model`."""
        extend_model(model, self.rows(part))

    def extend_tokenizers(self, folder: Path) -> None:
        """Add the tokens to the tokenizers of an artifact that is being written.

        Raises:
            CheckpointError: see `extend_tokenizer`.
        """
        for part, tokenizer in TOKENIZERS.items():
            if self.rows(part):
                extend_tokenizer(folder / tokenizer, {item.token: item.count for item in self.items})

    def remarks(self, configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What the user should know; `configs` are the components' configurations."""
        if not self.rows(POOLED) or configs[POOLED].get("eos_token_id") != LEGACY_END:
            return []
        return [
            f"{POOLED} takes its pooled state at the largest id (eos_token_id {LEGACY_END} in its config.json), "
            "which is an added token where a prompt has one, as in diffusers"
        ]

    def provenance(self) -> list[dict[str, Any]]:
        """Name, digest, trigger and number of vectors of each file."""
        return [
            {"file": i.file.path.name, "sha256": i.file.digest, "token": i.token, "vectors": i.count}
            for i in self.items
        ]


def read_embeddings(
    files: Sequence[EmbeddingFile], parts: Mapping[str, Weights], classes: Mapping[str, str | None], folder: Path
) -> Inversions:
    """Find out which vectors of each file are for which text encoder.

    Args:
        files: in the order of their ids.
        parts: the stored weights of every component that is built.
        classes: their classes.
        folder: the checkpoint's, with its tokenizers.

    Raises:
        CheckpointError: of another model, with tensors that mean nothing, or with a trigger that is taken.
        Unsupported: the checkpoint has other text encoders than CLIP's, or the vectors are of another dtype.
    """
    encoders = [part for part in parts if part.startswith("text_encoder")]
    others = [f"{part} ({classes[part]})" for part in encoders if classes[part] not in CLIP_CLASSES]
    if files and (others or not encoders):
        raise Unsupported(f"--embedding needs CLIP text encoders alone; this checkpoint has {', '.join(others)}")
    taken: list[str] = []
    items = []
    for file in files:
        token, vectors = _vectors(file, encoders)
        for part, tensor in vectors.items():
            rows, width = parts[part][_embedding_name(parts[part])].shape
            if tensor.shape[-1] != width:
                raise CheckpointError(
                    f"{file.path}: {tensor.key} is {tensor.shape[-1]} wide, {part} takes {width}; "
                    "the embedding is for another model"
                )
            check_token(token, str(file.path), folder / TOKENIZERS[part], rows, taken)
        item = Inversion(file=file, token=token, vectors=vectors)
        if len({row_count([tensor]) for tensor in vectors.values()}) > 1:
            raise CheckpointError(f"{file.path} has different numbers of vectors for {' and '.join(vectors)}")
        taken.append(token)
        items.append(item)
    return Inversions(items=tuple(items))


def _vectors(file: EmbeddingFile, encoders: Sequence[str]) -> tuple[str, dict[str, Parameter]]:
    header = read_header(file.path)
    tensors = {k: Parameter(file=file.path, key=k, dtype=d, shape=s) for k, (d, s) in header.items()}
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise Unsupported(f"{file.path}: {key} is {tensor.dtype}; allowed: {', '.join(FLOATS)}")
        if len(tensor.shape) not in (1, 2) or not all(tensor.shape):
            raise CheckpointError(f"{file.path}: {key} has shape {list(tensor.shape)}, a textual inversion [n, width]")
    named = {ENCODERS[key]: tensor for key, tensor in tensors.items() if key in ENCODERS}
    if named and len(named) == len(tensors):
        missing = [part for part in encoders if part not in named]
        extra = [part for part in named if part not in encoders]
        if missing or extra:
            what = f"has no vectors for {missing[0]}" if missing else f"has vectors for {extra[0]}, which is not there"
            raise CheckpointError(f"{file.path} {what}; the embedding is for another model ({', '.join(header)})")
        return file.token or file.path.stem, {part: named[part] for part in encoders}
    if len(tensors) != 1:
        first = ", ".join(sorted(header)[:3])
        raise CheckpointError(
            f"{file.path} is no textual inversion ({first}); allowed: one tensor, or {' and '.join(list(ENCODERS)[:2])}"
        )
    if len(encoders) > 1:
        raise CheckpointError(
            f"{file.path} has vectors for one text encoder, the checkpoint has {' and '.join(encoders)}; "
            "it is for another model"
        )
    key, tensor = next(iter(tensors.items()))
    return file.token or (file.path.stem if key == NAMELESS else key), {encoders[0]: tensor}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendedParameter(Parameter):
    """A token embedding with vectors behind it; `shape` counts them."""

    rows: tuple[Parameter, ...]

    def read(self) -> np.ndarray:
        """All rows in the checkpoint's dtype."""
        stored = Parameter.read(self)
        return np.concatenate([stored, *(np.atleast_2d(r.read()).astype(stored.dtype) for r in self.rows)])


def _embedding_name(weights: Weights) -> str:
    return next(name for name in weights if name.endswith(TOKEN_EMBEDDING))


def row_count(rows: Sequence[Parameter]) -> int:
    """Number of vectors in tensors [n, D] and [D]."""
    return sum(r.shape[0] if len(r.shape) == 2 else 1 for r in rows)


def extend_weights(weights: Weights, rows: Sequence[Parameter]) -> Weights:
    """The same parameters, the token embedding with `rows` behind it when it is read."""
    if not rows:
        return weights
    entries, name = dict(weights), _embedding_name(weights)
    p = entries[name]
    shape = (p.shape[0] + row_count(rows), *p.shape[1:])
    entries[name] = ExtendedParameter(file=p.file, key=p.key, dtype=p.dtype, shape=shape, view=p.view, rows=tuple(rows))
    extended = Weights.of(weights.files[0], entries)
    extended.files = weights.files
    return extended


def changed_config(config: dict[str, Any], rows: Sequence[Parameter]) -> dict[str, Any]:
    """A text encoder's ``config.json`` with a vocabulary that is larger by `rows`."""
    changed = copy.copy(config)  # it may know its file
    if rows:
        changed["vocab_size"] += row_count(rows)
    return changed


def extend_model(model: Any, rows: Sequence[Parameter]) -> None:
    """The same for a text encoder that transformers loaded: its own resizing, then the vectors."""
    import torch

    if not rows:
        return
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(before + row_count(rows), mean_resizing=False)
    weight = model.get_input_embeddings().weight
    values = np.concatenate([np.atleast_2d(r.read()).astype(np.float32) for r in rows])
    with torch.no_grad():
        weight[before:] = torch.from_numpy(values).to(weight.dtype)
