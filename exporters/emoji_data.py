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
    from collections.abc import Iterable, Sequence

    from PIL.Image import Image

NPM_PACKAGES = {"@iconify-json/fluent-emoji-flat": "1.2.6", "emojibase-data": "17.0.0"}
NEWEST_EMOJI_VERSION = 1.0  # the emoji of Unicode Emoji 1.0 and before: the ones everybody has and uses
SKIPPED_GROUPS = (2, 8, 9, None)  # components, symbols (arrows and lettered buttons), flags, unnamed
CLOCK_FACE = re.compile(r"(o’clock|-thirty)$")  # 24 dials that differ by one hand
TOKENIZER_LENGTH = 24
BPE_SIZE = 4094
SIDE = 32  # pixels of a thumbnail
COLUMNS = 28  # thumbnails in a row of images.png


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """Names in codepoint order (``hexcode``, ``en``, ``zh``) and images float32 [N, 32, 32, 3] in 0 to 255."""

    names: list[dict[str, str]]
    images: np.ndarray

    def spread(self, count: int) -> list[int]:
        """`count` indices evenly spaced in codepoint order: nobody picks them by hand."""
        return [int(i) for i in np.linspace(0, len(self.names) - 1, count).round()]

    def rank(self, image: Image, index: int) -> int:
        """How many training images are nearer to `image` than the one at `index`; 0 is the best."""
        distances = np.square(self.images - thumbnail(image)).sum(axis=(1, 2, 3))
        return int((distances < distances[index]).sum())


def thumbnail(image: Image) -> np.ndarray:
    """float32 [32, 32, 3] in 0 to 255, area-averaged."""
    from PIL import Image as Pillow

    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Pillow.Resampling.BOX), np.float32)


def read_training_set(checkpoint: Path) -> TrainingSet:
    """Read ``names.json`` and the sheet ``images.png`` of the embedded checkpoint."""
    from PIL import Image as Pillow

    names = json.loads((checkpoint / "names.json").read_text(encoding="utf-8"))
    sheet = np.asarray(Pillow.open(checkpoint / "images.png").convert("RGB"), np.float32)
    tiles = sheet.reshape(-1, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
    return TrainingSet(names=names, images=tiles[: len(names)])


def write_training_set(checkpoint: Path, names: Sequence[dict[str, str]], images: np.ndarray) -> None:
    """Write what `read_training_set` reads; `images` uint8 [N, S, S, 3]."""
    from PIL import Image as Pillow

    rows = -(-len(images) // COLUMNS)
    sheet = np.full((rows * COLUMNS, SIDE, SIDE, 3), 255, np.uint8)
    sheet[: len(images)] = [thumbnail(Pillow.fromarray(i)).round().astype(np.uint8) for i in images]
    grid = sheet.reshape(rows, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(rows * SIDE, COLUMNS * SIDE, 3)
    Pillow.fromarray(grid).save(checkpoint / "images.png", optimize=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in names)
    (checkpoint / "names.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
