"""Signatures of artifacts in OpenSSF's model-signing format, with an elliptic-curve key and without the network.

``model.sig`` is a Sigstore bundle over an in-toto statement that holds the path and sha256 of every file of the
artifact (github.com/ossf/model-signing-spec). Key and bundle are handled by ``model_signing``, whose own command reads
what is written here and writes what is read here. The digests are those of ``SHA256SUMS`` and of that file itself: what
`Artifact.verify` has hashed is not hashed again, and a signature that leaves out a file is not one of the artifact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from intaglio.profiles.artifact import SIGNATURE, SUMS, Artifact, format_sums, read_sums
from intaglio.profiles.errors import ArtifactError, UsageError
from intaglio.profiles.registry import need
from intaglio.profiles.staging import sibling

if TYPE_CHECKING:
    from model_signing.hashing import Config

EXTRA = "sign"
SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
CURVES = "an elliptic-curve key (P-256, P-384 or P-521) in PEM"
MOST_BYTES = 64 << 20  # of a signature: some 150 bytes a file; what is larger is none and is not read
REASON = 300  # characters of the library's words that fit a line


def sign(artifact: Artifact, private_key: Path, *, password: bytes | None = None, force: bool = False) -> Path:
    """Check every file by its digest, then write ``model.sig``, whole or not at all; returns where it is.

    Args:
        artifact: opened; it is refused if another build takes its place meanwhile.
        private_key: a PEM file.
        password: of the key, where it has one.
        force: replace a signature that is there.

    Raises:
        ArtifactError: a file is not what the artifact says.
        UsageError: it is signed already; the key or its password is wrong; the folder cannot be written.
        MissingDependency: model_signing is not installed.
    """
    target = artifact.folder / SIGNATURE
    if target.exists() and not force:
        raise UsageError(f"{target} exists; add --force to replace it")
    signing = need("model_signing", extra=EXTRA).signing
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key, password=password)
    except OSError as error:
        raise UsageError(f"--private-key {private_key} cannot be read ({error.strerror}); name {CURVES}") from error
    except Exception as error:  # cryptography has no common class for what is wrong with a key
        raise UsageError(f"--private-key {private_key} cannot be used ({words(error)}); name {CURVES}") from error
    artifact.verify()
    signer.set_hashing_config(listed(read_sums(artifact.folder)))
    # Not in the artifact: until it has its name it would be a file that nobody listed.
    temporary = sibling(artifact.folder, f"{secrets.token_hex(8)}.signing")
    try:
        signer.sign(artifact.folder, temporary)
        artifact.check_current()
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); sign a copy of the artifact") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def check_signature(folder: Path, public_key: Path, sums: Mapping[str, str] | None = None) -> None:
    """Check that the owner of a key signed the artifact: every line of ``SHA256SUMS``, and that file.

    Whether the files are what ``SHA256SUMS`` says is for `Artifact.verify` to find.

    Args:
        folder: of the artifact.
        public_key: a PEM file.
        sums: of ``SHA256SUMS``, where it was read already.

    Raises:
        ArtifactError: there is no signature, it cannot be read, or it is of another key or of other files.
        UsageError: the key cannot be used.
        MissingDependency: model_signing is not installed.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {SIGNATURE}; run: intaglio sign {folder} --private-key KEY.pem")
    if path.stat().st_size > MOST_BYTES:
        raise ArtifactError(f"{path} {unreadable(f'more than {MOST_BYTES} bytes', folder)}")
    verifying = need("model_signing", extra=EXTRA).verifying
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except OSError as error:
        raise UsageError(f"public key {public_key} cannot be read ({error.strerror}); name {CURVES}") from error
    except Exception as error:  # see `sign`
        raise UsageError(f"public key {public_key} cannot be used ({words(error)}); name {CURVES}") from error
    verifier.set_hashing_config(listed(read_sums(folder) if sums is None else sums))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the library prints its remark on older signatures
            verifier.verify(folder, path)
    except Exception as error:  # a foreign file: what its parsers raise has no common class
        raise ArtifactError(f"{path} {fault(error, folder, public_key)}") from error


def fault(error: Exception, folder: Path, public_key: Path) -> str:
    """What is wrong with a signature, and the way on."""
    from cryptography.exceptions import InvalidSignature

    text = words(error)
    if isinstance(error, InvalidSignature) or text.startswith("Key mismatch"):
        return (
            f"was not made with the key of {public_key}; "
            f"run: intaglio verify {folder} --public-key KEY.pem with the signer's"
        )
    if text.startswith("Signature mismatch"):
        first = text.partition(": ")[2].partition(": Expected")[0].translate(str.maketrans("", "", "[]\\'\""))
        return f"is of other files than these ({first}); {again(folder)}"
    return unreadable(text, folder)


def unreadable(reason: str, folder: Path) -> str:
    """The words for a file that is no signature."""
    return f"cannot be read as a signature ({reason}); {again(folder)}"


def again(folder: Path) -> str:
    """The way on where a signature is of no use."""
    return f"get the artifact again, or run: intaglio sign {folder} --private-key KEY.pem --force"


def listed(sums: Mapping[str, str]) -> Config:
    """How ``model_signing`` is to digest an artifact: by the lines of ``SHA256SUMS`` and the digest of that file.

    Neither what a signature says of its own making nor the library's defaults (``.git``) leave out a file.
    """
    from model_signing import hashing, manifest

    digests = {**sums, SUMS: hashlib.sha256(format_sums(sums).encode()).hexdigest()}

    class Listed(hashing.Config):
        def hash(self, model_path: Path, *, files_to_hash: Any = None) -> manifest.Manifest:
            # One file is digested for the sake of the class of digests, which has no public name.
            one = hashing.Config().hash(model_path, files_to_hash=[Path(model_path) / SUMS])
            (pattern,) = (descriptor.digest for descriptor in one.resource_descriptors())
            items = [
                manifest.FileManifestItem(
                    path=PurePosixPath(name), digest=dataclasses.replace(pattern, digest_value=bytes.fromhex(digest))
                )
                for name, digest in digests.items()
            ]
            return manifest.Manifest(one.model_name, items, manifest.SerializationType.from_args(SERIALIZATION))

    return Listed()


def words(error: Exception) -> str:
    """A library's message on one line of bounded length, or the name of its class."""
    return textwrap.shorten(str(error), REASON, placeholder=" …") or type(error).__name__
