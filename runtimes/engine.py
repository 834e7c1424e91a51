"""What an engine is: one graph, loaded on one backend. Engines hold no model names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ArtifactError, UsageError
from intaglio.profiles.registry import pick, resolve
from intaglio.profiles.spec import ComponentRecord

ENGINES = {
    "null": "intaglio.runtimes.engine_null:NullEngine",
    "onnxruntime": "intaglio.runtimes.engine_onnxruntime:OnnxRuntimeEngine",
    "openvino": "intaglio.runtimes.engine_openvino:OpenVinoEngine",
    "tensorrt": "intaglio.runtimes.engine_tensorrt:TensorRtEngine",
    "torch": "intaglio.exporters.engine_torch:TorchEngine",  # the one arrow to the right: the reference needs torch
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to load.

    Attributes:
        device: the backend's own name: ``cpu``, ``cuda:0``, ``GPU.1``, ``NPU``.
        threads: intra-op threads; 0 leaves the choice to the backend.
        checkpoint: where the torch engine finds the checkpoint; empty means by the manifest.
        settings: further ``--set BACKEND.KEY=VALUE`` pairs, each consumed or refused.
    """

    device: str = "cpu"
    threads: int = 0
    checkpoint: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """One loaded graph."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; NumPy in, NumPy out, dtypes and shapes as the component's record says."""

    def memory(self) -> dict[str, int | None]:
        """Bytes the backend says it holds, ``None`` where it does not say."""

    def close(self) -> None:
        """Give everything back; running afterwards is an error."""


class EngineClass(Protocol):
    """The constructor every engine has."""

    def __call__(self, artifact: Artifact, component: str, options: EngineOptions) -> Engine:
        """Load one component."""


def load_engine(backend: str, artifact: Artifact, component: str, options: EngineOptions | None = None) -> Engine:
    """Load a component on a backend.

    Raises:
        UsageError: no such backend, or a negative number of threads.
        ArtifactError: the artifact has no such component.
        MissingDependency: the backend is not installed.
    """
    path = pick(ENGINES, backend, "backend")
    if options is not None and options.threads < 0:
        raise UsageError(f"threads {options.threads} is not allowed: 0 or more")
    if component not in artifact.manifest.components:
        raise ArtifactError(f"{artifact.folder} has no component {component!r}")
    engine_class: EngineClass = resolve(path)
    return engine_class(artifact, component, options or EngineOptions())


def check_feeds(record: ComponentRecord, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds as contiguous arrays of the dtypes the graph declares.

    Raises:
        UsageError: a name is missing or unknown, or a shape contradicts the record.
    """
    wanted = {s.name: s for s in record.inputs}
    if feeds.keys() != wanted.keys():
        raise UsageError(f"inputs {sorted(feeds)} given, {sorted(wanted)} needed")
    result: dict[str, np.ndarray] = {}
    for name, spec in wanted.items():
        array = np.ascontiguousarray(feeds[name], dtype=spec.dtype)
        fixed = [(d, s) for d, s in zip(array.shape, spec.shape, strict=False) if isinstance(s, int)]
        if array.ndim != len(spec.shape) or any(d != s for d, s in fixed):
            raise UsageError(f"input {name} has shape {array.shape}, expected {spec.shape}")
        result[name] = array
    return result


def refuse_leftovers(backend: str, settings: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """No setting is ignored.

    Raises:
        UsageError: naming the first key the backend does not have.
    """
    for key in settings:
        if key not in allowed:
            raise UsageError(f"--set {backend}.{key} is unknown; allowed: {', '.join(allowed) or 'none'}")
