"""Files of requests and of results, while the server runs.

They lie in a private folder (mode 0700) that goes when the server ends: nothing survives a restart, and a server that
is killed leaves the folder to the system's cleaning of temporary files. A file is its sender's: others, who have
another key or come from another address, are told that there is none. Where several have keys, each may hold half of
what may be kept at most, so that nobody alone leaves no room for the others.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from intaglio.runtimes.serve_errors import BadRequest, NotFound
from intaglio.runtimes.serve_limits import LIMITS, Limits


class Expiry(BaseModel):
    """When a file is to go by itself."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


@dataclass(slots=True)
class Stored:
    """One file that is kept.

    Attributes:
        users: batches that work with it, which keep it from being deleted.
        ready: whether it is whole; until then its owner is not told of it.
    """

    path: Path
    owner: str
    filename: str
    purpose: str
    size: int
    expires_at: int | None
    created_at: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    ready: bool = True

    @property
    def id(self) -> str:
        """By which clients know it."""
        return self.path.name

    def shown(self) -> dict[str, Any]:
        """OpenAI's ``file`` object."""
        facts = {"bytes": self.size, "created_at": self.created_at, "filename": self.filename, "purpose": self.purpose}
        return {"id": self.id, "object": "file", **facts, "status": "processed", "expires_at": self.expires_at}


class Store:
    """The files of all clients.

    Args:
        limits: of files and bytes.
        owners: who may hold some; 2 or more: each at most half.
    """

    def __init__(self, limits: Limits, *, owners: int = 0) -> None:
        self.limits, self.owners, self.files = limits, owners, dict[str, Stored]()
        self.arriving: list[tuple[str, int]] = []  # owner, bytes
        self.holder: tempfile.TemporaryDirectory[str] | None = None

    def new_path(self) -> Path:
        """A name in the folder, which is made for the first."""
        if self.holder is None:
            self.holder = tempfile.TemporaryDirectory(prefix="intaglio-batches-")
        return Path(self.holder.name, f"file-{uuid.uuid4().hex}")

    def sweep(self) -> None:
        """Remove what is past its time."""
        now = time.time()
        for stored in list(self.files.values()):
            if stored.expires_at is not None and stored.expires_at <= now and not stored.users:
                self.remove(stored)

    def check(self, owner: str, files: int, size: int) -> None:
        """Refuse more than there is room for, of all clients or of this one.

        Raises:
            BadRequest, TooLarge: of files, or of bytes.
        """
        self.sweep()
        held = [(stored.owner, stored.size) for stored in self.files.values()] + self.arriving
        own = [bytes_ for holder, bytes_ in held if holder == owner]
        number, total = len(held) + files, sum(bytes_ for _, bytes_ in held) + size
        self.check_share("batch_files", number, len(own) + files, "files kept, delete some: their number with this")
        self.check_share("batch_held_bytes", total, sum(own) + size, "files kept, delete some: their bytes with this")

    def check_share(self, limit: str, everybodys: int, own: int, what: str) -> None:
        """Refuse more than a limit, or than an owner's half of it.

        Raises:
            ServeError: of the limit's kind.
        """
        self.limits.check(limit, everybodys, what)
        half = -(-self.limits[limit] // 2)
        if self.owners > 1 and own > half:
            raise LIMITS[limit].error(f"{what}: {own} is more than the {half} that one of several keys may have")

    @contextlib.contextmanager
    def arrival(self, owner: str, size: int) -> Iterator[None]:
        """Keep room for a file that is being sent.

        Raises:
            BadRequest, TooLarge: there is none.
        """
        self.check(owner, 1, size)
        self.arriving.append((owner, size))
        try:
            yield
        finally:
            self.arriving.remove((owner, size))

    def add(self, path: Path, owner: str, filename: str, purpose: str, expires: Expiry | None) -> Stored:
        """Keep a file that lies at a `new_path`."""
        at = None if expires is None else int(time.time()) + expires.seconds
        stored = Stored(path, owner, filename, purpose, path.stat().st_size, at)
        self.files[stored.id] = stored
        return stored

    def begin(self, owner: str, filename: str, expires: Expiry | None) -> Stored:
        """An empty file of results, to be appended to."""
        path = self.new_path()
        path.touch()
        stored = self.add(path, owner, filename, "batch_output", expires)
        stored.ready, stored.users = False, 1
        return stored

    def append(self, stored: Stored, data: bytes) -> None:
        """Write a result.

        Raises:
            TooLarge: there is no room for it.
        """
        self.check(stored.owner, 0, len(data))
        with stored.path.open("ab") as file:
            file.write(data)
        stored.size += len(data)

    def end(self, stored: Stored) -> str | None:
        """Show a file of results to its owner; what nothing was written to goes. Its id."""
        stored.ready, stored.users = True, 0
        if not stored.size:
            self.remove(stored)
        return stored.id if stored.size else None

    def of(self, owner: str, ident: str, param: str = "file_id") -> Stored:
        """A client's file.

        Raises:
            NotFound: it has no such file.
        """
        self.sweep()
        found = self.files.get(ident)
        if found is None or found.owner != owner or not found.ready:
            raise NotFound("there is no such file", param=param)
        return found

    def remove(self, stored: Stored) -> None:
        """Delete a file.

        Raises:
            BadRequest: a batch needs it.
        """
        if stored.users:
            raise BadRequest("a batch works with this file; cancel it first", param="file_id")
        stored.path.unlink(missing_ok=True)
        del self.files[stored.id]
