"""Where this package keeps what it can make again: per user, outside of every artifact."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/intaglio``, or ``~/.cache/intaglio``; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "intaglio"
