"""Prompts to token ids, with the ``tokenizers`` library alone.

The ids and the mask are those of transformers' own tokenizers under the calls that diffusers' pipelines make
(``tests/test_tokenizers.py``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from intaglio.profiles.errors import ArtifactError, UsageError

MARKER = "{}"
"""Where the prompt goes in a template: its first occurrence; braces elsewhere are text."""
UNSET_LENGTH = 10**20  # transformers writes int(1e30) where a tokenizer has no longest input
SIDES = ("right", "left")


class PromptTruncated(UserWarning):
    """A prompt had more tokens than the text encoder takes; the message shows what was cut."""


@dataclass(frozen=True)
class Tokens:
    """Token ids and attention mask of a batch: `ids` int64 [B, T], `mask` int64 [B, T], 0 on padding."""

    ids: np.ndarray
    mask: np.ndarray


class PromptTokenizer:
    """A tokenizer from an artifact's folder: ``tokenizer.json`` and ``tokenizer_config.json``.

    Attributes:
        length: the longest input in tokens; None where the tokenizer has none.
        pad: id of the padding token.
        padding_side, truncation_side: ``"right"`` or ``"left"``.

    Raises:
        ArtifactError: a file is missing or unreadable, or the padding token is not in the vocabulary.
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
        self.tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        longest = config.get("model_max_length") or UNSET_LENGTH
        self.length: int | None = int(longest) if longest < UNSET_LENGTH else None
        self.pad = self._id(config, "pad_token")
        self.padding_side, self.truncation_side = (_side(config, key) for key in ("padding_side", "truncation_side"))

    def _id(self, config: dict[str, Any], key: str) -> int:
        token = config.get(key)
        token = token["content"] if isinstance(token, dict) else token
        found = self.tokenizer.token_to_id(token) if token else None
        if found is None:
            raise ArtifactError(f"tokenizer_config.json: {key} {token!r} is not in the vocabulary")
        return int(found)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        length: int | None = None,
        padding: Literal["max_length", "longest"] = "max_length",
        add_special_tokens: bool = True,
    ) -> Tokens:
        """Ids and mask [B, T] of prompts cut at `length` tokens and padded to T.

        T is `length` (the tokenizer's own where none is given), or the longest prompt of the batch with
        ``padding="longest"``. A prompt that is too long loses tokens on the tokenizer's truncation side, inside of its
        special tokens, with a `PromptTruncated` warning that shows the lost text. ``add_special_tokens=False`` is for
        text that has them already, as a chat template writes them.

        Raises:
            UsageError: no length is known, or it is too short for the special tokens; a prompt is not valid Unicode.
        """
        limit = length or self.length
        if limit is None:
            raise UsageError("the tokenizer has no longest input (model_max_length is not set); pass length=")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self._encode(p, limit, add_special_tokens) for p in prompts]
        width = limit if padding == "max_length" else max(map(len, rows))
        ids = np.full((len(rows), width), self.pad, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if self.padding_side == "left" else slice(len(row))
            ids[i, where], mask[i, where] = row, 1
        return Tokens(ids, mask)

    def _encode(self, prompt: str, limit: int, add_special_tokens: bool) -> list[int]:
        encoding = self._content(prompt)
        special = self.tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0
        room, count = limit - special, len(encoding.ids)
        if room < 0:
            raise UsageError(f"length = {limit} has no room for the {special} special tokens; pass a larger length")
        if count > room:
            left = self.truncation_side == "left"
            lost = prompt[: encoding.offsets[count - room - 1][1]] if left else prompt[encoding.offsets[room][0] :]
            encoding.truncate(room, direction=self.truncation_side)
            message = f"the prompt has {count + special} tokens, the text encoder takes {limit}; cut off: {lost!r}"
            warnings.warn(message, PromptTruncated, stacklevel=3)
        ids: list[int] = self.tokenizer.post_process(encoding, add_special_tokens=add_special_tokens).ids
        return ids

    def _content(self, text: str) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is not valid Unicode ({error}); write it in UTF-8") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def content_ids(self, text: str) -> list[int]:
        """Ids of `text` without special tokens, padding or truncation."""
        ids: list[int] = self._content(text).ids
        return ids

    def special_ids(self) -> tuple[list[int], list[int]]:
        """Ids that stand before and after every prompt: CLIP's begin and end, T5's end."""
        encoding = self.tokenizer.encode("a")
        first = encoding.special_tokens_mask.index(0)
        last = len(encoding.ids) - encoding.special_tokens_mask[::-1].index(0)
        return encoding.ids[:first], encoding.ids[last:]


def fill_template(template: str, prompt: str) -> str:
    """`template` with `prompt` in place of its first `MARKER`; neither's other braces mean anything.

    Raises:
        ArtifactError: the template has no place for a prompt.
    """
    before, marker, after = template.partition(MARKER)
    if not marker:
        raise ArtifactError(f"the prompt template {template!r} has no {MARKER}; build the artifact again")
    return before + prompt + after


def _side(config: dict[str, Any], key: str) -> Literal["right", "left"]:
    side: Literal["right", "left"] = config.get(key) or "right"
    if side not in SIDES:
        raise ArtifactError(f"tokenizer_config.json: {key} is {side!r}, allowed: {', '.join(SIDES)}")
    return side
