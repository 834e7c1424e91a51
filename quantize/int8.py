"""Symmetric int8, one scale per output channel: ``w ~ q * s``, ``s = max|w| / 127``, q in [-127, 127].

The form ONNX's DequantizeLinear defines (onnx.ai/onnx/operators/onnx__DequantizeLinear.html) with no zero point.
-128 is not used, so that a code and its negative are both representable. What codecs with one scale per channel share
is here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intaglio.quantize.arrays import float32, in_threads

LIMIT = 127
SLICE = 1 << 18  # weights coded at a time, so that the temporary arrays stay in the cache
NOT_FINITE = "a weight with NaN or infinity cannot be quantized"


@dataclass(frozen=True, slots=True)
class Int8:
    """The codec of int8 weights, linear ([K, N], axis 1) or convolution ([M, C, kh, kw], axis 0).

    ``|w - decode(encode(w))| <= error_bound * scale``: rounding to nearest, nothing is clipped.
    """

    error_bound: ClassVar[float] = 0.5

    def layout(self, shape: Sequence[int], axis: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """ONNX dtype and shape of each tensor: codes of the weight's shape, one scale per output channel."""
        return {"codes": ("INT8", tuple(shape)), "scale": ("FLOAT", (shape[axis],))}

    def encode(self, weight: np.ndarray, axis: int, *, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Codes int8 of the weight's shape and scale float32 [weight.shape[axis]]; an all-zero channel has scale 1.

        `importance` changes nothing: there is one rounding to nearest and the scale follows from the largest weight.

        Raises:
            ValueError: the weight has a NaN or an infinity.
        """
        weight, axis = np.asarray(weight), axis % weight.ndim
        codes, scale = np.empty(weight.shape, np.int8), np.empty(weight.shape[axis], np.float32)

        def encode(channels: slice) -> None:
            place = (*[slice(None)] * axis, channels)
            part = float32(weight[place])
            scale[channels] = step = scale_of(channel_peak(part, axis), LIMIT)
            quotient = np.divide(part, broadcast(step, part.ndim, axis))
            codes[place] = np.rint(quotient, out=quotient)  # at most 127: the scale is the largest weight / 127

        in_threads(encode, channel_slices(weight.shape, axis))
        return {"codes": codes, "scale": scale}

    def decode(self, tensors: Mapping[str, np.ndarray], shape: Sequence[int], axis: int) -> np.ndarray:
        """float32 `shape`: ``codes * scale``, exactly what DequantizeLinear computes."""
        codes = np.asarray(tensors["codes"]).reshape(tuple(shape))
        value: np.ndarray = np.multiply(codes, broadcast(tensors["scale"], codes.ndim, axis), dtype=np.float32)
        return value


def broadcast(scale: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """View scales [N] (or one for all, []) so that they multiply along `axis` of an array with `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def finite(peak: np.ndarray) -> np.ndarray:
    """Largest absolute values, as they are: NaN and infinity in a weight come through in its peaks.

    Raises:
        ValueError: one of them is NaN or infinite.
    """
    if not np.isfinite(peak).all():
        raise ValueError(NOT_FINITE)
    return peak


def channel_peak(weight: np.ndarray, axis: int) -> np.ndarray:
    """float32 [weight.shape[axis]]: the largest absolute value of each output channel.

    Raises:
        ValueError: the weight has a NaN or an infinity.
    """
    others = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    return finite(np.maximum(weight.max(axis=others), -weight.min(axis=others)))


def scale_of(peak: np.ndarray, limit: float) -> np.ndarray:
    """float32 ``peak / limit``, the scale at which `limit` stands for `peak`; 1 where the peak is 0.

    A subnormal scale would be flushed to zero by some engines, so the smallest is the smallest normal number: weights
    that small are coded as (nearly) zero, which is what they are to every reader.
    """
    scale = np.where(peak > 0, peak / np.float32(limit), 1).astype(np.float32)
    smallest: np.ndarray = np.maximum(scale, np.finfo(np.float32).tiny)
    return smallest


def channel_slices(shape: Sequence[int], axis: int) -> Iterator[slice]:
    """Slices of the output channels of an array of this shape, about SLICE elements each."""
    step = max(1, SLICE * shape[axis] // max(1, int(np.prod(shape))))
    for start in range(0, shape[axis], step):
        yield slice(start, start + step)


def row_slices(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first axis of an array of this shape, about SLICE elements each."""
    step = max(1, SLICE * shape[0] // max(1, int(np.prod(shape))))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


CODEC = Int8()
