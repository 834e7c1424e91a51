"""A low-rank correction beside quantized weights: ``W ~ decode(codes) + A @ B`` with A [K, r] and B [r, N] in float16.

Three ways from the literature, tried in turn, the best one kept:
SVDQuant (Li et al., arXiv:2411.05007): A @ B takes the largest singular directions of W, the codes what is left;
LQER (Zhang et al., arXiv:2402.02446): the codes take W, A @ B the largest directions of their error;
LoftQ (Li et al., arXiv:2310.08659): the two steps in alternation, here from SVDQuant's beginning, which is the better.
The norm is weighted by the mean square of each input channel, which is the error of the output where channels are
uncorrelated (the idea of L2QER in the same paper).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from intaglio.quantize.formats import Codec

ROUNDS = 3  # of alternation; each gains less: 5.0, 5.7, 6.0 dB over plain int4 on a trained UNet, rank 32
EXACT = 512  # up to this many rows or columns the SVD is LAPACK's in float64
OVERSAMPLING, POWER = 16, 2  # of the randomized range finder; 0.05 dB from the optimum on white noise, its worst case
FLOOR = 1e-3  # of the largest root mean square: what a channel weighs at least

Tensors = dict[str, np.ndarray]


def correct(
    weight: np.ndarray, codec: Codec, axis: int, rank: int, *, importance: np.ndarray | None = None
) -> tuple[Tensors, np.ndarray, np.ndarray, float, float]:
    """Codes and factors of the least weighted error; the same bits at every call.

    Args:
        weight: float32 [K, N].
        codec: how the codes are stored; it is told the importance too.
        axis: the output channels' axis, 1 for a linear layer.
        rank: columns of A, at most min(K, N).
        importance: float32 [K], the mean square of each input channel; None weighs all alike.

    Returns:
        (the codec's tensors, A float16 [K, rank], B float16 [rank, N], error before, error after): the errors are
        ``|D (W - W')| / |D W|`` in Frobenius norms, D the roots of the importance, before without A @ B. The second
        is never above the first: where no correction helps (an all-zero weight), A and B are zero.

    Raises:
        ValueError: a rank out of bounds, importance of another shape or negative, a NaN or an infinity.
    """
    weight = np.asarray(weight, np.float32)
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        message = f"rank {rank} for a weight of shape {weight.shape}: 1 to the smaller of its two sides"
        raise ValueError(message)
    if not np.isfinite(weight).all():
        message = "a weight with NaN or infinity cannot be quantized"
        raise ValueError(message)
    root = roots(importance, len(weight))
    size = norm(weight, root)
    ways = attempts(weight, codec, axis, rank, root, importance)
    plain = next(ways)
    before = plain[-1]
    _, tensors, a, b, after = min(chain([plain], ways), key=lambda way: way[-1])  # of equals the first
    return tensors, a, b, before / size if size else 0.0, after / size if size else 0.0


def attempts(
    weight: np.ndarray,
    codec: Codec,
    axis: int,
    rank: int,
    root: np.ndarray,
    importance: np.ndarray | None,
) -> Iterator[tuple[str, Tensors, np.ndarray, np.ndarray, float]]:
    """(name, tensors, A, B, weighted error) of each way, beginning with ``plain``, whose A and B are zero.

    `root` is float32 [K, 1]. The others: ``lqer``; ``svdquant``, and ``svdquant+n`` after n steps of alternation.
    """

    def coded(rest: np.ndarray) -> tuple[Tensors, np.ndarray]:
        tensors = codec.encode(rest, axis, importance=importance)
        return tensors, codec.decode(tensors, rest.shape, axis)

    tensors, back = coded(weight)
    error = weight - back
    a, b = np.zeros((len(weight), rank), np.float16), np.zeros((rank, weight.shape[1]), np.float16)
    yield "plain", tensors, a, b, norm(error, root)
    a, b = factors(error, rank, root)
    yield "lqer", tensors, a, b, norm(error - product(a, b), root)
    # Not weighted: here A @ B narrows the range of what is to be coded, whatever the channels' importance.
    a, b = factors(weight, rank, np.ones_like(root))
    for step in range(ROUNDS):
        rest = weight - product(a, b)
        tensors, back = coded(rest)
        if step == 0:
            yield "svdquant", tensors, a, b, norm(rest - back, root)
        error = weight - back
        a, b = factors(error, rank, root)
        yield f"svdquant+{step + 1}", tensors, a, b, norm(error - product(a, b), root)


def factors(matrix: np.ndarray, rank: int, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 A [K, rank], B [rank, N] of the least ``|root * (matrix - A @ B)|`` (Eckart-Young, weighted by rows).

    Each column of A is balanced with its row of B to the same largest magnitude, in the middle of float16's range.
    """
    u, s, vt = leading(root * matrix, rank)
    a, b = (u * s) / root, vt
    top_a, top_b = np.abs(a).max(axis=0), np.abs(b).max(axis=1)
    ratio = np.sqrt(np.where((top_a > 0) & (top_b > 0), top_b / np.where(top_a > 0, top_a, 1), 1))
    return (a * ratio).astype(np.float16), (b / ratio[:, None]).astype(np.float16)


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `rank` singular triplets U [K, r], s [r], Vt [r, N] of a float32 matrix.

    LAPACK's where a side is short; otherwise a randomized subspace iteration with a fixed seed (Halko, Martinsson and
    Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1).
    """
    if min(matrix.shape) <= EXACT:
        u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    if matrix.shape[0] > matrix.shape[1]:  # the orthogonalisation is over the shorter side
        u, s, vt = leading(matrix.T, rank)
        return vt.T, s, u.T
    # RandomState: NumPy promises that its stream never changes.
    start = np.random.RandomState(0).standard_normal((matrix.shape[1], min(rank + OVERSAMPLING, len(matrix))))
    basis = np.linalg.qr(matrix @ start.astype(np.float32))[0]
    for _ in range(POWER):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def roots(importance: np.ndarray | None, channels: int) -> np.ndarray:
    """float32 [K, 1]: what each row weighs, the root of its importance with a floor, the largest being 1.

    Raises:
        ValueError: another shape, a negative value, a NaN or an infinity.
    """
    if importance is None:
        return np.ones((channels, 1), np.float32)
    importance = np.asarray(importance, np.float64)
    if importance.shape != (channels,) or not np.isfinite(importance).all() or (importance < 0).any():
        message = f"importance of shape {importance.shape}: {channels} finite values, none below zero"
        raise ValueError(message)
    root = np.sqrt(importance / importance.max()) if importance.any() else np.ones(channels)
    return np.maximum(root, FLOOR).astype(np.float32)[:, None]


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 ``A @ B``, as the engine computes it from the float16 factors."""
    value: np.ndarray = a.astype(np.float32) @ b.astype(np.float32)
    return value


def norm(matrix: np.ndarray, root: np.ndarray) -> float:
    """Frobenius norm of ``root * matrix``, `root` [K, 1]; the rows' sums of squares are added in float64."""
    rows = np.einsum("ij,ij->i", matrix, matrix)  # no array of squares, and the same bits at any number of threads
    return float(np.sqrt(np.dot(np.square(root[:, 0], dtype=np.float64), rows)))
