"""A folder that appears whole or not at all, whatever kills the process that makes it.

Beside a target ``NAME`` lie, while it is made: ``.NAME.KEY.building`` with the unfinished folder in it,
``.NAME.building.lock``, which the maker holds, and, where the file system cannot exchange two names at once,
``.NAME.KEY.old`` for a moment. What a killed process left is taken up by the next maker with the same key, and removed
by any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from intaglio.profiles.errors import UsageError
from intaglio.profiles.manifest import MANIFEST

CONTENT = "artifact"  # in the staging folder: what becomes the target
KEY = "[0-9a-f]{16}"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
FULL = 1 << 16  # bytes
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP)


@dataclass(slots=True)
class Claim:
    """A target that nobody else may make now; see `claim`."""

    target: Path
    building: Path | None = None

    def start(self, key: str | None = None) -> Path:
        """The staging folder, whose CONTENT becomes the target.

        Args:
            key: 16 hexadecimal digits of all that decides the result. What a killed process with the same key left is
                still in the folder, what others left is gone. Without a key there is nothing to take up.

        Raises:
            UsageError: the folder cannot be written.
        """
        building = sibling(self.target, f"{key or secrets.token_hex(8)}.building")
        for path in leftovers(self.target, "building"):
            if path != building:
                remove(path)
        self.building = building
        try:
            (building / CONTENT).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.target, error) from error
        return building


@contextlib.contextmanager
def claim(target: Path, *, force: bool = False) -> Iterator[Claim]:
    """Hold `target` for one maker; where the block ends well, what it staged becomes `target`, else it vanishes.

    With `force` an existing artifact is replaced, in one step where the file system can exchange two names.

    Raises:
        UsageError: `target` has no name, exists, is a mount, is being made by another process, or its parent cannot be
            written.
        OSError: what the file system refuses in the block; a full disk by its number, where a library names none.
    """
    check_target(target, force=force)
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target, error) from error
    with locked(target):
        put_back(target)
        check_target(target, force=force)
        held = Claim(target)
        try:
            yield held
            if held.building is not None:
                check_target(target, force=force)  # what came into the way meanwhile is somebody's
                swap(held.building / CONTENT, target.absolute())
        except (OSError, RuntimeError) as error:
            if getattr(error, "errno", None) is None and is_full(target.absolute().parent):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
            raise
        finally:
            if held.building is not None:
                remove(held.building)


@contextlib.contextmanager
def writing(target: Path, *, force: bool = False, key: str | None = None) -> Iterator[Path]:
    """Give an empty folder that becomes `target` when the block ends well, and vanishes otherwise; see `claim`."""
    with claim(target, force=force) as held:
        content = held.start(key) / CONTENT
        for path in list(content.iterdir()):
            remove(path)
        yield content


def check_target(target: Path, *, force: bool) -> None:
    """Refuse an output that has no name, is not to be replaced, or cannot be.

    Raises:
        UsageError: with what to do instead.
    """
    if target.name in ("", ".."):
        raise UsageError(f"output {str(target)!r} has no name of its own; choose a folder to create")
    if not os.path.lexists(target):
        return
    if is_mount(target):
        raise busy(target)
    if not force:
        raise UsageError(f"{target} exists; choose another name or add --force to replace it")
    if not (target / MANIFEST).exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"{target} exists and is not an artifact; --force replaces artifacts only, choose another name"
        )


def unwritable(target: Path, error: OSError) -> UsageError:
    """The one line for an output that the file system refuses."""
    return UsageError(f"{target} cannot be written ({error.strerror}); choose another output folder")


def busy(target: Path) -> UsageError:
    """The one line for an output whose name nothing can take over; a rename there fails with EBUSY."""
    return UsageError(f"{target} is a mount, which no build can replace; mount its parent and name a folder in that")


def is_mount(path: Path) -> bool:
    """Whether something is mounted at `path` itself; `os.path.ismount` overlooks binds within one file system."""
    here = path.absolute().parent.resolve() / path.name
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return os.path.ismount(path)
    places = (line.split(b" ")[4] for line in lines)  # with spaces and the like in octal: proc(5)
    return os.fsencode(here) in {re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), p) for p in places}


def sibling(target: Path, ending: str) -> Path:
    """The hidden path beside `target` with this ending."""
    path = target.absolute()
    return path.with_name(f".{path.name}.{ending}")


def leftovers(target: Path, ending: str) -> list[Path]:
    """Folders of earlier makers of `target`, the youngest first."""
    path = target.absolute()
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{KEY}\.{ending}")
    found = [p for p in path.parent.iterdir() if pattern.fullmatch(p.name)]
    return sorted(found, key=lambda p: p.lstat().st_mtime_ns, reverse=True)


def put_back(target: Path) -> None:
    """Undo what was killed between two renames: the old folder goes back, unless the new one is there."""
    for old in leftovers(target, "old"):
        if os.path.lexists(target):
            remove(old)
        else:
            old.rename(target.absolute())


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, a file that is gone afterwards; the kernel frees it when its holder dies.

    Raises:
        UsageError: another process holds it, which is named; or the file cannot be written.
    """
    path = sibling(target, "building.lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise unwritable(target, error) from error
        try:
            taken = lock(descriptor)
        except OSError as error:  # some network file systems have no locks
            os.close(descriptor)
            raise unwritable(target, error) from error
        if not taken:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "of unknown number"
            os.close(descriptor)
            raise UsageError(f"{target} is being built by process {holder}; wait for it or choose another name")
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except FileNotFoundError:
            pass  # its last holder was about to remove it
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file, without waiting."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def swap(temporary: Path, target: Path) -> None:
    """Make `temporary` the folder `target`; what was there is removed.

    Readable for whom the umask allows, whatever mode libraries gave their files, and on the disk before it has the
    name.
    """
    settle(temporary)
    if not os.path.lexists(target):
        os.replace(temporary, target)
    elif not exchange(temporary, target):
        old = sibling(target, f"{secrets.token_hex(8)}.old")
        os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            os.replace(old, target)
            raise
        sync(target.parent)
        remove(old)
    sync(target.parent)
    remove(temporary)  # after an exchange this is the old folder


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (``renameat2``); says no where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def settle(folder: Path) -> None:
    """Give every file and folder the mode that `folder`'s own implies (the umask), and write all of it to the disk."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root, name)
            if not path.is_symlink():
                path.chmod(mode & 0o666)
                sync(path)
        for name in folders:
            path = Path(root, name)
            if not path.is_symlink():
                path.chmod(mode)
        sync(Path(root))


def is_full(folder: Path) -> bool:
    """Whether the disk has no room left; a write that fails for want of it fills what there was."""
    return shutil.disk_usage(folder).free < FULL


def sync(path: Path) -> None:
    """Write a file or the entries of a folder to the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # which cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; what is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
