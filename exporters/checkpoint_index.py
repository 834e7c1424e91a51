"""Where checkpoints lie on this computer: digest to folder, per user and outside every artifact.

An artifact holds no absolute path. The torch engine, which is the reference, needs the checkpoint again, and finds it
by ``--checkpoint``, by an embedded name, or here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.exporters.checkpoint import EMBEDDED, Checkpoint, open_checkpoint, source_digests
from intaglio.profiles.errors import CheckpointError


def index_file() -> Path:
    """``$XDG_CACHE_HOME/intaglio/checkpoints.json``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "intaglio" / "checkpoints.json"


def digest_of(sources: Mapping[str, str]) -> str:
    """One sha256 for a checkpoint: over its files' names and digests."""
    return hashlib.sha256(json.dumps(dict(sorted(sources.items()))).encode()).hexdigest()


def _known() -> dict[str, Any]:
    try:
        known = json.loads(index_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def known_folder(digest: str) -> str | None:
    """Where a checkpoint was last seen, if something is there still."""
    folder = _known().get(digest)
    return folder if folder is not None and Path(folder).is_dir() else None


def remember(checkpoint: Checkpoint, digest: str) -> None:
    """Note where a checkpoint lies. A cache that cannot be written is no reason to fail a build."""
    file = index_file()
    try:
        known = {**_known(), digest: str(checkpoint.folder.resolve())}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, file)
    except OSError:
        return


def find_checkpoint(provenance: Mapping[str, Any], given: str = "") -> Checkpoint:
    """The checkpoint an artifact was built from, verified by digest.

    Raises:
        CheckpointError: it cannot be found, or its files changed since the build.
    """
    digest, name = provenance["digest"], provenance["checkpoint"]
    source = given or (name if name in EMBEDDED else known_folder(digest))
    if source is None:
        raise CheckpointError(f"the torch backend needs the checkpoint {name!r}; add --checkpoint FOLDER")
    checkpoint = open_checkpoint(source)
    if digest_of(source_digests(checkpoint)) != digest:
        raise CheckpointError(
            f"{checkpoint.folder} is not the checkpoint this artifact was built from, or it changed since; "
            "build the artifact again or add --checkpoint FOLDER"
        )
    return checkpoint
