"""Multi-scale structural similarity, in NumPy and SciPy."""

from __future__ import annotations

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need
from intaglio.runtimes.fidelity import K1, K2, WINDOW, gaussian, pair

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2: finest scale first
SMALLEST = (WINDOW - 1) * 2 ** (len(WEIGHTS) - 1) + 1  # pixels; 161 leave one whole window at the coarsest scale


def mean(image: np.ndarray) -> np.ndarray:
    """Gaussian mean of every full window: float64 [H, W, C] to [H - 10, W - 10, C]."""
    filters = need("scipy.ndimage", extra="bench")
    edge = WINDOW // 2
    for axis in (0, 1):
        image = filters.correlate1d(image, gaussian(), axis=axis)
    return image[edge:-edge, edge:-edge]


def similarity(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of contrast times structure, and mean SSIM, of each channel: float64 [H, W, C] to two [C].

    Source: Wang, Simoncelli, Bovik 2003, equations 2 to 4 and 6, with C3 = C2 / 2.
    """
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    structure = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return structure.mean(axis=(0, 1)), (luminance * structure).mean(axis=(0, 1))


def halve(image: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels; an odd side is first continued by its last row or column, as by the authors' own code."""
    height, width = image.shape[:2]
    image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    height, width, channels = image.shape
    return np.asarray(image.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3)))


def ms_ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Multi-scale SSIM of uint8 [H, W, C], 1 for identical pictures; each channel alone, then the mean.

    The product over five scales of the mean contrast-structure term to the published weight; at the coarsest scale
    of mean SSIM. A negative mean, which has no real power, counts as 0. Source: Wang, Simoncelli, Bovik, Multi-Scale
    Structural Similarity for Image Quality Assessment, Asilomar 2003, equation 7. TensorFlow and pytorch-msssim take
    the channels in the same way; torchmetrics mixes the channels and lets reflected borders into the last scale.

    Raises:
        UsageError: see `pair`, or a side is shorter than 161 pixels.
        MissingDependency: SciPy is not installed.
    """
    a, b = pair(image, reference)
    if min(a.shape[:2]) < SMALLEST:
        message = f"MS-SSIM needs at least {SMALLEST}x{SMALLEST} pixels, found {a.shape[1]}x{a.shape[0]}"
        raise UsageError(message)
    product = np.ones(a.shape[2])
    for scale, weight in enumerate(WEIGHTS):
        structure, whole = similarity(a, b)
        term = whole if scale == len(WEIGHTS) - 1 else structure
        product *= np.maximum(term, 0) ** weight
        a, b = halve(a), halve(b)
    return float(product.mean())
