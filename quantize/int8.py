"""Symmetric int8, one scale per output channel: ``w ~ q * s``, ``s = max|w| / 127``, q in [-127, 127].

The form ONNX's DequantizeLinear defines (onnx.ai/onnx/operators/onnx__DequantizeLinear.html) with no zero point.
-128 is not used, so that a code and its negative are both representable.
"""

from __future__ import annotations

import numpy as np

LIMIT = 127


class Int8:
    """The codec of the ``int8`` row of FORMATS."""

    def encode(self, weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes int8 of the weight's shape and float32 scales [weight.shape[axis]]; an all-zero channel has scale 1.

        Raises:
            ValueError: the weight has a NaN or an infinity.
        """
        weight = np.asarray(weight, np.float32)
        if not np.isfinite(weight).all():
            message = "a weight with NaN or infinity cannot be quantized"
            raise ValueError(message)
        others = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
        peak = np.abs(weight).max(axis=others)
        scale = np.where(peak > 0, peak / np.float32(LIMIT), 1).astype(np.float32)
        # A subnormal scale would be flushed to zero by some engines; such a channel is zero to every reader.
        scale = np.maximum(scale, np.finfo(np.float32).tiny)
        codes: np.ndarray = np.rint(weight / broadcast(scale, weight.ndim, axis)).clip(-LIMIT, LIMIT).astype(np.int8)
        return codes, scale

    def decode(self, codes: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
        """float32 ``codes * scale``, exactly what DequantizeLinear computes."""
        value: np.ndarray = np.multiply(codes, broadcast(scale, codes.ndim, axis), dtype=np.float32)
        return value


def broadcast(scale: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """View scales [N] so that they multiply along `axis` of an array with `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


CODEC = Int8()
