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
    """Numerics of one component: default compute dtype where fp16 exists, what stays fp32, what stays unquantized.

    `float32_ops` are ONNX operator types, `keep` glob patterns of parameter names; `source` says why.
    `tensorrt_profiles`: ``range`` is one profile over all shapes, ``batches`` adds two fixed at one and two images.
    """

    dtype: str = "float32"
    float32_ops: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    tolerance: float = 1e-4
    tensorrt_profiles: str = "batches"
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One ``family.X.toml``."""

    name: str
    pipelines: tuple[str, ...]
    shapes: dict[str, Range]
    defaults: dict[str, Any]
    contract: dict[str, Contract] = field(default_factory=dict)


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
