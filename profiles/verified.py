"""Artifacts that were verified: what is still the same file, by inode and times, is not hashed again.

Kept per user and outside every artifact. A record that cannot be read or written costs time and nothing else, and one
that somebody else could have written is not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from intaglio.profiles.cache import cache_folder

RACY_NS = 2_000_000_000  # a younger file may change again within what its file system's clock can tell apart
KEPT = 256  # artifacts; the ones recorded longest ago go first


def record_file() -> Path:
    """``$XDG_CACHE_HOME/intaglio/verified.json``."""
    return cache_folder() / "verified.json"


def identity(status: os.stat_result) -> list[int]:
    """Device, inode, bytes, and nanoseconds of the last change of content and of status."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class Verified:
    """What is known of the files of one artifact, and what a check adds to it.

    Args:
        folder: of the artifact.
        sums: the bytes of its list of digests; what was recorded under another list is not believed.
    """

    def __init__(self, folder: Path, sums: bytes) -> None:
        self.place, self.sums = str(folder.resolve()), hashlib.sha256(sums).hexdigest()
        entry = _known().get(self.place)
        held = entry.get("files") if isinstance(entry, dict) and entry.get("sums") == self.sums else None
        self._known: dict[str, Any] = held if isinstance(held, dict) else {}
        self._files: dict[str, list[int]] = {}

    def holds(self, name: str, status: os.stat_result) -> bool:
        """Whether the file is the one that was hashed before."""
        same: bool = self._known.get(name) == identity(status)
        if same:
            self._files[name] = identity(status)
        return same

    def note(self, name: str, before: os.stat_result, after: os.stat_result) -> None:
        """Remember a file whose digest was right; `before` and `after` it was hashed."""
        changed = max(before.st_mtime_ns, before.st_ctime_ns)
        if identity(before) == identity(after) and time.time_ns() - changed >= RACY_NS:
            self._files[name] = identity(after)

    def save(self) -> None:
        """Write what is known now, unless it was written before."""
        if self._files != self._known:
            _write(self.place, {"sums": self.sums, "files": self._files})


def _known() -> dict[str, Any]:
    file = record_file()
    try:
        if not (_ours(file) and _ours(file.parent)):
            return {}
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _ours(path: Path) -> bool:
    if sys.platform == "win32":
        return True  # the access list of the user's own folder says so, not the mode
    status = path.stat()
    return not status.st_mode & 0o022 and status.st_uid == os.geteuid()


def _write(place: str, entry: dict[str, Any]) -> None:
    file = record_file()
    try:
        known = {p: e for p, e in _known().items() if p != place and Path(p).is_dir()}
        known = dict([*known.items(), (place, entry)][-KEPT:])
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(known, stream)
        os.replace(temporary, file)
    except OSError:
        return
