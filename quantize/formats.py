"""The table of number formats, and the table of what each target does with them.

Code, tests and the support page read these two tables; nothing else knows which combination works.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from intaglio.profiles.errors import Unsupported
from intaglio.profiles.registry import pick, resolve

How = Literal["native", "lowered", "stored-only", "unsupported"]
OPS = ("MatMul", "Conv", "Gather")
TARGETS = ("onnxruntime", "openvino", "tensorrt", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to store a weight, and what its input is quantized to.

    Attributes:
        bits: a weight takes, scales included.
        block: weights that share a scale; 0: one scale per output channel.
        codebook: what a code stands for.
        storage: ONNX dtype of the codes.
        codec: ``module:name`` of the pure NumPy pair; ``rtn`` the one that takes the largest value of a block as it is.
        activations: ONNX dtype of the static activations; empty: they stay float.
        weight_only: the same weights without static activations.
        low_rank: whether a low-rank branch pays beside it.
        others: operator to the format its weights take instead.
        smaller: the format of a MatMul weight whose input channels are no multiple of the block; empty where blocks may
            run over rows, as nf4's do.
    """

    bits: float
    block: int = 0
    codebook: str = "integers"
    storage: str = "INT8"
    codec: str | None = None
    rtn: str | None = None
    activations: str = ""
    weight_only: str = ""
    low_rank: bool = True
    others: tuple[tuple[str, str], ...] = ()
    smaller: str = ""

    @property
    def static(self) -> bool:
        """Whether inputs are quantized with calibrated scales."""
        return bool(self.activations)


