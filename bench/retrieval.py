"""Does a generated emoji look like the one its name means? Nearest neighbours among the training images.

The measure: L2 distance of RGB values at 32x32 pixels against every training image; the rank of the right one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from intaglio.exporters.emoji_data import TrainingSet

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.runtimes.pipeline import Pipeline

TOP = 5
LANGUAGES = ("en", "zh")


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
