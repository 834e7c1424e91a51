"""Whose native code is run: engines that this host built for this user, or that the owner of an accepted key signed.

"Deserializing an engine from an untrusted source is equivalent to running untrusted native code on the GPU and host"
(docs.nvidia.com/deeplearning/tensorrt/latest/reference/security.html), and ``IRuntime::getEngineValidity`` is no help
against tampering. So nothing of a plan is given to TensorRT before one of the two is established.

Accepted keys are ``$XDG_CONFIG_HOME/intaglio/keys/*.pem``. What was built here is recorded as empty files
``$XDG_STATE_HOME/intaglio/built/HOST/SHA256``: two builds at once cannot lose each other's, and nothing is parsed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from intaglio.profiles.artifact import SIGNATURE, SUMS, Artifact, read_sums, sha256
from intaglio.profiles.cache import config_folder, state_folder
from intaglio.profiles.errors import ArtifactError, UsageError
from intaglio.profiles.manifest import MANIFEST
from intaglio.profiles.signing import check_signature

# systemd's id of an installation, D-Bus's, and, where containers have neither, the kernel's of this boot: a record
# kept under that is forgotten with the boot, and an engine has to be built again or signed.
MACHINE = ("/etc/machine-id", "/var/lib/dbus/machine-id", "/proc/sys/kernel/random/boot_id")
DIGEST = re.compile("[0-9a-f]{64}")  # a list of digests is the artifact's, and this becomes the name of a file


def keys_folder() -> Path:
    """``$XDG_CONFIG_HOME/intaglio/keys``, or ``~/.config/intaglio/keys``; it may not exist."""
    return config_folder() / "keys"


def accepted_keys() -> list[Path]:
    """The public keys whose owners' engines this user runs.

    Raises:
        UsageError: somebody else can change them.
    """
    keys = sorted(keys_folder().glob("*.pem"))
    for path in [keys_folder(), *keys] if keys else ():
        refuse_shared(path)
    return keys


def host() -> str | None:
    """Which machine and user this is, as 64 hexadecimal digits; ``None`` where the system does not tell.

    A machine's id is not to be shown to others (man machine-id), so it is the key of a digest and is not recorded.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else os.environ.get("USERNAME", "")
    for path in MACHINE:
        try:
            machine = Path(path).read_bytes().strip()
        except OSError:
            continue
        if machine not in (b"", b"uninitialized"):
            return hmac.digest(machine, f"intaglio built engines {user}".encode(), "sha256").hex()
    return None


def built_folder() -> Path | None:
    """Where this host's engines are recorded for this user; a copy of it on another machine has another's name."""
    name = host()
    return None if name is None else state_folder() / "built" / name


def remember_engines(folder: Path, engines: Iterable[str]) -> list[str]:
    """Record that this host built the engine files `engines` of `folder`; returns remarks on what could not be kept."""
    names = list(engines)
    if not names:
        return []
    place, failure = built_folder(), "this system has no machine id"
    if place is not None:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in names:
                os.close(os.open(place / sha256(folder / name), os.O_WRONLY | os.O_CREAT, 0o600))
        except OSError as error:
            failure = f"{place} cannot be written ({error.strerror})"
        else:
            return []
    return [f"the engines are not recorded as built here: {failure}; they load when the artifact is signed"]


def built_here(digest: str) -> bool:
    """Whether this host built the engine with this sha256 for this user.

    Raises:
        UsageError: it is recorded where somebody else could have written it.
    """
    place = built_folder()
    if place is None or not DIGEST.fullmatch(digest) or not (place / digest).is_file():
        return False
    refuse_shared(place)
    return True


def check_engines(artifact: Artifact, names: Iterable[str], public_key: str | None = None) -> dict[str, str]:
    """Establish that the engine files may be run; returns the sha256 that each must have when it is read.

    An artifact that is still being built has no ``SHA256SUMS``; its engines are hashed.

    Args:
        artifact: whose manifest speaks of the engines.
        names: their paths in it.
        public_key: a PEM file to accept instead of `accepted_keys`.

    Raises:
        ArtifactError: neither did this host build them nor did the owner of an accepted key sign the artifact.
        UsageError: a key cannot be used, or somebody else can change keys or record.
        MissingDependency: model_signing is needed and not installed.
    """
    folder = artifact.folder
    sums = read_sums(folder) if (folder / SUMS).exists() else {}
    digests = {name: sums.get(name) or sha256(folder / name) for name in names}
    foreign = [name for name, digest in digests.items() if not built_here(digest)]
    if foreign:
        reason = unsigned(artifact, sums, foreign, public_key)
        if reason:
            raise ArtifactError(
                f"{folder / foreign[0]} is native code and is not loaded: this host did not build it, and {reason}; "
                f"run: intaglio sign {folder} --private-key KEY.pem where you trust it, and put the public key into "
                f"{keys_folder()}; or build the artifact here"
            )
    return digests


def unsigned(artifact: Artifact, sums: dict[str, str], names: Iterable[str], public_key: str | None) -> str:
    """Why no accepted key's owner signed these files and what the manifest says of them, or an empty string."""
    if not (artifact.folder / SIGNATURE).is_file():
        return f"the artifact has no {SIGNATURE}"
    keys = accepted_keys() if public_key is None else [Path(public_key)]
    if not keys:
        return "no key is accepted"
    missing = [name for name in names if name not in sums]
    if missing:
        return f"{SUMS} does not list it"
    if sums.get(MANIFEST) != artifact.manifest.digest:
        return f"{MANIFEST} is not the one that {SUMS} lists"
    reasons = []
    for key in keys:
        try:
            check_signature(artifact.folder, key, sums)
        except ArtifactError as error:
            reasons.append(str(error).partition("; ")[0])
        else:
            return ""
    return ", and ".join(dict.fromkeys(reasons))


def read_engine(path: Path, digest: str) -> bytes:
    """The bytes of an engine, which are the ones that `check_engines` speaks of.

    Raises:
        ArtifactError: the file was changed since, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); build the artifact again") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactError(f"{path} was altered: its sha256 is not the recorded one; build the artifact again")
    return data


def refuse_shared(path: Path) -> None:
    """Refuse to believe what others than this user and root can write.

    Raises:
        UsageError: with the command that closes it.
    """
    if sys.platform == "win32":
        return  # the access list of the user's own folder says so, not the mode
    status = path.stat()
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise UsageError(
            f"{path} decides which native code runs, and others can change it; own it and run: chmod go-w {path}"
        )
