"""Tensor facts: names, dtypes, symbolic shapes, and the ranges their axes may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """How a checkpoint parameter became an initializer.

    `transform` is ``none``, ``transpose`` or ``last_frame`` (of a causal 3D kernel); `format` a row of FORMATS;
    `scale` the initializer of the scales.
    """

    initializer: str
    transform: str = "none"
    format: str = "none"
    scale: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """A component as the manifest states it; `coverage` is the quantized share of MatMul and Conv weights, 0 to 1."""

    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    format: str
    targets: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    weights: dict[str, WeightBinding]
    coverage: float
