"""Family profiles: ``family.X.toml``, the numerics and defaults of one model family."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from intaglio.profiles.errors import ProfileError
from intaglio.profiles.spec import Range
from intaglio.profiles.strict import from_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """Numerics of one component, each with its source.

    Attributes:
        dtype: compute dtype where the hardware has it.
        allowed: what ``--dtype`` may ask for.
        float32_ops: ONNX operator types that compute in float32 whatever the dtype.
        float32_parameters: glob patterns of parameter names; the operators that read them compute in float32.
        activations_scale_factor: OpenVINO divides activations by it in float16; 0 leaves them alone.
        keep: glob patterns of parameter names that are not quantized.
        int8: glob patterns of parameter names that go no lower than int8 weight-only.
        static_activations: whether activations of this component may be quantized statically; where not, w8a8 and fp8
            mean their weight-only counterparts.
        tolerance: relative L2 to torch in float32.
        tensorrt_profiles: ``range`` is one profile over all shapes, ``batches`` adds two fixed at one and two images.
        source: why.
    """

    dtype: str = "float32"
    allowed: tuple[str, ...] = ("float16", "bfloat16", "float32")
    float32_ops: tuple[str, ...] = ()
    float32_parameters: tuple[str, ...] = ()
    activations_scale_factor: float = 0.0
    keep: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    static_activations: bool = True
    tolerance: float = 1e-4
    tensorrt_profiles: str = "batches"
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a dtype that is not allowed."""
        if self.dtype not in self.allowed:
            raise ProfileError(f"contract dtype {self.dtype!r} is not among the allowed {self.allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A distillation of the family: `settings` over the checkpoint's own, `scheduler`, if any, in place of its own."""

    settings: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One ``family.X.toml``; `presets` are what ``--set X.preset=`` may name."""

    name: str
    pipelines: tuple[str, ...]
    shapes: dict[str, Range]
    defaults: dict[str, Any]
    contract: dict[str, Contract] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=dict)


def load_family(name: str) -> Family:
    """Read the profile of a family.

    Raises:
        ProfileError: there is none, or it has unknown keys.
    """
    file = resources.files("intaglio.profiles") / f"family.{name}.toml"
    if not file.is_file():
        raise ProfileError(f"no profile for the family {name!r}")
    return from_dict(Family, tomllib.loads(file.read_text(encoding="utf-8")), f"family.{name}.toml")


def parse_assignments(pairs: Mapping[str, str] | list[str]) -> dict[str, str]:
    """``["tensorrt.sm=sm89"]`` as a dict.

    Raises:
        ProfileError: a pair has no ``=``.
    """
    if isinstance(pairs, Mapping):
        return dict(pairs)
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ProfileError(f"--set {pair!r} is not KEY=VALUE; for example --set tensorrt.sm=sm89,sm120")
        result[key.strip()] = value.strip()
    return result
