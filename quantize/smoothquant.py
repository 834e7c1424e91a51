"""SmoothQuant: move the outliers of activation channels into the weights, where int8 can bear them.

Xiao et al., arXiv:2211.10438: ``x @ W = (x / s) @ (s[:, None] * W)`` with, of channel j (equation 4),
``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``. The bounds on ``s`` are those of NVIDIA Model-Optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from intaglio.quantize.int8 import CODEC
from intaglio.quantize.int8 import LIMIT as LEVELS
from intaglio.quantize.ranges import activation_scale, some_columns, some_rows

LEAST, MOST = 1e-4, 1e4  # bounds of s
DEAD = 2.0**-31  # a channel whose activations never exceed this keeps its scale
ALPHAS = (0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
ROWS = 256  # of the samples, for the errors
COLUMNS = 1024  # of all weights, for the search; the winner is measured on every column


def smoothing(peak: np.ndarray, weight_peak: np.ndarray, alpha: float | None) -> np.ndarray:
    """float32 [K] the scales s: the layer computes ``(x / s) @ (s[:, None] * W)``.

    Args:
        peak: [K], the largest magnitude of each input channel.
        weight_peak: [K], the largest magnitude of each channel's weights, over all weights that share the input.
        alpha: 0 (all difficulty stays in the activations) to 1 (all moves to the weights), or None for no smoothing.

    A channel without activations keeps s = 1, for the weights of what may yet come; one without weights gets the upper
    bound, so that it does not widen the activations' range.

    Raises:
        ValueError: alpha outside 0..1, shapes that differ, a NaN or an infinity.
    """
    peak, weight_peak = np.asarray(peak, np.float64), np.asarray(weight_peak, np.float64)
    if peak.ndim != 1 or peak.shape != weight_peak.shape:
        message = f"peaks of shapes {peak.shape} and {weight_peak.shape}: both must be [channels]"
        raise ValueError(message)
    if not (np.isfinite(peak).all() and np.isfinite(weight_peak).all()):
        message = "peaks with NaN or infinity cannot be smoothed"
        raise ValueError(message)
    if alpha is None:
        return np.ones(len(peak), np.float32)
    if not 0 <= alpha <= 1:
        message = f"alpha {alpha}: 0 to 1"
        raise ValueError(message)
    dead = peak <= DEAD
    inverse = weight_peak ** (1 - alpha) / np.where(dead, 1, peak) ** alpha
    scale: np.ndarray = np.where(dead, 1, 1 / np.clip(inverse, LEAST, MOST)).astype(np.float32)
    return scale


def weight_peaks(weights: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [K]: the largest magnitude of each input channel over `weights`, each [K, N]."""
    peak: np.ndarray = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    return peak


def best_alpha(
    samples: np.ndarray,
    peak: np.ndarray,
    weights: Sequence[np.ndarray],
    alphas: Sequence[float] = ALPHAS,
    *,
    method: str = "mse",
) -> tuple[float | None, float, float]:
    """The alpha of the least output error of the int8 layer, and that error without and with smoothing.

    Args:
        samples: float32 [n, K], rows of the layer's input; at most 256 of them are used, always the same.
        peak: float32 [K], the largest magnitude of each channel over everything.
        weights: float32 [K, N], all that share the input.
        alphas: what to try beside no smoothing.
        method: how the activations' scale is chosen, a row of ``ranges.RANGES``.

    Returns:
        (alpha, error before, error after): alpha is None where nothing beats s = 1. An error is that of the outputs,
        ``|Y - Y_int8| / |Y|`` in Frobenius norms over all weights: int8 per output channel, activations per tensor.
    """
    weights = [np.asarray(weight, np.float32) for weight in weights]
    rows, some = some_rows(np.asarray(samples, np.float32), ROWS), some_columns(weights, COLUMNS)
    w_peak = weight_peaks(weights)
    scales = {alpha: smoothing(peak, w_peak, alpha) for alpha in (None, *alphas)}
    errors = {alpha: output_error(some, rows, peak, scale, method) for alpha, scale in scales.items()}
    best = min(errors, key=lambda alpha: errors[alpha])
    before = output_error(weights, rows, peak, scales[None], method)
    after = output_error(weights, rows, peak, scales[best], method) if best is not None else before
    return (best, before, after) if after < before else (None, before, before)


def output_error(
    weights: Sequence[np.ndarray], rows: np.ndarray, peak: np.ndarray, scale: np.ndarray, method: str
) -> float:
    """``|Y - Y_int8| / |Y|`` of ``Y = rows @ W`` over all `weights` with the scales `scale` [K]; 0 where Y is zero."""
    x = rows / scale
    step = np.float32(activation_scale(x, peak / scale, method=method, levels=LEVELS))
    codes = np.rint(x / step).clip(-LEVELS, LEVELS)
    lost = size = 0.0
    for weight in weights:
        exact = rows @ weight
        tensors = CODEC.encode(scale[:, None] * weight, 1)
        sums = codes @ tensors["codes"].astype(np.float32)  # the scales come after the sum, as in an engine
        lost += float(np.square(exact - sums * (step * tensors["scale"]), dtype=np.float64).sum())
        size += float(np.square(exact, dtype=np.float64).sum())
    return float(np.sqrt(lost / size)) if size else 0.0
