"""Tiny tokenizers of every kind that the families use, saved as `save_pretrained` saves them; nothing to download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENGLISH = [
    "a",
    "red",
    "heart",
    "cat",
    "face",
    "blue",
    "car",
    "star",
    "on",
    "the",
    "moon",
    "photo",
    "of",
    "light",
    "city",
]
CHINESE = list("红心月亮一只猫在的城市夜")
MERGES = [("a", "t"), ("r", "e"), ("re", "d"), ("t", "h"), ("th", "e"), ("Ġ", "a"), ("Ġ", "the"), ("i", "n")]

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
"""Qwen3's turns, and the empty thoughts it writes where thinking is off."""

INSTRUCT = """\
{{- bos_token }}
{%- for message in messages %}
{%- set turn = {'system': 'SYSTEM_PROMPT', 'user': 'INST'}[message.role] %}
{{- '[' + turn + ']' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for block in message.content %}{{- block.text if block.type == 'text' else '[IMG]' }}{%- endfor %}
{%- endif %}
{{- '[/' + turn + ']' }}
{%- endfor %}"""
"""Mistral Small's turns."""


def byte_vocabulary() -> dict[str, int]:
    """Every byte as byte-level BPE writes it: no text is without tokens."""
    from tokenizers import pre_tokenizers

    return {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def clip_tokenizer(folder: Path, length: int, *, pad_token: str = "<|endoftext|>") -> Any:
    """A CLIPTokenizer of single bytes and a few words' merges; SDXL's second one pads with ``"!"``."""
    from transformers import CLIPTokenizer

    vocab = byte_vocabulary()
    for symbol in [s + "</w>" for s in vocab]:
        vocab.setdefault(symbol, len(vocab))
    merges = [("a", "t</w>"), ("c", "at</w>"), ("r", "e"), ("re", "d</w>")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    files = write_bpe(folder, vocab, merges)
    return saved(CLIPTokenizer(**files, model_max_length=length, pad_token=pad_token), folder)


def t5_tokenizer(folder: Path, length: int = 24) -> Any:
    """A T5Tokenizer: unigram pieces after metaspaces, ``</s>`` behind, ``<pad>`` 0; letters it lacks are ``<unk>``."""
    from transformers import T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [("▁" + word, -3.0) for word in ENGLISH] + [(piece, -4.0) for piece in CHINESE]
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    return saved(T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length), folder)


def qwen_tokenizer(folder: Path, length: int = 131072, *, template: str = CHATML) -> Any:
    """A Qwen2Tokenizer with a ChatML template; padding is ``<|endoftext|>``, on the right."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    vocab = byte_vocabulary()
    for left, right in MERGES:
        vocab.setdefault(left + right, len(vocab))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": length}
    tokenizer = Qwen2Tokenizer(**write_bpe(folder, vocab, MERGES), **names, chat_template=template)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>")])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return saved(tokenizer, folder)


def mistral_tokenizer(folder: Path, *, padding_side: str = "left", template: str = INSTRUCT) -> Any:
    """A byte-level tokenizer as Mistral Small's: ``<s>`` in front, padding on the left, no longest input."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
    special += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    vocab = {token: i for i, token in enumerate(special)}
    for symbol in [*byte_vocabulary(), *(left + right for left, right in MERGES)]:
        vocab.setdefault(symbol, len(vocab))
    backend = Tokenizer(BPE(vocab=vocab, merges=MERGES, ignore_merges=True))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", vocab["<s>"])])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side=padding_side, chat_template=template, **names
    )
    return saved(tokenizer, folder)


def mistral_processor(folder: Path, *, padding_side: str = "left") -> Any:
    """The PixtralProcessor that ``Flux2Pipeline`` has for a tokenizer."""
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    tokenizer = mistral_tokenizer(folder, padding_side=padding_side)
    processor = PixtralProcessor(PixtralImageProcessorPil(), tokenizer, chat_template=tokenizer.chat_template)
    return saved(processor, folder)


def write_bpe(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, str]:
    """``vocab.json`` and ``merges.txt``, as older checkpoints have them, and the arguments that read them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}


def saved(thing: Any, folder: Path) -> Any:
    """`thing` as its own class loads it again from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    thing.save_pretrained(folder)
    return type(thing).from_pretrained(folder)
