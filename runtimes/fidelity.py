"""How far one picture is from another: PSNR, SSIM and relative L2, in NumPy alone.

The order of the arguments is always (picture judged, reference).
"""

from __future__ import annotations

import math

import numpy as np

from intaglio.profiles.errors import UsageError

WINDOW = 11  # Wang et al. 2004, section III-C: 11x11 circular-symmetric Gaussian
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def pair(image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures as float64 [H, W, C] in 0..255.

    Raises:
        UsageError: they are not uint8, not [H, W] or [H, W, C], or of different shapes.
    """
    if image.dtype != np.uint8 or reference.dtype != np.uint8:
        message = f"pictures must be uint8, found {image.dtype} and {reference.dtype}"
        raise UsageError(message)
    if image.shape != reference.shape or image.ndim not in (2, 3) or not image.size:
        message = f"pictures of shapes {image.shape} and {reference.shape} cannot be compared"
        raise UsageError(message)
    shape = image.shape if image.ndim == 3 else (*image.shape, 1)
    return image.reshape(shape).astype(np.float64), reference.reshape(shape).astype(np.float64)


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal to noise ratio in dB: ``10 log10(255^2 / MSE)``, the mean over all pixels and channels.

    Identical pictures give infinity. Source: ITU-T J.340 with the peak of 8-bit pictures.

    Raises:
        UsageError: see `pair`.
    """
    a, b = pair(image, reference)
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def gaussian() -> np.ndarray:
    """The window's 1-D profile [11], sum 1; its outer product is the window."""
    x = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (x / SIGMA) ** 2)
    return np.asarray(weights / weights.sum())


def blur(image: np.ndarray) -> np.ndarray:
    """Gaussian mean of every full window: [H, W, C] to [H - 10, W - 10, C]."""
    weights = gaussian()
    for axis in (0, 1):
        size = image.shape[axis] - WINDOW + 1
        parts = [w * np.take(image, range(i, i + size), axis=axis) for i, w in enumerate(weights)]
        image = np.sum(parts, axis=0)
    return image


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity, 1 for identical pictures; the mean over windows, then over channels.

    ``(2 ma mb + C1)(2 sab + C2) / ((ma^2 + mb^2 + C1)(sa^2 + sb^2 + C2))`` with an 11x11 Gaussian window of sigma 1.5,
    K1 = 0.01, K2 = 0.03, population variance and full windows only: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4),
    2004, equations 13 to 17. Agrees with scikit-image at gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255.

    Raises:
        UsageError: see `pair`, or a side is shorter than 11 pixels.
    """
    a, b = pair(image, reference)
    if min(a.shape[:2]) < WINDOW:
        message = f"SSIM needs at least {WINDOW}x{WINDOW} pixels, found {a.shape[1]}x{a.shape[0]}"
        raise UsageError(message)
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float(np.mean(top / bottom))


def relative_l2(values: np.ndarray, reference: np.ndarray) -> float:
    """``||values - reference|| / ||reference||`` over all elements, in float64; any shape, both the same.

    0 for equal tensors, infinity where the reference is all zero and the values are not. NaN stays NaN. Source: the
    normwise relative error of Higham, Accuracy and Stability of Numerical Algorithms, section 6.1.

    Raises:
        UsageError: the shapes differ.
    """
    if values.shape != reference.shape:
        message = f"tensors of shapes {values.shape} and {reference.shape} cannot be compared"
        raise UsageError(message)
    b = reference.astype(np.float64).ravel()
    error = float(np.linalg.norm(values.astype(np.float64).ravel() - b))
    norm = float(np.linalg.norm(b))
    if norm == 0:
        return 0.0 if error == 0 else (math.nan if math.isnan(error) else math.inf)
    return error / norm
