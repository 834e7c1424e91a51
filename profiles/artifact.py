"""An artifact on disk: opened and verified as a whole, written as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from intaglio.profiles.certificate import FOLDER as CERTIFICATE
from intaglio.profiles.certificate import Certificate, write_certificate
from intaglio.profiles.errors import ArtifactError
from intaglio.profiles.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from intaglio.profiles.verified import Verified

T = TypeVar("T")
Generation = tuple[int, int, int, int]
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"  # made of the others, so not listed with them
BUILD_LOG = "build.json"
ATTEMPTS = 20  # to read an artifact that is replaced again and again


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A folder and its manifest; `generation` tells the folder from one that took its place since it was opened."""

    folder: Path
    manifest: Manifest
    generation: Generation | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Artifact:
        """Open an artifact and, by default, check every file against ``SHA256SUMS``.

        Files that an earlier check found right and that did not change since are not hashed again.

        Raises:
            ArtifactError: a file is missing, altered, truncated or not listed; the message names it.
        """
        return whole(folder, lambda artifact: artifact, verify=verify)

    def verify(self, *, remembered: bool = False) -> int:
        """Hash every file, or with `remembered` those that changed since an earlier check; returns their number.

        Raises:
            ArtifactError: naming the first file that is missing, unlisted, or of another size or digest.
        """
        listed = read_sums(self.folder)
        present = {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if not p.is_dir()}
        for link in sorted(p for p in self.folder.rglob("*") if p.is_symlink()):
            raise ArtifactError(f"{link} is a symbolic link, which no runtime follows; copy the artifact with cp -rL")
        for name in sorted(present - listed.keys() - {SUMS, SIGNATURE}):
            raise ArtifactError(f"{self.folder / name} is not listed in {SUMS}; remove it or build the artifact again")
        for name in sorted(listed.keys() - present):
            raise ArtifactError(f"{self.folder / name} is missing; build the artifact again")
        for name in sorted(self.manifest.files.keys() - listed.keys()):
            raise ArtifactError(f"{self.folder / SUMS} does not list {name}; build the artifact again")
        verified = Verified(self.folder, format_sums(listed).encode())
        for name, digest in listed.items():
            self._check(name, digest, verified, remembered=remembered)
        verified.save()
        return len(listed)

    def _check(self, name: str, digest: str, verified: Verified, *, remembered: bool) -> None:
        path, record = self.folder / name, self.manifest.files.get(name)
        before = path.stat()
        if record is not None and before.st_size != record.size:
            raise ArtifactError(f"{path} has {before.st_size} bytes, expected {record.size}; build the artifact again")
        wrong = record is not None and record.sha256 != digest
        if not wrong and remembered and verified.holds(name, before):
            return
        if wrong or sha256(path) != digest:
            raise ArtifactError(f"{path} was altered: its sha256 is not the recorded one; build the artifact again")
        verified.note(name, before, path.stat())

    def check_current(self) -> None:
        """Refuse to read on where another build took this one's place.

        Raises:
            ArtifactError: it did, since the artifact was opened.
        """
        if self.generation not in (None, generation_of(self.folder)):
            raise ArtifactError(f"{self.folder} was replaced since it was opened; load it again")

    def component(self, name: str) -> Path:
        """The folder of one component."""
        return self.folder / name

    def size_bytes(self, *parts: str) -> int:
        """Bytes on disk of the whole artifact, or of the files whose relative path starts with one of `parts`."""
        names = read_sums(self.folder)
        return sum((self.folder / n).stat().st_size for n in names if not parts or n.startswith(parts))


def whole(
    folder: str | Path,
    make: Callable[[Artifact], T],
    *,
    verify: bool = True,
    discard: Callable[[T], None] = lambda made: None,
) -> T:
    """Open an artifact and make something of its files: all of one build, though it be replaced meanwhile.

    Args:
        folder: of the artifact.
        make: reads what it needs; what it raises counts only when the folder is still the one that was opened.
        verify: as for `Artifact.open`.
        discard: is given what was made of a folder that was replaced before all was read.

    Raises:
        ArtifactError: as for `Artifact.open`; or the folder is replaced faster than it can be read.
    """
    path = Path(folder)
    for _ in range(ATTEMPTS):
        before = generation_of(path)
        try:
            made = make(_opened(path, before, verify=verify))
        except Exception:
            if generation_of(path) == before:
                raise
            continue
        if generation_of(path) == before:
            return made
        discard(made)
    raise ArtifactError(f"{path} is replaced again and again while it is read; wait until it is built")


def _opened(path: Path, generation: Generation | None, *, verify: bool) -> Artifact:
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; run: intaglio build CHECKPOINT -o {path}")
    artifact = Artifact(folder=path, manifest=read_manifest(path), generation=generation)
    if verify:
        artifact.verify(remembered=True)
    return artifact


def generation_of(folder: Path) -> Generation | None:
    """What tells an artifact from one that took its place: the folder, its list of digests, and when that was made."""
    try:
        place = folder.stat()
        sums = (folder / SUMS).stat()
    except OSError:
        return None
    return place.st_dev, place.st_ino, sums.st_ino, sums.st_ctime_ns


def sha256(path: Path) -> str:
    """Digest of a file, read in chunks."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def seal(
    folder: Path, manifest: Manifest, build_log: dict[str, Any], certificate: Certificate | None = None
) -> Manifest:
    """Write manifest, certificate, build log and ``SHA256SUMS`` into a finished folder; returns the manifest complete.

    What lies in ``certificate/`` is no part of the manifest: the certificate names the manifest's digest, and its
    figures differ between machines.
    """
    import dataclasses

    (folder / SIGNATURE).unlink(missing_ok=True)  # of other files than these
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
