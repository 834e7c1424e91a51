"""Where names in somebody else's files may lead: into their own folder, to plain files that nothing else shares.

The rules are those of ``onnx``'s external data (``docs/ExternalDataSecurity.md`` there), for every file of a checkpoint
and of an artifact: no way out by a name, by a link, or by a second name of the same file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from intaglio.profiles.errors import ToolError

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
SNAPSHOTS, REPOSITORY, BLOBS = "snapshots", "models--", "blobs"  # how huggingface_hub lays out its cache


def is_inside(name: object) -> bool:
    """Whether a name that a file gives is that of something in the file's own folder, on every system.

    Relative, with ``/`` between its parts, without ``..``, drive letters and characters that cannot be printed.
    """
    if not isinstance(name, str) or not name.isprintable() or any(c in name for c in "\\:"):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def link_roots(folder: Path) -> tuple[Path, ...]:
    """Where links below `folder` may lead: into it and, in a snapshot of Hugging Face's cache, to the model's blobs."""
    real = folder.resolve()
    for place in (real, *real.parents):
        if place.parent.name == SNAPSHOTS and place.parent.parent.name.startswith(REPOSITORY):
            return place, place.parent.parent / BLOBS
    return (real,)


def check_file(path: Path, error: type[ToolError], roots: Sequence[Path] = ()) -> os.stat_result:
    """Refuse what is no plain file of its own: reading it could wait for ever, or give away what lies elsewhere.

    Args:
        path: a file or folder.
        error: class to raise.
        roots: real folders a symbolic link may lead into; without any it may not be one.

    Raises:
        ToolError: a link out of `roots` or to nothing, a hard link, a pipe, socket or device.
        OSError: it cannot be looked at.
    """
    _check_link(path, error, roots)
    facts = path.stat()
    if not stat.S_ISDIR(facts.st_mode):
        check_regular(path, facts, error)
        if facts.st_nlink > 1:
            raise error(
                f"{path} is a hard link: the same file has {facts.st_nlink} names, and what is elsewhere is not read; "
                "copy the folder with cp -rL"
            )
    return facts


def check_regular(path: Path, facts: os.stat_result, error: type[ToolError]) -> None:
    """Refuse a pipe, socket, device or folder in place of a file.

    Raises:
        ToolError: it is one.
    """
    if not stat.S_ISREG(facts.st_mode):
        raise error(f"{path} is {KINDS.get(stat.S_IFMT(facts.st_mode), 'not a file')}, a plain file is expected")


def check_tree(folder: Path, error: type[ToolError], roots: Sequence[Path] = ()) -> list[Path]:
    """Every file below `folder`, after `check_file` of everything there; links to folders are followed.

    Raises:
        ToolError: naming the first entry that is refused, or that cannot be looked at.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    todo = [folder]
    while todo:
        place = todo.pop()
        real = place.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            for path in sorted(place.iterdir()):
                if not path.name.isprintable():
                    raise error(f"{str(path)!r} has a name that cannot be printed; remove it")
                (todo if stat.S_ISDIR(check_file(path, error, roots).st_mode) else found).append(path)
        except OSError as refusal:
            raise error(f"{place} cannot be read: {refusal}") from refusal
    return found


def _check_link(path: Path, error: type[ToolError], roots: Sequence[Path]) -> None:
    if not path.is_symlink():
        return
    if not roots:
        raise error(f"{path} is a symbolic link, which no runtime follows; copy the folder with cp -rL")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # nothing there, or a circle
        raise error(f"{path} is a symbolic link that leads nowhere; fetch the checkpoint again") from None
    if not any(target.is_relative_to(root) for root in roots):
        raise error(f"{path} is a symbolic link out of its folder, to {target}; if that is meant, copy it: cp -rL")
