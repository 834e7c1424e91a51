"""Symmetric int4 in blocks along the input channels: ``w ~ q * s``, q in [-7, 7], one scale for `block` rows.

The form of ONNX's DequantizeLinear with axis 0 and block_size (opset 21). -8 is not used, so that a code and its
negative are both representable. The scale is ``max|w| / 7``, or that times the factor that loses least: clipping a
block's largest weight can buy a finer step for all others (AWQ's clipping search, arxiv.org/abs/2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intaglio.quantize.arrays import float32, in_threads
from intaglio.quantize.int8 import finite, scale_of

LIMIT = 7
SEARCHES = ("absmax", "mse")
SHRINK = tuple(np.float32(v) for v in (1.0, 0.92, 0.84, 0.76, 0.66))  # 1 first: among equals the unclipped one wins
LEAST = np.float32(0.6)  # of the unclipped step a refined one is
TILE, COLUMNS = 1 << 18, 1024  # weights coded at a time: the temporary arrays stay in the cache, threads are kept busy


@dataclass(frozen=True, slots=True)
class Int4:
    """The codec of int4 linear weights [K, N] with axis 1; K is a multiple of `block`.

    ``|w - decode(encode(w))| <= error_bound * scale``. With `search` "absmax" (round to nearest) nothing is clipped and
    the bound is half a step. With "mse" it is what clipping can cost at the smallest shrink factor, and over a block
    the sum of ``importance * error**2`` is never above that of "absmax".
    """

    block: int = 64
    search: str = "mse"

    def __post_init__(self) -> None:
        if self.search not in SEARCHES or self.block < 1:
            message = f"int4 with block {self.block} and search {self.search!r}: the search is one of {SEARCHES}"
            raise ValueError(message)

    @property
    def error_bound(self) -> float:
        """Largest error of a weight in units of its block's scale."""
        return 0.5 if self.search == "absmax" else max(0.5, LIMIT * (1 / float(LEAST) - 1))

    def layout(self, shape: Sequence[int], axis: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """ONNX dtype and shape of each tensor: codes [K, N], scale [K / block, N].

        Raises:
            ValueError: not a linear weight [K, N] with axis 1, or K is no multiple of the block.
        """
        if len(shape) != 2 or axis not in (1, -1):
            message = f"int4 codes linear weights [K, N] with axis 1, not shape {tuple(shape)} with axis {axis}"
            raise ValueError(message)
        rows, columns = shape
        if rows % self.block:
            message = f"{rows} input channels do not divide into int4 blocks of {self.block}"
            raise ValueError(message)
        return {"codes": ("INT4", (rows, columns)), "scale": ("FLOAT", (rows // self.block, columns))}

    def encode(self, weight: np.ndarray, axis: int, *, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Codes int8 [K, N] of values -7 to 7 and scale float32 [K / block, N]; an all-zero block has scale 1.

        `importance` float32 [K] weighs the squared errors of the input channels; only "mse" uses it, "absmax" has
        nothing to choose. A block without any importance counts all its channels alike.

        Raises:
            ValueError: a NaN or an infinity in the weight, a shape that `layout` refuses, an importance that is not
                finite and nonnegative of shape [K].
        """
        weight = np.asarray(weight)
        _, grid = self.layout(weight.shape, axis)["scale"]
        rows, columns = weight.shape
        share = _shares(importance, rows, self.block)
        codes, scale = np.empty((rows, columns), np.int8), np.empty(grid, np.float32)

        def encode(place: tuple[slice, slice]) -> None:
            blocks, part = place
            lines = slice(blocks.start * self.block, blocks.stop * self.block)
            tile = float32(weight[lines, part])
            tile = tile.reshape(-1, self.block, tile.shape[1])
            step = scale_of(finite(np.abs(tile).max(axis=1)), LIMIT)
            if self.search == "mse":
                step = _searched(tile, step, None if share is None else share[blocks])
            quotient = tile / step[:, None]
            np.clip(np.rint(quotient, out=quotient), -LIMIT, LIMIT, out=quotient)
            codes[lines, part] = quotient.reshape(-1, tile.shape[2])
            scale[blocks, part] = step

        in_threads(encode, _tiles(grid, self.block))
        return {"codes": codes, "scale": scale}

    def decode(self, tensors: Mapping[str, np.ndarray], shape: Sequence[int], axis: int) -> np.ndarray:
        """float32 [K, N]: ``codes * scale``, exactly what DequantizeLinear computes; codes int8 or ml_dtypes.int4.

        Raises:
            ValueError: a shape that `layout` refuses.
        """
        _, (blocks, columns) = self.layout(shape, axis)["scale"]
        codes = np.asarray(tensors["codes"]).astype(np.int8, copy=False).reshape(blocks, self.block, columns)
        scale = tensors["scale"].reshape(blocks, 1, columns)
        value: np.ndarray = np.multiply(codes, scale, dtype=np.float32).reshape(tuple(shape))
        return value


def _tiles(grid: tuple[int, ...], block: int) -> Iterator[tuple[slice, slice]]:
    """(blocks, columns) of each tile of a weight with this grid of scales, about TILE weights each."""
    blocks, columns = grid
    wide = min(columns, COLUMNS)
    high = max(1, TILE // (block * wide))
    for top in range(0, blocks, high):
        for left in range(0, columns, wide):
            yield slice(top, min(top + high, blocks)), slice(left, left + wide)


def _shares(importance: np.ndarray | None, rows: int, block: int) -> np.ndarray | None:
    """Importance [K / block, block, 1] float32 with 1 as the largest of each block; None: all count alike."""
    if importance is None:
        return None
    value = np.asarray(importance, np.float32)
    if value.shape != (rows,) or not (np.isfinite(value) & (value >= 0)).all():
        message = f"importance has shape {value.shape}; a weight with {rows} rows takes {rows} finite numbers from 0 up"
        raise ValueError(message)
    value = value.reshape(-1, block, 1)
    largest = value.max(axis=1, keepdims=True)
    value = np.where(largest > 0, value, 1)
    share: np.ndarray = value / np.where(largest > 0, largest, 1)
    return share


def _searched(tile: np.ndarray, step: np.ndarray, share: np.ndarray | None) -> np.ndarray:
    """The step [blocks, columns] times the factor that loses least, by SHRINK and then by least squares.

    With codes q of weights u the best step is ``s = <u, q> / <q, q>`` and the squared error ``<u, u> - s (2 <u, q> -
    s <q, q>)``, weighted by `share`, so that each of SHRINK is judged by the best step for its codes. Coding with a
    better step and finding the best step for codes both never add to the error. All is measured in units of `step`, so
    that neither huge nor tiny weights leave float32's range.
    """
    units = tile / step[:, None]
    codes = np.empty_like(units)
    factor, most = np.ones_like(step), np.full_like(step, -1)

    def refined(shrink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best factor for the codes at a factor [blocks, columns] or [], and what it takes off the error."""
        np.multiply(units, 1 / (shrink[:, None] if shrink.ndim else shrink), out=codes)
        np.clip(np.rint(codes, out=codes), -LIMIT, LIMIT, out=codes)
        inner, square = _product(units, codes, share), _product(codes, codes, share)
        found = np.divide(inner, square, out=np.ones_like(inner), where=square > 0)
        found = np.maximum(found, LEAST)
        return found, found * (2 * inner - found * square)

    for value in SHRINK:
        found, gain = refined(np.asarray(value))
        better = gain > most
        np.copyto(most, gain, where=better)
        np.copyto(factor, found, where=better)
    chosen: np.ndarray = np.maximum(step * refined(factor)[0], np.finfo(np.float32).tiny)
    return chosen


def _product(a: np.ndarray, b: np.ndarray, share: np.ndarray | None) -> np.ndarray:
    """float32 [blocks, columns]: the sum of ``a * b * share`` over a block."""
    if share is None:
        return np.asarray(np.einsum("bkc,bkc->bc", a, b))
    return np.asarray(np.einsum("bkc,bkc,bk->bc", a, b, share[:, :, 0]))


BLOCK_32, BLOCK_64, BLOCK_128 = Int4(32), Int4(64), Int4(128)
RTN_32, RTN_64, RTN_128 = Int4(32, "absmax"), Int4(64, "absmax"), Int4(128, "absmax")
