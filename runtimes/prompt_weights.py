r"""Prompts with weights and of any length for CLIP: the syntax and the arithmetic of stable-diffusion-webui.

``(word)`` weighs 1.1, ``(word:1.3)`` 1.3, ``[word]`` 1/1.1; brackets nest and multiply; ``\(`` and ``\[`` are text;
``BREAK`` begins a new chunk. A prompt becomes chunks that the text encoder reads one by one; the weights multiply its
output. Semantics from ``modules/prompt_parser.py`` (`parse_prompt_attention`), ``modules/sd_hijack_clip.py``
(`tokenize_line`, `empty_chunk`) and ``modules/sd_emphasis.py`` ("Original") of AUTOMATIC1111/stable-diffusion-webui.

Not part of it: prompt editing (``[a:b:0.5]``, ``[a|b]``), ``AND``, ``<lora:…>`` and textual inversion, which are read
as text. ``BREAK`` within weighted brackets stays a break here; the original multiplies its mark and then takes it for
a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from intaglio.profiles.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from intaglio.runtimes.text import PromptTokenizer

ROUND, SQUARE = 1.1, 1 / 1.1
BREAK = ("BREAK", -1.0)
COMMA_BACKTRACK = 20
PIECES = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?)          # an escaped bracket or backslash; a lone backslash vanishes
      | (?P<open>[(\[])
      | :(?P<weight>[+-]?[.\d]+)(?P<end>\))  # ":1.3)" ends a round bracket
      | (?P<close>[)\]])
      | (?P<text>[^\\()\[\]:]+|:)""",
    re.VERBOSE,
)
BREAKS = re.compile(r"\s*\bBREAK\b\s*")


class Chunks(NamedTuple):
    """A prompt as chunks: `ids` int64 [chunks, T], `weights` float32 [chunks, T], 1 on special tokens and padding."""

    ids: np.ndarray
    weights: np.ndarray


class _Part:
    """A run of text, or a break, with the product of the brackets around it."""

    def __init__(self, text: str, *, is_break: bool = False) -> None:
        self.text, self.is_break, self.weight = text, is_break, 1.0


def parse(prompt: str) -> list[tuple[str, float]]:
    """Texts with their weights, in order; a break is the pair `BREAK`.

    Neighbours of equal weight are one text. A bracket that is never closed holds to the end; one that was never opened
    is text.

    Raises:
        UsageError: a weight is not a number (``1.2.3``).
    """
    parts: list[_Part] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        for part in parts[opened[kind].pop() :]:
            part.weight *= factor

    for piece in PIECES.finditer(prompt):
        if piece["escaped"] is not None:
            parts.append(_Part(piece["escaped"]))
        elif piece["open"]:
            opened[piece["open"]].append(len(parts))
        elif piece["weight"] and opened["("]:
            close("(", _number(piece["weight"]))
        elif piece["close"] == ")" and opened["("]:
            close("(", ROUND)
        elif piece["close"] == "]" and opened["["]:
            close("[", SQUARE)
        else:
            for i, text in enumerate(BREAKS.split(piece[0])):
                if i > 0:
                    parts.append(_Part("", is_break=True))
                parts.append(_Part(text))
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[kind]:
            close(kind, factor)
    return _merged(parts)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"the prompt has the weight {text!r}, allowed: a number, as in (word:1.3)") from None


def _merged(parts: Sequence[_Part]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    joins = False
    for part in parts:
        if part.is_break:
            merged.append(BREAK)
        elif joins and merged[-1][1] == part.weight:
            merged[-1] = (merged[-1][0] + part.text, part.weight)
        else:
            merged.append((part.text, part.weight))
        joins = not part.is_break
    return merged or [("", 1.0)]


def encode_chunks(tokenizer: PromptTokenizer, prompt: str, *, length: int, backtrack: int = COMMA_BACKTRACK) -> Chunks:
    """`prompt` as chunks of `length` tokens: begin, up to ``length - 2`` tokens, end, padding.

    Where a chunk is full and a comma lies within its last `backtrack` tokens, the text after the comma moves to the
    next chunk (0: never). A prompt without weights that fits one chunk has the ids of `PromptTokenizer.__call__`.

    Raises:
        UsageError: a weight is not a number, or `length` has no room for text.
    """
    begin, end = tokenizer.special_ids()
    room = length - len(begin) - len(end)
    if room < 1:
        raise UsageError(f"length = {length} has no room for text; pass the tokenizer's own length")
    comma = tokenizer.content_ids(",")
    rows: list[list[tuple[int, float]]] = [[]]
    for text, weight in parse(prompt):
        if (text, weight) == BREAK:
            rows.append([])
            continue
        for token in tokenizer.content_ids(text):
            if len(rows[-1]) == room:
                keep = _after_comma(rows[-1], comma, backtrack) if [token] != comma else room
                rows.append(rows[-1][keep:])
                del rows[-2][keep:]
            rows[-1].append((token, weight))
    if len(rows) > 1 and not rows[-1]:  # a break at the end begins nothing
        rows.pop()
    ids = np.full((len(rows), length), tokenizer.pad, np.int64)
    weights = np.ones((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        tokens = [*begin, *(token for token, _ in row), *end]
        ids[i, : len(tokens)] = tokens
        weights[i, len(begin) : len(begin) + len(row)] = [weight for _, weight in row]
    return Chunks(ids, weights)


def _after_comma(row: Sequence[tuple[int, float]], comma: list[int], backtrack: int) -> int:
    """Index behind the last comma among the last `backtrack` tokens; the row's length where there is none."""
    for i in range(len(row) - 1, max(len(row) - backtrack, 0) - 1, -1):
        if [row[i][0]] == comma:
            return i + 1
    return len(row)


def pad_chunks(tokenizer: PromptTokenizer, *prompts: Chunks) -> list[Chunks]:
    """The prompts with empty chunks behind the shorter ones, so that all have as many: a pair for guidance."""
    count = max(len(p.ids) for p in prompts)
    empty = encode_chunks(tokenizer, "", length=prompts[0].ids.shape[1])
    padded = []
    for prompt in prompts:
        more = count - len(prompt.ids)
        ids = np.concatenate([prompt.ids, *[empty.ids] * more])
        padded.append(Chunks(ids, np.concatenate([prompt.weights, *[empty.weights] * more])))
    return padded


def apply_weights(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted text states float32 [1, chunks*T, D] from `states` float32 [chunks, T, D] and `weights` [chunks, T].

    Each chunk is rescaled to the mean it had (over its tokens and channels); one whose weights are all 1 is untouched.

    Raises:
        NumericsError: a weighted chunk has mean 0, so that no factor restores it.
    """
    chunks = []
    for state, weight in zip(states.astype(np.float32), weights, strict=True):
        if not np.all(weight == 1):
            scaled = state * weight[:, None].astype(np.float32)
            before, after = state.mean(dtype=np.float64), scaled.mean(dtype=np.float64)
            if after == 0:
                raise NumericsError("the weighted prompt's states have mean 0; choose other weights")
            chunks.append(scaled * np.float32(before / after))
        else:
            chunks.append(state)
    return np.concatenate(chunks)[None]
