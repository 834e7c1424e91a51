"""Compare what was built with the reference, at shapes that were not traced."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from intaglio.exporters.capture import trace_size
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ParityError
from intaglio.profiles.registry import installed
from intaglio.profiles.spec import Range, TensorSpec
from intaglio.runtimes.engine import load_engine

# Targets that run on a CPU, and the backend that runs them. An ahead-of-time TensorRT plan needs its GPU.
RUNNABLE = {"onnx": "onnxruntime", "openvino": "openvino"}


def untraced_sizes(shapes: Mapping[str, Range]) -> list[dict[str, int]]:
    """Two sets of axis sizes that were not traced: one image wide and low, three images high and narrow."""
    first = {"batch": 1, "height": 0, "width": 6}
    second = {"batch": 3, "height": 7, "width": 1}
    return [{axis: _size(axis, bounds, picks) for axis, bounds in shapes.items()} for picks in (first, second)]


def _size(axis: str, bounds: Range, picks: Mapping[str, int]) -> int:
    if axis == "batch":
        return min(picks["batch"], bounds.max)
    value = bounds.min + bounds.multiple * picks.get(axis, 0)
    value = bounds.max if axis == "tokens" else min(value, bounds.max)
    if value == trace_size(axis, bounds):
        value -= bounds.multiple
    return value


def random_feeds(inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded feeds: normal floats, small token ids, distinct timesteps."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for spec in inputs:
        shape = spec.sizes(sizes)
        if spec.dtype.startswith("int"):
            feeds[spec.name] = rng.integers(0, 250, shape).astype(spec.dtype)
        elif spec.name == "timestep":
            feeds[spec.name] = rng.choice(1000, shape, replace=False).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """``||a - b|| / ||b||``; infinite where shapes differ or a value is not finite."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm((a - b).astype(np.float64)) / max(float(np.linalg.norm(b.astype(np.float64))), 1e-12))


def check_component(artifact: Artifact, component: str, tolerance: float) -> dict[str, float]:
    """Largest relative L2 error of each runnable target against torch on the same (decoded) weights.

    Raises:
        ParityError: one exceeds `tolerance`; with the figures.
    """
    record = artifact.manifest.components[component]
    feeds = [random_feeds(record.inputs, sizes) for sizes in untraced_sizes(artifact.manifest.shapes)]
    reference = load_engine("torch", artifact, component)
    wanted = [reference.run(f) for f in feeds]
    reference.close()
    errors = {}
    for target, backend in RUNNABLE.items():
        if target not in record.targets or not installed(backend):
            continue
        engine = load_engine(backend, artifact, component)
        found = [engine.run(f) for f in feeds]
        engine.close()
        worst = max(relative_error(f[n], w[n]) for f, w in zip(found, wanted, strict=True) for n in w)
        errors[backend] = worst
        if not worst <= tolerance:
            raise ParityError(f"{component} on {backend} differs from torch by {worst:.2e}, allowed {tolerance:.0e}")
    return errors
