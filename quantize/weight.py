"""One weight on its way into a graph: read, smoothed, coded when its codes are asked for, given away."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from intaglio.profiles.errors import NumericsError
from intaglio.quantize.formats import codec
from intaglio.quantize.layers import Layer

LOW_RANK = ("low_rank_a", "low_rank_b")
CODING = ThreadPoolExecutor(1, "coding")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScales:
    """What calibration found for the input of one layer.

    Attributes:
        smooth: factor [K] float32 the weight's input channels are multiplied with and the input divided by; ``None``:
            neither.
        activation: static scale of the (smoothed) input.
        importance: mean square [K] of the (smoothed) input, for searches.
    """

    smooth: np.ndarray | None = None
    activation: float | None = None
    importance: np.ndarray | None = None


class BadWeight(NumericsError):
    """A weight with NaN or infinity; `parameter` is its name in the checkpoint."""

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter


@dataclass(slots=True)
class Weight:
    """One weight as it will be stored: tensors by role, made when the first is asked for and given away one by one.

    Writers ask for the codes first, then for the small tensors behind them, so that one weight is held at a time, and
    after `in_advance` the next one.
    """

    layer: Layer
    format: str
    method: str
    scales: InputScales
    rank: int
    held: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    following: Weight | None = field(default=None, repr=False)
    begun: Future[dict[str, np.ndarray]] | None = field(default=None, repr=False)

    @property
    def axis(self) -> int:
        """Output channels of the weight as it is encoded."""
        return 0 if self.layer.op in ("Conv", "Gather") else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as it is encoded."""
        return self.layer.shape[1::-1] if self.layer.pointwise else self.layer.shape

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """ONNX dtype and shape by role."""
        rows = codec(self.format, self.method).layout(self.shape, self.axis)
        if self.rank:
            k, n = self.shape
            rows |= {LOW_RANK[0]: ("FLOAT16", (k, self.rank)), LOW_RANK[1]: ("FLOAT16", (self.rank, n))}
        return rows

    def tensor(self, role: str) -> np.ndarray:
        """One of them.

        Raises:
            BadWeight: the weight has a NaN or an infinity.
        """
        if role not in self.held:
            try:
                self.held = self._encode() if self.begun is None else self.begun.result()
            except ValueError as error:
                raise BadWeight(self.layer.parameter, str(error)) from error
            self.begun = None
            if self.following is not None and not self.following.held:
                self.following.begin()
        return self.held.pop(role)

    def begin(self) -> None:
        """Start to code it, in a thread of its own."""
        self.begun = CODING.submit(self._encode)

    def _encode(self) -> dict[str, np.ndarray]:
        scales = self.scales
        weight = self.layer.view() if scales.smooth is None and not self.rank else self.layer.read()
        if scales.smooth is not None:
            weight = weight * along_inputs(scales.smooth, weight.ndim)
        pair = codec(self.format, self.method)
        if not self.rank:
            return pair.encode(weight, self.axis, importance=scales.importance)
        from intaglio.quantize.low_rank import correct

        found = correct(weight, pair, self.axis, self.rank, importance=scales.importance)
        self.errors = {"without": found[3], "with": found[4]}
        return {**found[0], LOW_RANK[0]: found[1], LOW_RANK[1]: found[2]}


def in_advance(weights: Iterable[Weight]) -> None:
    """Let each of these be coded while the one before it is packed and written, which leaves a core idle."""
    for weight, following in itertools.pairwise(weights):
        weight.following = following


def along_inputs(factor: np.ndarray, rank: int) -> np.ndarray:
    """A factor [K] as it multiplies a weight's input channels: of [K, N], or of a convolution's [M, C, kh, kw]."""
    return factor[:, None] if rank == 2 else factor.reshape(1, -1, *[1] * (rank - 2))
