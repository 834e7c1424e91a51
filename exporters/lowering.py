"""What a target's lowering is given and gives back, and the table of targets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from intaglio.profiles.family import Contract
from intaglio.profiles.registry import pick, resolve
from intaglio.profiles.spec import Range, TensorSpec

TARGETS = {
    "onnx": "intaglio.exporters.lower_onnx:LOWERING",
    "openvino": "intaglio.exporters.lower_openvino:LOWERING",
    "tensorrt": "intaglio.exporters.lower_tensorrt:LOWERING",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One component whose ``model.onnx`` lies in `folder`.

    Attributes:
        folder: the component's folder in the unfinished artifact; results are written here.
        component: its name.
        inputs, outputs: the tensor facts of the manifest.
        shapes: ranges of the axes.
        contract: numerics of the component.
        dtype: compute dtype of this target.
        format: the nominal weight format of the graph.
        activations: its activation arithmetic: ``exact``, ``dynamic-per-token`` or ``static``.
        packed_bytes: bytes of ``model.onnx.data``, the least a faithful plan needs.
        options: ``--set`` values of this target, without the target's name (``{"sm": "sm89"}``).
        progress: called with a short text when something takes long.
    """

    folder: Path
    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: Mapping[str, Range]
    contract: Contract
    dtype: str
    format: str
    packed_bytes: int
    options: Mapping[str, str]
    activations: str = "exact"
    progress: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """What a lowering did.

    `facts` go into ``build.json``; `engines` are files (relative to the component's folder) that differ from build to
    build, with the facts the runtime needs to choose among them.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)


class Lowering(Protocol):
    """A target."""

    options: tuple[str, ...]

    def check(self, options: Mapping[str, str], formats: Collection[str] = ()) -> None:
        """Refuse wrong options, weight formats the target's hardware lacks, or a missing package before building."""

    def lower(self, job: Job) -> Lowered:
        """Write the target's files beside ``model.onnx``."""


def lowering(name: str) -> Lowering:
    """The lowering of a target.

    Raises:
        UsageError: there is no such target.
    """
    found: Lowering = resolve(pick(TARGETS, name, "target"))
    return found
