"""What builds made, kept per user by content: the same weights, graph, recipe, shapes, tools and target are made once.

An entry is a folder of files with ``entry.json``, named by the sha256 of all that decides them. Nothing is taken on
trust: every file is hashed while it is copied into a build, and an entry that is damaged is thrown away and made again.
The entries unused for longest go first where all of them exceed `limit_bytes`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.profiles.artifact import sha256
from intaglio.profiles.cache import cache_folder
from intaglio.profiles.errors import ToolError
from intaglio.profiles.sizes import parse_bytes
from intaglio.profiles.strict import from_dict, to_dict

VARIABLE = "INTAGLIO_BUILD_CACHE"  # bytes such as 20GiB; 0: nothing is kept and nothing taken
DEFAULT = "10GiB"
LARGEST = 0.5  # of the limit an entry may be
NOTE, CHUNK, ABANDONED = "entry.json", 1 << 22, 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One result.

    Attributes:
        about: for people: component, format and target.
        facts: all that decides the files; the entry's name is its digest.
        files: sha256 by relative path.
        bytes: of the files.
        notes: what the build goes on with beside the files.
    """

    about: dict[str, str]
    facts: dict[str, Any]
    files: dict[str, str]
    bytes: int
    notes: dict[str, Any]


def entries_folder() -> Path:
    """``$XDG_CACHE_HOME/intaglio/builds``."""
    return cache_folder() / "builds"


def limit_bytes() -> int:
    """How much all entries may hold, of ``INTAGLIO_BUILD_CACHE``.

    Raises:
        UsageError: the variable is no size.
    """
    text = os.environ.get(VARIABLE, DEFAULT).strip()
    return 0 if text == "0" else parse_bytes(text, VARIABLE)


def holds(size: int) -> bool:
    """Whether an entry of `size` bytes may be kept at all."""
    return 0 < size <= LARGEST * limit_bytes()


def key_of(facts: Mapping[str, Any]) -> str:
    """The name of the entry that `facts` decide."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def take(facts: Mapping[str, Any], folder: Path) -> Entry | None:
    """Copy an entry's files into `folder` and return it; ``None`` where there is none or it is damaged."""
    if limit_bytes() == 0:
        return None
    place = entries_folder() / key_of(facts)
    entry = read_entry(place)
    if entry is None:
        return None
    if not all(_taken(place / "files" / name, folder / name, digest) for name, digest in entry.files.items()):
        for path in (folder / name for name in entry.files):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # whoever makes the files makes the folder, or has files in it
            folder.rmdir()
        shutil.rmtree(place, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(place / NOTE)
    return entry


def _taken(source: Path, target: Path, digest: str) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        return copied(source, target) == digest
    except FileNotFoundError:
        return False


def put(
    facts: Mapping[str, Any], folder: Path, names: Iterable[str], *, about: Mapping[str, str], notes: Mapping[str, Any]
) -> str:
    """Keep the files `names` of `folder`; returns why they were not kept, or nothing.

    A cache that cannot be written costs the next build its time, not this one its result.
    """
    limit, chosen = limit_bytes(), sorted(names)
    if limit == 0:
        return ""
    size = sum((folder / name).stat().st_size for name in chosen)
    if size > LARGEST * limit:
        return f"{size} bytes are more than {LARGEST:.0%} of {VARIABLE}={limit}"
    home = entries_folder()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if shutil.disk_usage(home).free < 2 * size:
            return f"{home} has less than {2 * size} bytes free"
        staged = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
        try:
            digests = {}
            for name in chosen:
                (staged / "files" / name).parent.mkdir(parents=True, exist_ok=True)
                digests[name] = copied(folder / name, staged / "files" / name)
            entry = Entry(about=dict(about), facts=dict(facts), files=digests, bytes=size, notes=dict(notes))
            (staged / NOTE).write_text(json.dumps(to_dict(entry)))
            collect(limit - size)
            with contextlib.suppress(OSError):  # somebody else made it meanwhile
                staged.rename(home / key_of(facts))
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        return str(error)
    return ""


def read_entry(place: Path) -> Entry | None:
    """What ``entry.json`` says; ``None`` where it is not there or not one."""
    try:
        entry = from_dict(Entry, json.loads((place / NOTE).read_bytes()), str(place / NOTE))
    except (OSError, ValueError, RecursionError, ToolError):
        return None
    inside = all(not Path(n).is_absolute() and ".." not in Path(n).parts for n in entry.files)
    return entry if inside and key_of(entry.facts) == place.name else None


def copied(source: Path, target: Path) -> str:
    """sha256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as read, target.open("wb") as written:
        while chunk := read.read(CHUNK):
            digest.update(chunk)
            written.write(chunk)
    return digest.hexdigest()


def entries() -> Iterator[tuple[Path, Entry | None, float]]:
    """(folder, entry, time of last use), the one unused for longest first; ``None`` where ``entry.json`` is bad."""
    found = []
    for place in entries_folder().glob("[0-9a-f]*"):
        note = place / NOTE
        found.append((place, read_entry(place), note.stat().st_mtime if note.is_file() else 0.0))
    yield from sorted(found, key=lambda row: row[2])


def collect(limit: int) -> list[Path]:
    """Remove what was unused for longest until all entries hold at most `limit` bytes; returns what went.

    What a build that was killed left half written goes, too, and entries whose ``entry.json`` is bad.
    """
    rows = list(entries())
    gone = [p for p in entries_folder().glob(".new-*") if abandoned(p)]
    gone += [place for place, entry, _ in rows if entry is None]
    total = sum(entry.bytes for _, entry, _ in rows if entry)
    for place, entry, _ in rows:
        if entry is not None and total > limit:
            gone.append(place)
            total -= entry.bytes
    for place in gone:
        shutil.rmtree(place, ignore_errors=True)
    return gone


def abandoned(staged: Path) -> bool:
    """Whether nothing was written into a staging folder for an hour."""
    try:
        latest = max(p.stat().st_mtime for p in (staged, *staged.rglob("*")))
    except OSError:
        return False
    return time.time() - latest > ABANDONED


def damaged(place: Path, entry: Entry | None) -> str:
    """What is wrong with an entry, hashing its files; nothing where it is right."""
    if entry is None:
        return f"{place / NOTE} is not one of this version's"
    for name, digest in entry.files.items():
        path = place / "files" / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != digest:
            return f"{path} was altered"
    return ""
