"""Where this package keeps what is a user's own, outside of every artifact (XDG base directory specification)."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again: ``$XDG_CACHE_HOME/intaglio``, or ``~/.cache/intaglio``; it may not exist."""
    return _folder("XDG_CACHE_HOME", ".cache")


def config_folder() -> Path:
    """What the user decided: ``$XDG_CONFIG_HOME/intaglio``, or ``~/.config/intaglio``; it may not exist."""
    return _folder("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """What happened here: ``$XDG_STATE_HOME/intaglio``, or ``~/.local/state/intaglio``; it may not exist."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "intaglio"
