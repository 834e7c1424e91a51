"""float8 e4m3fn, one scale per output channel: ``w ~ q * s``, ``s = max|w| / 448``, q a float8 (OCP, no infinity).

Equal to ONNX's QuantizeLinear and DequantizeLinear with a FLOAT8E4M3FN zero point of 0: the quotient is rounded to the
nearest float8, ties to even; the scale leaves none to saturate (onnx.ai/onnx/technical/float8.html).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intaglio.quantize.arrays import float32
from intaglio.quantize.int8 import broadcast, channel_peak, row_slices, scale_of

LIMIT = 448  # the largest float8 e4m3fn: 1.75 * 2**8


@dataclass(frozen=True, slots=True)
class Fp8:
    """The codec of float8 weights, linear ([K, N], axis 1) or convolution ([M, C, kh, kw], axis 0).

    ``|w - decode(encode(w))| <= max(error_bound * |w|, subnormal_bound * scale)``: half a step of three mantissa bits,
    or half the step 2**-9 below 2**-6, the smallest normal number. With `per_tensor` one scale serves all channels.
    """

    per_tensor: bool = False

    error_bound: ClassVar[float] = 2**-4
    subnormal_bound: ClassVar[float] = 2**-10

    def layout(self, shape: Sequence[int], axis: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """ONNX dtype and shape of each tensor: codes of the weight's shape, one scale per channel or one scalar."""
        return {
            "codes": ("FLOAT8E4M3FN", tuple(shape)),
            "scale": ("FLOAT", () if self.per_tensor else (shape[axis],)),
        }

    def encode(self, weight: np.ndarray, axis: int, *, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Codes ml_dtypes.float8_e4m3fn of the weight's shape and scale float32 [weight.shape[axis]] or [].

        An all-zero channel has scale 1. `importance` changes nothing: the relative step of a float8 is the same at
        every scale.

        Raises:
            ValueError: the weight has a NaN or an infinity.
        """
        from ml_dtypes import float8_e4m3fn

        weight = float32(weight)
        peak = channel_peak(weight, axis)
        scale = scale_of(peak.max() if self.per_tensor else peak, LIMIT)
        divisor = np.broadcast_to(broadcast(scale, weight.ndim, axis), weight.shape)
        codes = np.empty(weight.shape, float8_e4m3fn)
        for part in row_slices(weight.shape):
            # nothing saturates: but for a rounding no quotient is above 448, and 464 is the first that rounds higher
            codes[part] = (weight[part] / divisor[part]).astype(float8_e4m3fn)
        return {"codes": codes, "scale": scale}

    def decode(self, tensors: Mapping[str, np.ndarray], shape: Sequence[int], axis: int) -> np.ndarray:
        """float32 `shape`: ``codes * scale``, exactly what DequantizeLinear computes."""
        value = np.asarray(tensors["codes"]).reshape(tuple(shape)).astype(np.float32)
        value *= broadcast(tensors["scale"], value.ndim, axis)
        return value


CODEC = Fp8()
PER_TENSOR = Fp8(per_tensor=True)
