"""Sizes of memory as people write them: ``4GiB``, ``512MiB``, ``1000000``."""

from __future__ import annotations

import re

from intaglio.profiles.errors import UsageError

UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_bytes(text: str, what: str) -> int:
    """A number and a unit of UNITS, in any case, as bytes, 1 or more; `what` is named in messages.

    Raises:
        UsageError: it is not such a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise UsageError(f"{what}={text} is not allowed: a size such as 4GiB, 512MiB or 1500MB")
    return size
