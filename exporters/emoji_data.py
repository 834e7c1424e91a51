"""The data of the embedded `emoji` checkpoint: artwork, names and the bilingual tokenizer.

Everything comes from two npm packages, so the checkpoint can be reproduced from public registries:

* ``@iconify-json/fluent-emoji-flat`` (MIT, Microsoft Corporation): the drawings, as SVG bodies.
* ``emojibase-data`` (MIT): names and tags in English (``en``) and Chinese (``zh``).
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

NPM_PACKAGES = {"@iconify-json/fluent-emoji-flat": "1.2.6", "emojibase-data": "17.0.0"}
NEWEST_EMOJI_VERSION = 1.0  # the emoji of Unicode Emoji 1.0 and before: the ones everybody has and uses
SKIPPED_GROUPS = (2, 8, 9, None)  # components, symbols (arrows and lettered buttons), flags, unnamed
CLOCK_FACE = re.compile(r"(o’clock|-thirty)$")  # 24 dials that differ by one hand
TOKENIZER_LENGTH = 24
BPE_SIZE = 4094


@dataclass(frozen=True, slots=True, kw_only=True)
class Emoji:
    """One drawing and its names; `zh_tags` and `tags` are the search words of emojibase."""

    hexcode: str
    label: str
    zh: str
    tags: tuple[str, ...]
    zh_tags: tuple[str, ...]
    svg_body: str


def npm_install(folder: Path) -> Path:
    """Install the pinned npm packages under `folder` and return its ``node_modules``."""
    modules = folder / "node_modules"
    if not all((modules / name / "package.json").exists() for name in NPM_PACKAGES):
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{version}" for name, version in NPM_PACKAGES.items()]
        subprocess.run(["npm", "install", "--no-save", "--prefix", str(folder), *wanted], check=True)
    return modules


def icon_name(label: str) -> str:
    """The Iconify slug of an English emoji label: ``"men’s room"`` is ``"mens-room"``."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.&]", "", plain)).strip("-")


def read_emoji(node_modules: Path) -> list[Emoji]:
    """The training set in codepoint order."""

    def read(path: str) -> Any:
        return json.loads((node_modules / path).read_text(encoding="utf-8"))

    icons = read("@iconify-json/fluent-emoji-flat/icons.json")["icons"]
    chinese = {row["hexcode"]: row for row in read("emojibase-data/zh/data.json")}
    found = []
    for row in read("emojibase-data/en/data.json"):
        name = icon_name(row["label"])
        skipped = row.get("group") in SKIPPED_GROUPS or row.get("gender") is not None
        if skipped or row["version"] > NEWEST_EMOJI_VERSION or CLOCK_FACE.search(row["label"]) or name not in icons:
            continue
        zh = chinese.get(row["hexcode"], {})
        found.append(
            Emoji(
                hexcode=row["hexcode"],
                label=row["label"],
                zh=zh.get("label", ""),
                tags=tuple(row.get("tags", ())),
                zh_tags=tuple(zh.get("tags", ())),
                svg_body=icons[name]["body"],
            )
        )
    return sorted(found, key=lambda e: [int(part, 16) for part in e.hexcode.split("-")])


def render(emoji: Iterable[Emoji], size: int) -> np.ndarray:
    """Draw every emoji on white: uint8 [N, size, size, 3]."""
    import resvg_py
    from PIL import Image

    images = []
    for one in emoji:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="{2 * size}" height="{2 * size}">'
        png = bytes(resvg_py.svg_to_bytes(svg_string=f"{head}{one.svg_body}</svg>"))
        drawing = Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        page = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
        page.alpha_composite(drawing)
        images.append(np.asarray(page.convert("RGB")))
    return np.stack(images)


def caption(one: Emoji, rng: random.Random) -> str:
    """A random training caption: 10 % empty (for guidance), the rest names and tags in both languages."""
    draw = rng.random()
    article = "an " if one.label[:1].lower() in "aeiou" else "a "
    if draw < 0.10:
        return ""
    if draw < 0.50 or not one.zh:
        return (article if rng.random() < 0.25 else "") + one.label
    if draw < 0.80:
        return one.zh
    if draw < 0.90:
        return ", ".join([one.label, *rng.sample(one.tags, min(2, len(one.tags)))])
    return "，".join([one.zh, *rng.sample(one.zh_tags, min(2, len(one.zh_tags)))])


def train_tokenizer(emoji: Iterable[Emoji], folder: Path) -> None:
    """Train a byte-level BPE on the names and tags and save it as a CLIP tokenizer in `folder`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    corpus: list[str] = []
    for one in emoji:
        corpus += [one.label, one.zh, " ".join(one.tags), "，".join(one.zh_tags)] * 4
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=BPE_SIZE, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = dict(model["vocab"])
    # CLIP wants every byte with and without the end-of-word mark, and its two special tokens last.
    for symbol in [s + end for s in alphabet for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(symbol, len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENIZER_LENGTH
    ).save_pretrained(folder)
