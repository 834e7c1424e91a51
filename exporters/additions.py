"""What a build adds to a checkpoint, LoRAs, textual inversions, a tiny VAE, and how the torch reference finds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.lora import LoraFile
from intaglio.exporters.lora_files import parse_lora, read_loras
from intaglio.exporters.textual_inversion import EmbeddingFile, parse_embedding, read_embeddings
from intaglio.profiles.errors import CheckpointError

if TYPE_CHECKING:
    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.exporters.component import Component
    from intaglio.exporters.preview_vae import PreviewVae

KINDS = ("loras", "embeddings", "preview_vae")  # keys of the manifest's provenance


def with_additions(
    checkpoint: Checkpoint,
    components: Sequence[Component],
    loras: Sequence[str],
    embeddings: Sequence[str],
    preview_vae: str | None = None,
) -> Checkpoint:
    """The checkpoint with ``--lora``, ``--embedding`` and ``--preview-vae`` added to what it says and holds.

    Raises:
        ToolError: a value is not allowed, or a file does not fit the checkpoint.
    """
    added = _added(checkpoint, components, [parse_lora(t) for t in loras], [parse_embedding(t) for t in embeddings])
    return added if preview_vae is None else replace(added, preview=_open_preview_vae(preview_vae))


def _open_preview_vae(source: str) -> PreviewVae:
    from intaglio.exporters.preview_vae import open_preview_vae  # which reads checkpoints, and they read this

    return open_preview_vae(source)


def _added(
    checkpoint: Checkpoint,
    components: Sequence[Component],
    loras: Sequence[LoraFile],
    embeddings: Sequence[EmbeddingFile],
) -> Checkpoint:
    if not loras and not embeddings:
        return checkpoint
    parts = {c.source: checkpoint.weights(c.source) for c in components}
    classes = {part: checkpoint.component_class(part) for part in parts}
    return replace(
        checkpoint,
        loras=read_loras(loras, parts),
        inversions=read_embeddings(embeddings, parts, classes, checkpoint.folder),
    )


def provenance(checkpoint: Checkpoint) -> dict[str, list[dict[str, Any]]]:
    """What a manifest says of them: names and digests, no paths."""
    preview = [] if checkpoint.preview is None else [checkpoint.preview.provenance()]
    stated = (checkpoint.loras.provenance(), checkpoint.inversions.provenance(), preview)
    return {name: entries for name, entries in zip(KINDS, stated, strict=True) if entries}


def files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Digest to file or folder, to be found again."""
    known = {file.digest: file.path for file in checkpoint.loras.files}
    known |= {item.file.digest: item.file.path for item in checkpoint.inversions.items}
    return known if checkpoint.preview is None else {**known, checkpoint.preview.digest: checkpoint.preview.folder}


def found_again(
    checkpoint: Checkpoint, components: Sequence[Component], stated: Mapping[str, Any], known: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint with the additions that a manifest states.

    Args:
        checkpoint: without them.
        components: of its family.
        stated: the manifest's provenance.
        known: the index of files, digest to path.

    Raises:
        CheckpointError: a file is not where it was, or another one is there.
    """

    def place(entry: Mapping[str, Any]) -> str:
        path = known.get(entry["sha256"])
        if not isinstance(path, str) or not Path(path).exists():
            raise CheckpointError(f"the torch backend needs {entry['file']}, which is not where it was at the build")
        return path

    loras = [replace(parse_lora(place(e)), weight=e["weight"]) for e in stated.get("loras", [])]
    inversions = [replace(parse_embedding(place(e)), token=e["token"]) for e in stated.get("embeddings", [])]
    previews = [replace(_open_preview_vae(place(e)), name=e["file"]) for e in stated.get("preview_vae", [])]
    wanted = [e["sha256"] for kind in KINDS for e in stated.get(kind, [])]
    found = [(f.digest, f.path) for f in loras] + [(f.digest, f.path) for f in inversions]
    found += [(p.digest, p.folder) for p in previews]
    for digest, (now, path) in zip(wanted, found, strict=True):
        if now != digest:
            raise CheckpointError(f"{path} changed since the build; build the artifact again")
    added = _added(checkpoint, components, loras, inversions)
    return replace(added, preview=previews[0]) if previews else added
