"""The manifest of an artifact: what it is, what it was made from, and the digest of every file."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.profiles.errors import ArtifactError
from intaglio.profiles.paths import check_tree, is_inside
from intaglio.profiles.spec import ComponentRecord, Range
from intaglio.profiles.strict import from_dict, parse_json, to_dict

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
WORD = re.compile(r"\w+")  # of components and dtypes, which are parts of files' names


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know, deterministic for the same inputs; nothing in it is ever changed.

    `dtypes` are compute dtypes by target and component; `licence` is what the checkpoint says about itself.
    `settings` are the family's sampling constants (latent channels, VAE scale, defaults); `engines` names files
    that differ from build to build (TensorRT plans) and are therefore covered by SHA256SUMS alone.
    """

    schema_version: int
    family: str
    name: str
    components: dict[str, ComponentRecord]
    shapes: dict[str, Range]
    settings: dict[str, Any]
    recipe: dict[str, str]
    contract: dict[str, Any]
    dtypes: dict[str, dict[str, str]]
    licence: str | None
    provenance: dict[str, Any]
    engines: dict[str, dict[str, Any]]
    files: dict[str, FileRecord]

    def to_bytes(self) -> bytes:
        """Canonical JSON, the bytes that are written and digested."""
        return (json.dumps(to_dict(self), indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()

    @functools.cached_property  # every picture that is served names it, and there are thousands of records
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``, once the folder was seen to have plain files of its own alone.

    Raises:
        ArtifactError: it is missing, not JSON, of another schema version, has unknown keys or names what is not in the
            folder; a link, hard link, pipe or device lies there.
    """
    path = folder / MANIFEST
    check_tree(folder, ArtifactError)
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {MANIFEST}; run: intaglio build CHECKPOINT -o {folder}"
        ) from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); build the artifact again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}, this intaglio reads {SCHEMA_VERSION}; build it again"
        )
    manifest = from_dict(Manifest, data, str(path), error=ArtifactError)
    check_names(manifest, path)
    return manifest


def check_names(manifest: Manifest, path: Path) -> None:
    """Whatever becomes a part of a path is a name of something in the artifact's own folder.

    Raises:
        ArtifactError: naming the first that is not.
    """
    words = [*manifest.components, *(dtype for row in manifest.dtypes.values() for dtype in row.values())]
    wrong = [name for name in (*manifest.files, *manifest.engines) if not is_inside(name)]
    wrong += [word for word in words if not WORD.fullmatch(word)]
    if wrong:
        raise ArtifactError(
            f"{path} has the name {wrong[0][:100]!r}, allowed: names of what is in the artifact's folder"
        )
