"""Tensor facts: names, dtypes, symbolic shapes, and the ranges their axes may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from intaglio.profiles.errors import ProfileError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What an axis may be: `min` to `max` in steps of `multiple`; engines are tuned at `opt`.

    Units: images for ``batch``, pixels for ``height`` and ``width``, tokens for ``tokens``.
    """

    min: int
    opt: int
    max: int
    multiple: int = 1

    def __post_init__(self) -> None:
        """Refuse an empty or inconsistent range."""
        if not 0 < self.min <= self.opt <= self.max or any(v % self.multiple for v in (self.min, self.opt, self.max)):
            raise ProfileError(f"shape range {self} needs min <= opt <= max, all multiples of {self.multiple}")

    def check(self, axis: str, value: int) -> None:
        """Refuse a value outside the range.

        Raises:
            UsageError: with the value, the range and the nearest value that is allowed.
        """
        if self.min <= value <= self.max and value % self.multiple == 0:
            return
        near = min(max(round(value / self.multiple) * self.multiple, self.min), self.max)
        step = f" in steps of {self.multiple}" if self.multiple > 1 else ""
        raise UsageError(f"{axis} {value} is not allowed: {self.min} to {self.max}{step}; the nearest is {near}")


Ranges = Mapping[str, Range]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a component.

    `shape` holds numbers and axis expressions: ``"batch"``, ``"tokens"``, ``"height"`` (pixels) or ``"height/8"``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sizes(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with its axes replaced: ``{"batch": 2, "height": 512}`` makes ``"height/8"`` 64."""
        return tuple(d if isinstance(d, int) else axis_size(d, values) for d in self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def split_axis(expression: str) -> tuple[str, int]:
    """``"height/8"`` is ``("height", 8)``; ``"batch"`` is ``("batch", 1)``."""
    axis, _, divisor = expression.partition("/")
    return axis, int(divisor or 1)


def axis_size(expression: str, values: Mapping[str, int]) -> int:
    """The size of one axis expression at given axis values."""
    axis, divisor = split_axis(expression)
    return values[axis] // divisor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one initializer lies in ``model.onnx.data``: dtype name of ONNX, shape, byte offset and length."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBinding:
    """How a checkpoint parameter became initializers.

    Attributes:
        initializer: the weight itself, or its codes.
        transform: ``none``, ``transpose``, ``last_frame`` (of a causal 3D kernel) or ``scaled`` (a norm's weights that
            took a smoothing factor).
        format: a row of FORMATS.
        parts: further initializers by role: ``scale``, ``absmax_codes``, ``low_rank_a``, ``low_rank_b``.
        smooth: initializer [K] the input is multiplied with before it meets the codes.
        activation: initializer of the static scale the input is quantized with.
    """

    initializer: str
    transform: str = "none"
    format: str = "none"
    parts: dict[str, str] = field(default_factory=dict)
    smooth: str | None = None
    activation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a component is at its nominal format (or at the floor its family sets).

    Attributes:
        weights: share of the bytes (as float32) of MatMul weights, 0 to 1.
        all_weights: the same of MatMul and Conv weights.
        macs: share of multiply-accumulates of MatMul and Conv, where calibration counted them.
        exceptions: parameter to ``format: reason``.
    """

    weights: float
    all_weights: float
    macs: float | None = None
    exceptions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a component was quantized.

    Attributes:
        activations: ``exact``, ``dynamic-per-token`` or ``static``; engines are set to it explicitly.
        recipe: the component's recipe, complete.
        coverage: see `Coverage`.
        calibration: sha256 of the recorded feeds, and how they came about; empty where nothing was calibrated.
        low_rank: weighted error of the weights without and with the low-rank branch, where there is one.
    """

    activations: str
    recipe: dict[str, Any]
    coverage: Coverage
    calibration: dict[str, Any] = field(default_factory=dict)
    low_rank: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """A component as the manifest states it; `quantization` is ``None`` where weights are the checkpoint's own."""

    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    format: str
    targets: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    weights: dict[str, WeightBinding]
    quantization: Quantization | None = None
