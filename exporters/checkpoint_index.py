"""Where checkpoints lie on this computer: digest to place, per user and outside every artifact.

An artifact holds no absolute path. The torch engine, which is the reference, needs the checkpoint again, and finds it
by ``--checkpoint``, by an embedded name, or here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from intaglio.exporters.additions import KINDS, found_again
from intaglio.exporters.checkpoint import EMBEDDED, Checkpoint, open_checkpoint, source_digests
from intaglio.exporters.component import family_of
from intaglio.exporters.hub import cached_folder, is_repository
from intaglio.profiles.cache import cache_folder
from intaglio.profiles.errors import CheckpointError


def index_file() -> Path:
    """``$XDG_CACHE_HOME/intaglio/checkpoints.json``."""
    return cache_folder() / "checkpoints.json"


def digest_of(sources: Mapping[str, str]) -> str:
    """One sha256 for a checkpoint: over its files' names and digests."""
    return hashlib.sha256(json.dumps(dict(sorted(sources.items()))).encode()).hexdigest()


def _known() -> dict[str, Any]:
    try:
        known = json.loads(index_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def known_place(digest: str) -> tuple[str | None, str | None]:
    """Where a checkpoint was last seen, if something is there still, and the ``--config`` it was opened with."""
    entry = _known().get(digest)
    place, config = entry if isinstance(entry, list) and len(entry) == 2 else (entry, None)
    return (place if isinstance(place, str) and Path(place).exists() else None), config


def remember(checkpoint: Checkpoint, digest: str) -> None:
    """Note where a checkpoint lies. A cache that cannot be written is no reason to fail a build."""
    _write({digest: _place(checkpoint)})


def _write(entries: Mapping[str, Any]) -> None:
    file = index_file()
    try:
        known = {**_known(), **entries}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, file)
    except OSError:
        return


def remember_files(files: Mapping[str, Path]) -> None:
    """Note where LoRAs, textual inversions and tiny VAEs lie, by digest."""
    _write({digest: str(path.absolute()) for digest, path in files.items()})


def _place(checkpoint: Checkpoint) -> str | list[str]:
    location, single = str(checkpoint.location.absolute()), checkpoint.single
    return location if single is None or single.bundled else [location, str(single.configuration.absolute())]


def find_checkpoint(provenance: Mapping[str, Any], given: str = "") -> Checkpoint:
    """The checkpoint an artifact was built from, verified by digest.

    Raises:
        CheckpointError: it cannot be found, or its files changed since the build.
    """
    digest, name = provenance["digest"], provenance["checkpoint"]
    place, config = known_place(digest)
    source = given or (name if name in EMBEDDED else place or _cached(name))
    if source is None:
        raise CheckpointError(f"the torch backend needs the checkpoint {name!r}; add --checkpoint FOLDER or FILE")
    own = {key: value for key, value in provenance["options"].items() if key.startswith("checkpoint.")}
    checkpoint = open_checkpoint(source, config=config if Path(source).is_file() else None, options=own)
    if digest_of(source_digests(checkpoint)) != digest:
        raise CheckpointError(
            f"{checkpoint.location} is not the checkpoint this artifact was built from, or it changed since; "
            "build the artifact again or add --checkpoint FOLDER"
        )
    checkpoint = replace(checkpoint, options=family_options(provenance["options"], provenance["family"]))
    if not any(provenance.get(kind) for kind in KINDS):
        return checkpoint
    exporter, _ = family_of(checkpoint)
    return found_again(checkpoint, exporter.components(checkpoint), provenance, _known())


def _cached(name: str) -> str | None:
    """`name` where Hugging Face's cache has it."""
    try:
        return name if is_repository(name) and cached_folder(name) else None
    except CheckpointError:
        return None


def family_options(options: Mapping[str, str], family: str) -> dict[str, str]:
    """The ``--set`` values of the family, without its name."""
    return {k.partition(".")[2]: v for k, v in options.items() if k.partition(".")[0] == family}
