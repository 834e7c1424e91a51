"""API keys: the file they are in, and whose a request's is."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from intaglio.profiles.errors import UsageError

SHORTEST_KEY = 16


def read_keys(file: str | Path) -> dict[str, str]:
    """The keys of a file, with the names of their owners.

    Its lines are ``NAME:KEY`` or ``KEY``; empty ones and those that begin with ``#`` do not count.

    Raises:
        UsageError: the file cannot be read, has no key, or one that is short or not of printable ASCII characters.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file} cannot be read; name a text file with a key a line") from error
    found = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, key = text.rpartition(":")
        if len(key) < SHORTEST_KEY:
            raise UsageError(
                f"--api-key-file {file}, line {number}: a key of {len(key)} characters; allowed: {SHORTEST_KEY} or more"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(f"--api-key-file {file}, line {number}: a key has ASCII characters only, and no spaces")
        found[key] = name if colon else f"key {number}"
    if not found:
        raise UsageError(f"--api-key-file {file} has no key; write one a line")
    return found


class Keys:
    """The keys of a file, kept as digests; each has a name, by which its owner's turns are counted.

    Raises:
        UsageError: see `read_keys`.
    """

    def __init__(self, file: str | Path | None) -> None:
        keys = {} if file is None else read_keys(file)
        self.names = {hashlib.sha256(key.encode()).digest(): name for key, name in keys.items()}

    def __len__(self) -> int:
        """How many owners there are."""
        return len(set(self.names.values()))

    def owner(self, authorization: str) -> str | None:
        """Whose key an ``Authorization`` header has: ``Bearer KEY``, or ``Basic`` with the key as the password."""
        scheme, _, value = authorization.partition(" ")
        key = value.strip()
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return None
        elif scheme.lower() != "bearer":
            return None
        given = hashlib.sha256(key.encode()).digest()
        found = None
        for digest, name in self.names.items():  # all of them: the time says nothing about which
            if hmac.compare_digest(given, digest):
                found = name
        return found