INT8_ELSEWHERE = (("Conv", "int8"), ("Gather", "int8"))  # of formats that only matrix products have
FORMATS: dict[str, Format] = {
    "none": Format(bits=32, codebook="checkpoint's own", storage="checkpoint's dtype"),
    "int8": Format(bits=8, codec="intaglio.quantize.int8:CODEC", low_rank=False),
    "w8a8": Format(
        bits=8,
        codec="intaglio.quantize.int8:CODEC",
        activations="INT8",
        weight_only="int8",
        others=(("Gather", "int8"),),
    ),
    "int4": Format(
        bits=4.5,
        block=64,
        storage="INT4",
        codec="intaglio.quantize.int4:BLOCK_64",
        rtn="intaglio.quantize.int4:RTN_64",
        others=INT8_ELSEWHERE,
        smaller="int4-32",
    ),
    "int4-32": Format(
        bits=5,
        block=32,
        storage="INT4",
        codec="intaglio.quantize.int4:BLOCK_32",
        rtn="intaglio.quantize.int4:RTN_32",
        others=INT8_ELSEWHERE,
        smaller="int8",
    ),
    "int4-128": Format(
        bits=4.25,
        block=128,
        storage="INT4",
        codec="intaglio.quantize.int4:BLOCK_128",
        rtn="intaglio.quantize.int4:RTN_128",
        others=INT8_ELSEWHERE,
        smaller="int4",
    ),
    "nf4": Format(
        bits=4.5,
        block=64,
        codebook="normal quantiles",
        storage="UINT8",
        codec="intaglio.quantize.nf4:CODEC",
        others=INT8_ELSEWHERE,
    ),
    "nf4-double": Format(
        bits=4.13,
        block=64,
        codebook="normal quantiles",
        storage="UINT8",
        codec="intaglio.quantize.nf4:DOUBLE",
        others=INT8_ELSEWHERE,
    ),
    "fp8": Format(
        bits=8,
        codebook="e4m3",
        storage="FLOAT8E4M3FN",
        codec="intaglio.quantize.fp8:CODEC",
        activations="FLOAT8E4M3FN",
        weight_only="fp8-weight-only",
        others=INT8_ELSEWHERE,
    ),
    "fp8-weight-only": Format(
        bits=8,
        codebook="e4m3",
        storage="FLOAT8E4M3FN",
        codec="intaglio.quantize.fp8:CODEC",
        others=INT8_ELSEWHERE,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """How a target treats a format in an operator, and whether that is faster than fp32 there.

    `faster` is ``None`` where it could not be measured.
    """

    how: How
    faster: bool | None
    reason: str


def _support() -> dict[tuple[str, str, str], Support]:
    """The table by (format, operator, target); formats that differ in block size alone share rows."""
    rows: dict[tuple[str, str, str], Support] = {}
    for (names, op, target), row in SUPPORT_ROWS.items():
        for name in names.split():
            rows[name, op, target] = row
    for name in FORMATS:
        if FORMATS[name].codec:
            for op in OPS:
                rows[name, op, "torch"] = Support(
                    how="stored-only", faster=False, reason="the reference computes on decoded weights"
                )
    return rows


INT4, NF4 = "int4 int4-32 int4-128", "nf4 nf4-double"
SUPPORT_ROWS: dict[tuple[str, str, str], Support] = {
    ("int8", "MatMul", "onnxruntime"): Support(
        how="lowered",
        faster=False,
        reason="decoded just before use, float32 arithmetic: 0.7 to 0.8x at 1,000 tokens; MatMulNBits with "
        "dynamic-per-token activations, 1.0 to 1.3x",
    ),
    (INT4, "MatMul", "onnxruntime"): Support(
        how="native", faster=False, reason="MatMulNBits in float32 arithmetic: 0.9 to 1.4x at 1,000 tokens"
    ),
    (NF4, "MatMul", "onnxruntime"): Support(
        how="lowered", faster=False, reason="MatMulBnb4 on the same nibbles: 0.9 to 1.0x at 1,000 tokens"
    ),
    ("w8a8", "MatMul", "onnxruntime"): Support(
        how="lowered",
        faster=True,
        reason="u8 activations (codes + 128) and MatMulIntegerToFloat; several times fp32 with VNNI or AMX",
    ),
    ("fp8 fp8-weight-only", "MatMul", "onnxruntime"): Support(
        how="stored-only", faster=False, reason="decoded just before use: 0.8x at 1,000 tokens"
    ),
    ("int8", "Conv", "onnxruntime"): Support(
        how="stored-only", faster=False, reason="decoded just before use: 0.7 to 0.9x"
    ),
    ("w8a8", "Conv", "onnxruntime"): Support(
        how="lowered", faster=True, reason="unfolded input and MatMulIntegerToFloat: 1.4 to 4x for 3x3"
    ),
    ("int8", "Gather", "onnxruntime"): Support(
        how="lowered", faster=False, reason="codes and scales are gathered, then multiplied"
    ),
    ("int8", "MatMul", "openvino"): Support(
        how="native",
        faster=False,
        reason="FullyConnected with i8 weights: 0.8 to 1.1x at 1,000 tokens, 1.4 to 2.2x with dynamic-per-token, 3.5x "
        "at one token",
    ),
    (INT4, "MatMul", "openvino"): Support(
        how="native",
        faster=False,
        reason="FullyConnected with i4 weights: 0.9 to 1.1x at 1,000 tokens, 1.4 to 2.2x with dynamic-per-token, 3.8x "
        "at one token",
    ),
    (NF4, "MatMul", "openvino"): Support(
        how="lowered", faster=False, reason="FullyConnected with nf4 weights: 0.9 to 1.1x at 1,000 tokens"
    ),
    ("w8a8", "MatMul", "openvino"): Support(
        how="native", faster=True, reason="FullyConnected i8 x i8; several times fp32 where the CPU has VNNI or AMX"
    ),
    ("fp8", "MatMul", "openvino"): Support(
        how="stored-only", faster=False, reason="decoded to float32 at load: 0.8 to 0.9x"
    ),
    ("fp8-weight-only", "MatMul", "openvino"): Support(
        how="stored-only", faster=False, reason="decoded to float32 at load: 1.0x"
    ),
    ("int8", "Conv", "openvino"): Support(how="stored-only", faster=False, reason="decoded to float32 at load: 1.0x"),
    ("w8a8", "Conv", "openvino"): Support(
        how="native", faster=True, reason="Convolution i8 x i8; several times fp32 where the CPU has VNNI or AMX"
    ),
    ("int8", "Gather", "openvino"): Support(how="native", faster=False, reason="Gather reads the codes"),
    ("int8 fp8-weight-only", "MatMul", "tensorrt"): Support(
        how="native", faster=None, reason="codes stay packed in the plan; fp8: sm89 and newer"
    ),
    ("w8a8 fp8", "MatMul", "tensorrt"): Support(
        how="native", faster=None, reason="codes stay packed, activations in 8 bits; fp8: sm89 and newer"
    ),
    (INT4, "MatMul", "tensorrt"): Support(how="native", faster=None, reason="codes stay packed; sm80 and newer"),
    (NF4, "MatMul", "tensorrt"): Support(how="stored-only", faster=False, reason="decoded to the compute dtype"),
    ("int8 w8a8", "Conv", "tensorrt"): Support(how="native", faster=None, reason="codes stay packed in the plan"),
    ("int8", "Gather", "tensorrt"): Support(how="native", faster=None, reason="codes stay packed in the plan"),
}
SUPPORT = _support()


class Codec(Protocol):
    """A pure NumPy pair.

    Linear weights are float32 [K, N] with `axis` 1, the output channels; convolutions [M, C, kH, kW] with `axis` 0.
    Tensors go by role, ``codes`` first.
    """

    error_bound: float

    def layout(self, shape: tuple[int, ...], axis: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """ONNX dtype and shape of every tensor `encode` returns for a weight of `shape`."""

    def encode(self, weight: np.ndarray, axis: int, *, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The weight's tensors; `importance` [K] weighs the error of each input channel where a search is made.

        Raises:
            ValueError: the weight has a NaN or an infinity, or a shape the format does not have.
        """

    def decode(self, tensors: dict[str, np.ndarray], shape: tuple[int, ...], axis: int) -> np.ndarray:
        """The float32 weight of `shape` they stand for."""


def codec(name: str, method: str = "mse") -> Codec:
    """The codec of a format.

    Raises:
        UsageError: there is no such format.
        Unsupported: the format stores weights as they are.
    """
    row = pick(FORMATS, name, "format")
    path = row.rtn if method == "rtn" and row.rtn else row.codec
    if path is None:
        raise Unsupported(f"format {name!r} has no codes")
    module: Codec = resolve(path)
    return module


def format_for(name: str, op: str, inputs: int = 0) -> str:
    """The format a weight takes where `name` was asked for: by its operator and, of a MatMul, its input channels."""
    name = dict(FORMATS[name].others).get(op, name)
    if op != "MatMul":
        return name
    while FORMATS[name].smaller and inputs % FORMATS[name].block:
        name = FORMATS[name].smaller
    return name


def check_formats(names: Iterable[str], targets: tuple[str, ...]) -> list[str]:
    """Refuse unsupported pairs; return one remark for each that is smaller but not faster.

    Raises:
        UsageError: an unknown format.
        Unsupported: a target cannot carry a format; with the nearest that it can.
    """
    remarks = []
    for name in sorted(set(names) - {"none"}):
        pick(FORMATS, name, "format")
        for target in targets:
            for op in ("MatMul", "Conv"):
                carried = format_for(name, op)
                row = SUPPORT.get((carried, op, target))
                if row is None or row.how == "unsupported":
                    near = nearest(name, target)
                    raise Unsupported(
                        f"{target} does not carry {carried} in {op}: {row.reason if row else 'not in the table'}; "
                        f"the nearest that works there is {near}"
                    )
                if not row.faster:
                    word = "smaller, not faster" if row.faster is False else "smaller, speed not measured"
                    remarks.append(f"{name}: {carried} {op} on {target}: {word} ({row.reason})")
    return list(dict.fromkeys(remarks))


def nearest(name: str, target: str) -> str:
    """The format closest in bits that a target carries in MatMul and Conv."""

    def carried(candidate: str) -> bool:
        rows = [SUPPORT.get((format_for(candidate, op), op, target)) for op in ("MatMul", "Conv")]
        return all(row is not None and row.how != "unsupported" for row in rows)

    others = [n for n in FORMATS if n not in (name, "none") and carried(n)]
    return min(others, key=lambda n: abs(FORMATS[n].bits - FORMATS[name].bits), default="none")
