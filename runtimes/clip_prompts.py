"""Prompts of families that read text with CLIP alone: plain, or as stable-diffusion-webui reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from intaglio.profiles.spec import Range
from intaglio.runtimes.prompt_weights import Chunks, apply_weights, encode_chunks, pad_chunks
from intaglio.runtimes.sampling import Parameter
from intaglio.runtimes.text import PromptTokenizer

CONTEXT = "context_tokens"  # the axis of what the UNet reads: one or more chunks of CLIP's tokens
PROMPT_WEIGHTS = Parameter(
    kind=bool, default=False, help="read (word:1.2) as weights and longer prompts in chunks, as webuis do"
)
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def chunked(tokenizer: PromptTokenizer, prompts: Sequence[str], context: Range, *, least: int = 1) -> list[Chunks]:
    """The prompts as equally many chunks, `least` or more.

    Raises:
        UsageError: they need more chunks than the UNet of this artifact takes.
    """
    length = tokenizer.length or context.opt
    filler = encode_chunks(tokenizer, " BREAK ".join([","] * least), length=length)  # as many chunks, thrown away
    chunks = pad_chunks(tokenizer, filler, *(encode_chunks(tokenizer, p, length=length) for p in prompts))[1:]
    context.check(f"a prompt of {len(chunks[0].ids)} chunks: {CONTEXT}", len(chunks[0].ids) * length)
    return chunks


def encode_chunked(encode: Encode, prompts: Sequence[Chunks]) -> tuple[np.ndarray, np.ndarray | None]:
    """Weighted states float32 [prompts, chunks * T, D], and the pooled vector of each prompt's first chunk.

    Args:
        encode: token ids [chunks, T] to states [chunks, T, D] and pooled vectors [chunks, P], where there are any.
        prompts: of `chunked`.
    """
    states, pooled = [], []
    for prompt in prompts:
        found, first = encode(prompt.ids)
        states.append(apply_weights(found, prompt.weights))
        if first is not None:
            pooled.append(first[:1])
    return np.concatenate(states), np.concatenate(pooled) if pooled else None
