"""The scale of a tensor that is quantized as a whole, the same at every timestep: three ways to choose its clip.

A static scale maps ``x`` to ``round(x / s)`` and clips at ``s * levels``. A large clip rounds coarsely, a small one
cuts outliers off. ``absmax`` cuts nothing; ``percentile`` cuts a fixed share (both: Wu et al., arXiv:2004.09602);
``mse`` weighs both errors on the samples (Choukroun et al., arXiv:1902.06822).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from intaglio.profiles.registry import pick

PERCENTILE = 99.99
COARSE, FINE = 24, 16  # candidates from the peak downwards, then between the neighbours of the best
LOWEST = 1 / 64  # of the peak; int8 with a lower clip would lose to absmax on any tensor with values near its peak
CHUNK = 1 << 16  # values that stay in the processor's cache


def round_int(x: np.ndarray, out: np.ndarray) -> None:
    """Nearest integer, ties to even, as QuantizeLinear rounds to int8."""
    np.rint(x, out=out)


def round_e4m3(x: np.ndarray, out: np.ndarray) -> None:
    """Nearest float8_e4m3fn of float32 values of magnitude up to 448, ties to even (arXiv:2209.05433).

    Three mantissa bits remain of float32's 23; below 2^-6, where e4m3 is subnormal, the values are multiples of 2^-9.
    """
    bits = x.view(np.uint32)
    half = np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))
    normal = ((bits + half) & np.uint32(0xFFF00000)).view(np.float32)
    subnormal = np.rint(x * np.float32(512)) / np.float32(512)
    out[...] = np.where(np.abs(x) < np.float32(2**-6), subnormal, normal)


ROUNDINGS: dict[int, Callable[[np.ndarray, np.ndarray], None]] = {127: round_int, 448: round_e4m3}
"""The largest code of an activation format and how it rounds: int8 and float8_e4m3fn."""


def absmax(samples: np.ndarray, top: float, levels: int) -> float:
    """Clip nothing: `top`, the largest magnitude seen."""
    del samples, levels
    return top


def percentile(samples: np.ndarray, top: float, levels: int) -> float:
    """Clip at the 99.99th percentile of the magnitudes; where that is zero it says nothing, and `top` is taken."""
    del levels
    value = float(np.percentile(np.abs(samples), PERCENTILE, overwrite_input=True))
    return min(value, top) if value > 0 else top


def mse(samples: np.ndarray, top: float, levels: int) -> float:
    """Clip where the mean squared error of the samples is least; `top` itself is a candidate and wins a tie.

    A geometric grid from `top` down to `top` / 64, then a finer one between the neighbours of its best point.
    """
    coarse = np.geomspace(1, LOWEST, COARSE)
    best = int(np.argmin(squared_errors(samples, top, coarse, levels)))
    around = np.geomspace(coarse[max(best - 1, 0)], coarse[min(best + 1, COARSE - 1)], FINE)
    shares = np.sort(np.append(around, coarse[best]))[::-1]
    return top * float(shares[np.argmin(squared_errors(samples, top, shares, levels))])


RANGES: dict[str, Callable[[np.ndarray, float, int], float]] = {"absmax": absmax, "percentile": percentile, "mse": mse}
"""How to choose the clip of (samples, largest magnitude, levels)."""


def squared_errors(samples: np.ndarray, top: float, shares: np.ndarray, levels: int) -> np.ndarray:
    """float64 [shares]: the sum of ``((x - quantized x) / top)^2`` over the samples, clipped at each share of `top`.

    In units of `top`, so that neither huge nor tiny activations leave float32's range; in constant memory.
    """
    rounding = ROUNDINGS[levels]
    total = np.zeros(len(shares))
    flat = samples.reshape(-1)
    code, back = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, flat.size, CHUNK):
        units = np.abs(flat[start : start + CHUNK]) / np.float32(top)
        c, b = code[: units.size], back[: units.size]
        for i, share in enumerate(shares):
            np.multiply(units, np.float32(levels / share), out=c)
            np.minimum(c, np.float32(levels), out=c)
            rounding(c, b)
            np.multiply(b, np.float32(share / levels), out=b)
            np.subtract(units, b, out=b)
            np.multiply(b, b, out=b)
            total[i] += float(b.sum(dtype=np.float32))
    return total


def activation_scale(samples: np.ndarray, peak: np.ndarray, *, method: str = "mse", levels: int = 127) -> float:
    """The symmetric scale of a tensor quantized as a whole: a positive number that float32 holds exactly.

    Args:
        samples: float32 [n, K], rows of the tensor drawn from all timesteps and prompts.
        peak: float32 [K] (or a scalar), the largest magnitude of each channel over everything seen.
        method: a row of RANGES.
        levels: 127 for int8, 448 for float8_e4m3fn.

    An all-zero tensor has scale 1.

    Raises:
        UsageError: an unknown method.
        ValueError: other levels, no samples, a NaN or an infinity.
    """
    choose = pick(RANGES, method, "range method")
    if levels not in ROUNDINGS:
        message = f"levels {levels}: one of {', '.join(map(str, ROUNDINGS))}"
        raise ValueError(message)
    samples = np.asarray(samples, np.float32)
    if samples.size == 0 or np.size(peak) == 0:
        message = "a range needs samples and a peak, and one of them is empty"
        raise ValueError(message)
    top = max(float(np.max(np.abs(peak))), float(samples.max()), -float(samples.min()))
    # Python's max() drops a NaN that is not its first argument.
    if not (np.isfinite(top) and np.isfinite(samples.max()) and np.isfinite(samples.min())):
        message = "activations with NaN or infinity cannot be quantized"
        raise ValueError(message)
    if top == 0:
        return 1.0
    clip = np.float32(choose(samples, top, levels))
    # A subnormal scale would be flushed to zero by some engines.
    return float(max(clip / np.float32(levels), np.finfo(np.float32).tiny))


def some_rows(samples: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` rows of `samples` [n, K] in their order, drawn without replacement and always the same."""
    if len(samples) <= limit:
        return samples
    # RandomState: NumPy promises that its stream never changes. Even steps could beat with the order of recording.
    rows = np.random.RandomState(0).permutation(len(samples))[:limit]
    return samples[np.sort(rows)]


def some_columns(weights: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Columns of each of `weights` [K, N], about `limit` in all and of each in proportion to its width."""
    width = sum(weight.shape[1] for weight in weights)
    if width <= limit:
        return list(weights)
    return [np.ascontiguousarray(some_rows(w.T, max(1, limit * w.shape[1] // width)).T) for w in weights]
