"""NF4: four bits a weight, the 16 quantiles of a normal distribution times the largest of each 64 weights.

The data type of QLoRA (arxiv.org/abs/2305.14314) in bitsandbytes' order and arithmetic, bit for bit: blocks run over
the flattened weight with the output channels first, the first of two weights lies in the high nibble. Double
quantization stores the blocks' largest values in eight bits: less their mean, in groups of 256, on the dynamic map of
arxiv.org/abs/1511.04561.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd, prod
from typing import ClassVar

import numpy as np

from intaglio.quantize.arrays import float32
from intaglio.quantize.int8 import finite

# QLoRA, appendix E: float32 values, sorted; the code is the position
CODE_BOOK = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
THRESHOLDS = (CODE_BOOK[:-1] + CODE_BOOK[1:]) / 2  # float32; a value on a threshold takes the lower code
PAIRS = np.stack([np.repeat(CODE_BOOK, 16), np.tile(CODE_BOOK, 16)], axis=1)  # [256, 2]: the two weights of a byte
SMALLEST = np.float32(1e-38)  # bitsandbytes divides by no less
GROUP = 256  # blocks that share a scale under double quantization
STEPS = 65535  # bitsandbytes' processor kernel rounds to this grid over [-1, 1] before it looks up the dynamic map
SLICE = 1 << 18  # weights coded at a time, so that the temporary arrays stay in the cache


@dataclass(frozen=True, slots=True)
class Nf4:
    """The codec of NF4 weights of any shape; linear weights are [K, N] with axis 1.

    ``|w - decode(encode(w))| <= error_bound * absmax``, half the largest gap of the code book; with `double` plus
    ``nested_bound * absmax_scale``, half the largest gap of the dynamic map and half a step of bitsandbytes' grid.
    """

    double: bool = False
    block: int = 64

    error_bound: ClassVar[float] = float(np.diff(CODE_BOOK).max()) / 2
    nested_bound: ClassVar[float] = 0.9 / 64 / 2 + 1 / STEPS

    def layout(self, shape: Sequence[int], axis: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """ONNX dtype and shape of each tensor: packed codes, and the blocks' largest values or their own codes."""
        count = prod(shape)
        blocks = -(-count // self.block)
        codes: dict[str, tuple[str, tuple[int, ...]]] = {"codes": ("UINT8", (-(-count // 2),))}
        if not self.double:
            return codes | {"absmax": ("FLOAT", (blocks,))}
        return codes | {
            "absmax_codes": ("UINT8", (blocks,)),
            "absmax_scale": ("FLOAT", (-(-blocks // GROUP),)),
            "offset": ("FLOAT", ()),
        }

    def encode(self, weight: np.ndarray, axis: int, *, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The tensors of `layout`: codes uint8, absmax float32, or absmax_codes uint8, absmax_scale and offset float32.

        `importance` changes nothing: the scale of a block is its largest weight.

        Raises:
            ValueError: the weight has a NaN or an infinity.
        """
        moved = np.moveaxis(np.asarray(weight), axis, 0)
        codes, peaks = [], []
        for rows in _rows(moved.shape, self.block):
            code, peak = self._slice(float32(moved[rows]).reshape(-1))
            codes.append(code)
            peaks.append(peak)
        absmax = np.concatenate(peaks)
        rest = {"absmax": absmax} if not self.double else _nest(absmax)
        return {"codes": np.concatenate(codes), **rest}

    def decode(self, tensors: Mapping[str, np.ndarray], shape: Sequence[int], axis: int) -> np.ndarray:
        """float32 `shape`: ``CODE_BOOK[code] * absmax``, exactly what bitsandbytes' dequantize_4bit computes."""
        absmax = _unnest(tensors) if self.double else tensors["absmax"]
        value = np.empty(tuple(shape), np.float32)
        moved = np.moveaxis(value, axis, 0)
        row = prod(moved.shape[1:])
        for rows in _rows(moved.shape, self.block):
            start, stop = rows.start * row, rows.stop * row
            flat = np.take(PAIRS, tensors["codes"][start // 2 : -(-stop // 2)], axis=0).reshape(-1)[: stop - start]
            flat *= np.repeat(absmax[start // self.block : -(-stop // self.block)], self.block)[: flat.size]
            moved[rows] = flat.reshape(moved[rows].shape)
        return value

    def _slice(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and largest values of consecutive weights [n]; only the last slice of a weight has a partial block.

        bitsandbytes multiplies whole blocks by the reciprocal but divides the partial one, and keeps the raw largest
        value of the former (0 for zeros) but the guarded one of the latter: the bits tell them apart.
        """
        whole = part.size - part.size % self.block
        scaled = np.zeros(part.size + part.size % 2, np.float32)
        blocks = part[:whole].reshape(-1, self.block)
        peak = finite(np.abs(blocks).max(axis=1))
        np.multiply(blocks, 1 / np.maximum(peak, SMALLEST)[:, None], out=scaled[:whole].reshape(blocks.shape))
        if whole < part.size:
            last = np.maximum(finite(np.abs(part[whole:]).max()), SMALLEST)
            np.divide(part[whole:], last, out=scaled[whole : part.size])
            peak = np.append(peak, last)
        code = np.zeros(scaled.size, np.uint8)
        for threshold in THRESHOLDS:
            code += (scaled > threshold).view(np.uint8)
        return code[::2] << 4 | code[1::2], peak


def _rows(shape: tuple[int, ...], block: int) -> Iterator[slice]:
    """Slices of the output channels, about SLICE weights each, that begin at a whole block and a whole byte."""
    row = prod(shape[1:])
    unit = 2 * block // gcd(row, 2 * block)  # this many rows hold an even number of whole blocks
    step = max(1, SLICE // (row * unit)) * unit
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


@cache
def dynamic_map() -> np.ndarray:
    """float32 [256], sorted: bitsandbytes' signed dynamic map of eight bits.

    Seven decades 10**-6 to 1; the decade 10**(i - 6) has 2**i values of each sign, the centres of as many equal parts
    of [0.1, 1]; then 0 and 1. The edges count from the nearer end in fused float32 steps, as torch.linspace's do.
    """
    positive = []
    first, last = np.float32(0.1), np.float32(1)
    for i in range(7):
        step, place = np.float64((last - first) / np.float32(2**i)), np.arange(2**i + 1)
        rising, falling = first + step * place, last - step * place[::-1]
        edges = np.where(2 * place < 2**i, rising, falling).astype(np.float32)
        positive.append(np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2))
    values = np.concatenate(positive)
    return np.sort(np.concatenate([-values, values, np.array([0, 1], np.float32)]))


@cache
def _nearest() -> np.ndarray:
    """uint8 [STEPS + 1]: the code of the dynamic map next to each point of the grid over [-1, 1]."""
    entries = dynamic_map()
    grid = np.float32(-1) + np.arange(0, 2 * STEPS + 2, 2).astype(np.float32) / np.float32(STEPS)
    middles = np.float32(0.5) * (entries[:-1] + entries[1:])
    return np.searchsorted(middles, grid).astype(np.uint8)


def _nest(absmax: np.ndarray) -> dict[str, np.ndarray]:
    """Eight bits for each of absmax [blocks]: absmax_codes, absmax_scale [groups] and their mean as offset [].

    The mean is exact and rounded once; bitsandbytes' is a float32 sum whose last bits depend on its thread count.
    """
    offset = np.asarray(absmax.mean(dtype=np.float64), np.float32)
    centred = absmax - offset
    groups = np.zeros((-(-absmax.size // GROUP), GROUP), np.float32)
    groups.reshape(-1)[: absmax.size] = centred
    scale = np.abs(groups).max(axis=1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    # a group of equal values, or of values whose reciprocal overflows: scale 0, every one of them is the offset
    scale[~np.isfinite(inverse)] = 0
    inverse[scale == 0] = 0
    values = np.clip(groups * inverse[:, None], -1, 1)
    # one rounding for product and sum, as in the kernel's fused multiply-add
    place = ((values + np.float32(1)) * np.float32(0.5)).astype(np.float64) * STEPS + 0.5
    codes = _nearest()[place.astype(np.float32).astype(np.int64)]
    codes[scale == 0] = 0
    return {"absmax_codes": codes.reshape(-1)[: absmax.size], "absmax_scale": scale, "offset": offset}


def _unnest(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 absmax [blocks]: ``map[code] * scale + offset``, two roundings."""
    codes, scale = tensors["absmax_codes"], tensors["absmax_scale"]
    value: np.ndarray = dynamic_map()[codes] * np.repeat(scale, GROUP)[: codes.size] + tensors["offset"]
    return value


CODEC = Nf4()
DOUBLE = Nf4(double=True)
