"""SSIMULACRA 2, as the ``ssimulacra2`` package computes it."""

from __future__ import annotations

import io

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need
from intaglio.runtimes.fidelity import pair

SMALLEST = 225  # pixels: the sixth scale is kept from 8 on, and ceil(225 / 32) = 8


def ssimulacra2(image: np.ndarray, reference: np.ndarray) -> float:
    """The score of uint8 [H, W, 3]: 100 for identical pictures, 90 visually lossless, 70 high quality, below 0 awful.

    Smaller pictures have fewer than six scales, and the score's 108 weights would then be those of other scales.
    Source: Sneyers, SSIMULACRA 2 (github.com/cloudinary/ssimulacra2), in the NumPy port of the package. The package
    reads files, so it gets PPM pictures in memory; nothing is written.

    Raises:
        UsageError: see `pair`, the pictures have no three channels, or a side is shorter than 225 pixels.
        MissingDependency: ssimulacra2 is not installed.
    """
    package = need("ssimulacra2", extra="bench")
    height, width, channels = pair(image, reference)[0].shape
    if channels != 3 or min(height, width) < SMALLEST:
        message = f"SSIMULACRA2 needs RGB of at least {SMALLEST}x{SMALLEST} pixels, found {width}x{height}x{channels}"
        raise UsageError(message)
    return float(package.compute_ssimulacra2(in_memory(reference), in_memory(image)))


def in_memory(picture: np.ndarray) -> io.BytesIO:
    """uint8 [H, W, 3] as a lossless picture file that is on no disk."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PPM")
    file.seek(0)
    return file
