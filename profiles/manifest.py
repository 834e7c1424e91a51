"""The manifest of an artifact: what it is, what it was made from, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.profiles.errors import ArtifactError
from intaglio.profiles.spec import ComponentRecord, Range
from intaglio.profiles.strict import from_dict, to_dict

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know, deterministic for the same inputs.

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

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        ArtifactError: it is missing, not JSON, of another schema version, or has unknown keys.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
    return from_dict(Manifest, data, str(path), error=ArtifactError)
