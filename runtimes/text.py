"""Prompts to token ids, with the ``tokenizers`` library alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.profiles.errors import ArtifactError


class PromptTruncated(UserWarning):
    """A prompt had more tokens than the text encoder takes; the message shows what was cut."""


class ClipTokenizer:
    """A CLIP tokenizer from an artifact's ``tokenizer/`` folder.

    Raises:
        ArtifactError: ``tokenizer.json`` or ``tokenizer_config.json`` is missing or has no padding token.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{folder} has no readable tokenizer ({error}); build the artifact again") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.length: int = config["model_max_length"]
        self.pad, self.end = (self._id(config, key) for key in ("pad_token", "eos_token"))

    def _id(self, config: dict[str, Any], key: str) -> int:
        token = config.get(key)
        token = token["content"] if isinstance(token, dict) else token
        found = self.tokenizer.token_to_id(token) if token else None
        if found is None:
            raise ArtifactError(f"tokenizer_config.json: {key} {token!r} is not in the vocabulary")
        return int(found)

    def __call__(self, prompts: Sequence[str], *, length: int | None = None) -> np.ndarray:
        """Token ids int64 [B, length]: begin, text, end, padding.

        A prompt over the limit is cut before its end token, with a `PromptTruncated` warning that shows what was lost,
        as diffusers does.
        """
        limit = length or self.length
        return np.stack([self._encode(p, limit) for p in prompts])

    def _encode(self, prompt: str, limit: int) -> np.ndarray:
        encoding = self.tokenizer.encode(prompt)
        ids: list[int] = encoding.ids
        if len(ids) > limit:
            cut = prompt[encoding.offsets[limit - 1][0] :]
            message = f"the prompt has {len(ids)} tokens, the text encoder takes {limit}; cut off: {cut!r}"
            warnings.warn(message, PromptTruncated, stacklevel=2)
            ids = [*ids[: limit - 1], self.end]
        return np.array(ids + [self.pad] * (limit - len(ids)), np.int64)
