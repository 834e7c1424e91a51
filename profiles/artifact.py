"""An artifact on disk: opened and verified as a whole, written as a whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.profiles.certificate import FOLDER as CERTIFICATE
from intaglio.profiles.certificate import Certificate, write_certificate
from intaglio.profiles.errors import ArtifactError, UsageError
from intaglio.profiles.manifest import MANIFEST, FileRecord, Manifest, read_manifest

SUMS = "SHA256SUMS"
BUILD_LOG = "build.json"
CHUNK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A folder and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Artifact:
        """Open an artifact and, by default, hash every file against ``SHA256SUMS``.

        Raises:
            ArtifactError: a file is missing, altered, truncated or not listed; the message names it.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ArtifactError(f"{path} is not a folder; run: intaglio build CHECKPOINT -o {path}")
        artifact = cls(folder=path, manifest=read_manifest(path))
        if verify:
            artifact.verify()
        return artifact

    def verify(self) -> int:
        """Hash every file; returns their number.

        Raises:
            ArtifactError: naming the first file that is missing, unlisted, or of another size or digest.
        """
        listed = read_sums(self.folder)
        present = {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if not p.is_dir()}
        for link in sorted(p for p in self.folder.rglob("*") if p.is_symlink()):
            raise ArtifactError(f"{link} is a symbolic link, which no runtime follows; copy the artifact with cp -rL")
        for name in sorted(present - listed.keys() - {SUMS}):
            raise ArtifactError(f"{self.folder / name} is not listed in {SUMS}; remove it or build the artifact again")
        for name in sorted(listed.keys() - present):
            raise ArtifactError(f"{self.folder / name} is missing; build the artifact again")
        for name in sorted(self.manifest.files.keys() - listed.keys()):
            raise ArtifactError(f"{self.folder / SUMS} does not list {name}; build the artifact again")
        for name, digest in listed.items():
            self._check(name, digest)
        return len(listed)

    def _check(self, name: str, digest: str) -> None:
        path, record = self.folder / name, self.manifest.files.get(name)
        size = path.stat().st_size
        if record is not None and size != record.size:
            raise ArtifactError(f"{path} has {size} bytes, expected {record.size}; build the artifact again")
        if sha256(path) != digest or (record is not None and record.sha256 != digest):
            raise ArtifactError(f"{path} was altered: its sha256 is not the recorded one; build the artifact again")

    def component(self, name: str) -> Path:
        """The folder of one component."""
        return self.folder / name

    def size_bytes(self, *parts: str) -> int:
        """Bytes on disk of the whole artifact, or of the files whose relative path starts with one of `parts`."""
        names = read_sums(self.folder)
        return sum((self.folder / n).stat().st_size for n in names if not parts or n.startswith(parts))


def sha256(path: Path) -> str:
    """Digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """``SHA256SUMS`` as relative path to digest.

    Raises:
        ArtifactError: it is missing or malformed.
    """
    path = folder / SUMS
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read; build the artifact again") from error
    sums = {}
    for line in text.removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise ArtifactError(f"{path} has a malformed line {line!r}; build the artifact again")
        sums[name] = digest
    if text != format_sums(sums):
        raise ArtifactError(f"{path} was altered; build the artifact again")
    return sums


def format_sums(sums: Mapping[str, str]) -> str:
    """The one way ``SHA256SUMS`` is written: sorted, as ``sha256sum -c`` reads it."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


@contextlib.contextmanager
def writing(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a sibling temporary folder that becomes `target` when the block ends well, and vanishes otherwise.

    With `force` an existing folder is replaced by one rename.

    Raises:
        UsageError: `target` has no name, exists, or its parent cannot be written.
    """
    if target.name in ("", ".."):
        raise UsageError(f"output {str(target)!r} has no name of its own; choose a folder to create")
    if target.exists() and not force:
        raise UsageError(f"{target} exists; choose another name or add --force to replace it")
    if target.exists() and not (target / MANIFEST).exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"{target} exists and is not an artifact; --force replaces artifacts only, choose another name"
        )
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another output folder") from error
    try:
        yield temporary
        swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when the rename succeeded


def swap(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, moving an existing folder out of the way first."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def seal(
    folder: Path, manifest: Manifest, build_log: dict[str, Any], certificate: Certificate | None = None
) -> Manifest:
    """Write manifest, certificate, build log and ``SHA256SUMS`` into a finished folder; returns the manifest complete.

    What lies in ``certificate/`` is no part of the manifest: the certificate names the manifest's digest, and its
    figures differ between machines.
    """
    import dataclasses

    sums = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    apart = {*manifest.engines, *(n for n in sums if n.startswith(f"{CERTIFICATE}/"))}
    files = {n: FileRecord(size=(folder / n).stat().st_size, sha256=d) for n, d in sums.items() if n not in apart}
    sealed = dataclasses.replace(manifest, files=files)
    (folder / MANIFEST).write_bytes(sealed.to_bytes())
    (folder / BUILD_LOG).write_text(json.dumps(build_log, indent=1) + "\n", encoding="utf-8")
    written = [folder / BUILD_LOG, folder / MANIFEST]
    if certificate is not None:
        written.append(write_certificate(folder, dataclasses.replace(certificate, manifest=sealed.digest)))
    sums.update({p.relative_to(folder).as_posix(): sha256(p) for p in written})
    (folder / SUMS).write_bytes(format_sums(sums).encode())
    return sealed
