"""AWQ: scale up the few weight rows that meet large activations before quantizing, and scale the activations down.

Lin et al., arXiv:2306.00978: ``x @ W = (x / s) @ (s[:, None] * W)`` with ``s = s_x^ratio`` (equation 5), s_x the mean
magnitude of each input channel and the ratio searched for the least error of the output (equation 4). Beside it the
variant of AutoAWQ and NVIDIA Model-Optimizer is tried, which also divides by ``s_w^(1 - ratio)``, s_w the mean
magnitude of a channel's weights relative to the largest of their block. Both are divided by ``sqrt(max(s) * min(s))``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from intaglio.quantize.formats import Codec
from intaglio.quantize.ranges import some_columns, some_rows

GRID = 20
ROWS = 512  # of the samples, for the errors
COLUMNS = 1024  # of all weights, for the search; the winner is measured on every column
LEAST, MOST = 1e-4, 1e4  # bounds of s before it is normalised


def search(
    weights: Sequence[np.ndarray], samples: np.ndarray, codec: Codec, *, grid: int = GRID
) -> tuple[np.ndarray, float, float]:
    """The scales of the least output error of ``(x / s) @ decode(encode(s * W))``.

    Args:
        weights: float32 [K, N] each, all that share the input.
        samples: float32 [n, K], rows of that input.
        codec: how the weights will be stored. It is told the importance of each scaled channel, the mean square of
            ``x / s``, as it must be when the weights are encoded for good.
        grid: ratios are ``i / grid``, i = 0..grid.

    Returns:
        (s float32 [K], error before, error after): the errors are ``|Y - Y_quantized| / |Y|`` in Frobenius norms over
        all weights and at most 512 samples. Ratio 0 of the first form is no scaling and always a candidate: where
        nothing beats it, s is 1 and the errors are the same.

    Raises:
        ValueError: no samples, or a NaN or an infinity in them.
    """
    samples = np.asarray(samples, np.float32)
    if samples.size == 0 or not np.isfinite(samples).all():
        message = "AWQ needs samples without NaN or infinity"
        raise ValueError(message)
    moments = np.square(samples, dtype=np.float64).mean(axis=0)
    rows = some_rows(samples, ROWS)
    some = some_columns(weights, COLUMNS)
    block = int(getattr(codec, "block", 0)) or len(moments)
    mean = np.abs(samples).mean(axis=0, dtype=np.float64)
    tried = list(candidates(mean, weight_scale(weights, block), grid))
    errors = [output_error(some, rows, moments, codec, scale) for scale in tried]
    plain = tried[0]
    best = tried[int(np.argmin(errors))]
    before = output_error(weights, rows, moments, codec, plain)
    after = before if best is plain else output_error(weights, rows, moments, codec, best)
    return (best, before, after) if after < before else (plain, before, before)


def candidates(mean: np.ndarray, w_scale: np.ndarray, grid: int) -> Iterator[np.ndarray]:
    """float32 [K] scales to try, no scaling first. `mean` is s_x, `w_scale` is s_w; channels without input keep 1."""
    live = mean > 0
    yield np.ones(len(mean), np.float32)
    if not live.any():
        return
    # Ratio 0 of the first form is the one above, and ratio 1 is the same in both.
    forms = ((np.ones_like(w_scale), range(1, grid + 1)), (w_scale, range(grid)))
    for divisor, steps in forms:
        for ratio in (i / grid for i in steps):
            bottom = divisor[live] ** (1 - ratio) + np.finfo(np.float32).tiny
            scale = np.clip(mean[live] ** ratio / bottom, LEAST, MOST)
            full = np.ones(len(mean), np.float32)
            full[live] = scale / np.sqrt(scale.max() * scale.min())
            yield full


def weight_scale(weights: Sequence[np.ndarray], block: int) -> np.ndarray:
    """float64 [K] s_w: the mean over outputs of ``|w| / max|w|``, the maximum taken in blocks of `block` along K."""
    total, count = np.zeros(len(weights[0])), 0
    for weight in weights:
        starts = np.arange(0, len(weight), block)
        magnitude = np.abs(weight)
        largest = np.maximum.reduceat(magnitude, starts, axis=0) + np.finfo(np.float32).tiny
        for i, start in enumerate(starts):
            total[start : start + block] += (magnitude[start : start + block] / largest[i]).sum(
                axis=1, dtype=np.float64
            )
        count += weight.shape[1]
    return total / count


def output_error(
    weights: Sequence[np.ndarray], rows: np.ndarray, moments: np.ndarray, codec: Codec, scale: np.ndarray
) -> float:
    """``|rows @ (W - decode(encode(s W)) / s)| / |rows @ W|`` over all `weights`; 0 where the outputs are zero.

    `rows` is float32 [n, K], `moments` [K] the mean squares of all samples, `scale` float32 [K].
    """
    importance = (moments / np.square(scale, dtype=np.float64)).astype(np.float32)
    lost = size = 0.0
    for weight in weights:
        scaled = scale[:, None] * np.asarray(weight, np.float32)
        back = codec.decode(codec.encode(scaled, 1, importance=importance), weight.shape, 1) / scale[:, None]
        lost += float(np.square(rows @ (weight - back), dtype=np.float64).sum())
        size += float(np.square(rows @ weight, dtype=np.float64).sum())
    return float(np.sqrt(lost / size)) if size else 0.0
