"""Checkpoints in Hugging Face's local cache, by name. Nothing is downloaded, nobody is asked over the network."""

from __future__ import annotations

import re
from pathlib import Path

from intaglio.profiles.errors import CheckpointError, MissingDependency
from intaglio.profiles.registry import installed

NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)


def is_repository(text: str) -> bool:
    """Whether a string reads as ``ORG/NAME`` or ``ORG/NAME@REVISION``."""
    return NAME.fullmatch(text) is not None and ".." not in text  # a revision is a path in the cache


def cached_folder(text: str, file: str = "model_index.json", what: str = "diffusers pipeline") -> Path:
    """The folder of a cached repository, to be read in place.

    Args:
        text: ``ORG/NAME``, or ``ORG/NAME@REVISION`` with a branch, tag or commit.
        file: one that it must have.
        what: it then is.

    Raises:
        CheckpointError: it is not in the cache; the message has the command that fetches it.
        MissingDependency: huggingface_hub, which knows where the cache is, is not installed.
    """
    match = NAME.fullmatch(text)
    repository, revision = (match["repository"], match["revision"]) if match else (text, None)
    if not installed("huggingface_hub"):
        raise MissingDependency(
            f"{text} is not a folder, and huggingface_hub is not installed; run: pip install 'intaglio[export]'"
        )
    import huggingface_hub

    index = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(index, str):
        return Path(index).parent
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    cache = huggingface_hub.constants.HF_HUB_CACHE
    raise CheckpointError(f"{text} is not a folder here, and {cache} has no {what} of that name; fetch it: {command}")
