"""JSON configurations of a checkpoint: read with errors that name the file, written without traces of a machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.profiles.errors import CheckpointError
from intaglio.profiles.paths import check_regular
from intaglio.profiles.strict import parse_json


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a key it lacks is a CheckpointError too.

    Raises:
        CheckpointError: it is missing, no plain file or not a JSON object; see `parse_json`.
    """
    try:
        check_regular(path, path.stat(), CheckpointError)
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return _Config(data, path)


def section(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """A JSON object inside of a configuration, such as ``text_config``; a key it lacks is a CheckpointError too.

    Raises:
        CheckpointError: `config`, which is that of the file `path`, has no such object.
    """
    inner = config.get(key)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path} has no {key!r} with the configuration of a model; the checkpoint is incomplete")
    return _Config(inner, f"{path}: {key}")


def write_config(config: Mapping[str, Any], path: Path) -> None:
    """Write a diffusers configuration without what libraries note about where it was loaded from."""
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class _Config(dict[str, Any]):
    """A JSON object that knows its file, so that a key it lacks is the checkpoint's error and not ours."""

    def __init__(self, data: Mapping[str, Any], place: Path | str) -> None:
        super().__init__(data)
        self._place = place

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._place} has no {key!r}; the checkpoint is incomplete")
