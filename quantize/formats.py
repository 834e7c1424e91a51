"""The table of number formats, and the table of what each target does with them.

Code, tests and the support page read these two tables; nothing else knows which combination works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from intaglio.profiles.errors import Unsupported
from intaglio.profiles.registry import pick, resolve

How = Literal["native", "lowered", "stored-only", "unsupported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One weight format.

    `bits` a weight takes, `block` weights share a scale (0: one scale per output channel), `codec` the pure NumPy pair.
    """

    bits: int
    block: int
    symmetric: bool
    storage: str
    codec: str | None
    error_bound: float


FORMATS: dict[str, Format] = {
    # error_bound: largest |w - decode(encode(w))| in units of the scale
    "none": Format(bits=32, block=0, symmetric=True, storage="checkpoint's dtype", codec=None, error_bound=0.0),
    "int8": Format(bits=8, block=0, symmetric=True, storage="INT8", codec="intaglio.quantize.int8", error_bound=0.5),
}

TARGETS = ("onnxruntime", "openvino", "tensorrt", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """How a target treats a format in an operator, and whether that is faster than fp32 there."""

    how: How
    faster: bool
    reason: str


SUPPORT: dict[tuple[str, str, str], Support] = {
    ("int8", "MatMul", "onnxruntime"): Support(
        how="native", faster=False, reason="fused to MatMulNBits, weights stay packed; float32 arithmetic"
    ),
    ("int8", "Conv", "onnxruntime"): Support(
        how="stored-only", faster=False, reason="the CPU provider dequantizes the weight on every call"
    ),
    ("int8", "MatMul", "openvino"): Support(
        how="native", faster=True, reason="FullyConnected with i8 weights; faster where memory bandwidth decides"
    ),
    ("int8", "Conv", "openvino"): Support(
        how="stored-only", faster=False, reason="weight-only convolutions are dequantized"
    ),
    ("int8", "MatMul", "tensorrt"): Support(how="native", faster=True, reason="the plan keeps the weights packed"),
    ("int8", "Conv", "tensorrt"): Support(how="native", faster=True, reason="the plan keeps the weights packed"),
    ("int8", "MatMul", "torch"): Support(
        how="stored-only", faster=False, reason="the reference computes on decoded weights"
    ),
    ("int8", "Conv", "torch"): Support(
        how="stored-only", faster=False, reason="the reference computes on decoded weights"
    ),
}


class Codec(Protocol):
    """A pure NumPy pair. Weights are float32, the output channel axis is named by the caller."""

    def encode(self, weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the weight's shape and float32 scales of the axis' length."""

    def decode(self, codes: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
        """The float32 weight the codes stand for."""


def codec(name: str) -> Codec:
    """The codec module of a format.

    Raises:
        UsageError: there is no such format.
        Unsupported: the format stores weights as they are.
    """
    row = pick(FORMATS, name, "format")
    if row.codec is None:
        raise Unsupported(f"format {name!r} has no codes")
    module: Codec = resolve(row.codec + ":CODEC")
    return module


def check_recipe(recipe: dict[str, str], targets: tuple[str, ...]) -> list[str]:
    """Refuse unsupported pairs; return one remark for each that is stored but not faster.

    Raises:
        UsageError: an unknown format.
        Unsupported: a target cannot carry a format.
    """
    remarks = []
    for name in sorted(set(recipe.values()) - {"none"}):
        pick(FORMATS, name, "format")
        for target in targets:
            for op in ("MatMul", "Conv"):
                row = SUPPORT.get((name, op, target))
                if row is None or row.how == "unsupported":
                    raise Unsupported(
                        f"{target} does not carry {name} in {op}: {row.reason if row else 'not in the table'}"
                    )
                if not row.faster:
                    remarks.append(f"{name} {op} on {target}: smaller, not faster ({row.reason})")
    return remarks
