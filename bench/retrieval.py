"""Does a generated emoji look like the one its name means? Nearest neighbours among the training images.

The measure: L2 distance of RGB values at 32x32 pixels against every training image; the rank of the right one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.runtimes.pipeline import Pipeline

SIDE = 32  # pixels
COLUMNS = 28  # images in a row of images.png
TOP = 5
LANGUAGES = ("en", "zh")


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


def ranks(
    pipeline: Pipeline, data: TrainingSet, indices: Sequence[int], language: str, *, seed: int = 0, steps: int = 20
) -> Iterator[tuple[int, int, Image]]:
    """Generate the emoji of each index from its name; yields index, rank and picture."""
    for index in indices:
        image = pipeline(data.names[index][language], seed=seed, num_inference_steps=steps).images[0]
        yield index, data.rank(image, index), image


def share_within(found: Sequence[int], top: int = TOP) -> float:
    """Share of ranks inside the first `top`, 0 to 1."""
    return float(np.mean([rank < top for rank in found]))
