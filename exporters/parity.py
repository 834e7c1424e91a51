"""Compare what was built with the reference, at shapes that were not traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from intaglio.exporters.capture import trace_size
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ParityError
from intaglio.profiles.registry import installed
from intaglio.profiles.spec import ComponentRecord, Range, TensorSpec
from intaglio.quantize.segments import SegmentedEngine
from intaglio.runtimes.engine import Engine, EngineOptions, load_engine
from intaglio.runtimes.private_memory import return_freed

EXACT = {"openvino": {"precision": "float32"}}  # the comparison is of graphs, in float32 whatever they will run in
# Targets that run on a CPU, and the backend that runs them. An ahead-of-time TensorRT plan needs its GPU.
RUNNABLE = {"onnx": "onnxruntime", "openvino": "openvino"}
IN_PARTS = ("onnxruntime",)  # OpenVINO compiles a whole model; its IR of a large component has the codes of the graph
SEGMENTS = 16  # of the limit's bytes: codes unfold to float32 while they are multiplied with

# Rounding of activations is discontinuous: a last bit sends a value on a tie the other way, which in the next does
# so to others. Two engines end as far apart as the format is from float32: on random feeds the embedded UNet in
# w8a8 is 4.4e-2 from torch on the same codes. Single layers agree to 1.5e-4 (tests/test_lower_openvino.py).
ROUNDED = {"exact": 0.0, "dynamic-per-token": 0.1, "static": 0.2}
LONGEST = 320  # tokens compared at most: enough to leave the traced length and every padding behind
Rng = np.random.Generator
# Feeds that must not be arbitrary normal numbers, by input name: (shape, generator) to values.
FEEDS: dict[str, Callable[[tuple[int, ...], Rng], np.ndarray]] = {
    "timestep": lambda shape, rng: rng.choice(1000, shape, replace=False),
    "skip_layers": lambda shape, rng: np.arange(shape[0]) % 2 == 0,
    "guidance": lambda shape, rng: rng.uniform(1, 5, shape),
    "time_ids": lambda shape, rng: rng.integers(0, 1024, shape),
    "img_ids": lambda shape, rng: rng.integers(0, 40, shape),
    "txt_ids": lambda shape, rng: rng.integers(0, 40, shape),
    "attention_mask": lambda shape, rng: ragged_mask(shape, rng),
    "encoder_hidden_states_mask": lambda shape, rng: ragged_mask(shape, rng),
}
# Transformers with this input (FLUX) take time from 0 to 1 and multiply it by 1000 themselves.
UNIT_TIME = "img_ids"


def ragged_mask(shape: tuple[int, ...], rng: Rng) -> np.ndarray:
    """Ones, then zeros, for texts of different lengths [B, T]."""
    lengths = rng.integers(max(shape[1] // 2, 1), shape[1] + 1, shape[0])
    return np.asarray(np.arange(shape[1])[None] < lengths[:, None])


def untraced_sizes(shapes: Mapping[str, Range]) -> list[dict[str, int]]:
    """Two sets of axis sizes that were not traced: one image wide and low, three images high and narrow."""
    first = {"batch": 1, "height": 0, "width": 6}
    second = {"batch": 3, "height": 7, "width": 1}
    return [{axis: _size(axis, bounds, picks) for axis, bounds in shapes.items()} for picks in (first, second)]


def _size(axis: str, bounds: Range, picks: Mapping[str, int]) -> int:
    if axis == "batch":
        return min(picks["batch"], bounds.max)
    value = min(bounds.min + bounds.multiple * picks.get(axis, 4 * picks["batch"]), bounds.max)
    value = min(bounds.max, LONGEST) if axis.endswith("tokens") and "image" not in axis else value
    if value == trace_size(axis, bounds):
        value -= bounds.multiple
    return value


def random_feeds(inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded feeds: normal floats, small token ids, and what FEEDS says of the others."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for spec in inputs:
        shape = spec.sizes(sizes)
        if spec.name in FEEDS:
            feeds[spec.name] = FEEDS[spec.name](shape, rng).astype(spec.dtype)
        elif spec.dtype.startswith("int"):
            feeds[spec.name] = rng.integers(0, 250, shape).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    if UNIT_TIME in feeds:
        feeds["timestep"] /= np.float32(1000)
    return feeds


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """``||a - b|| / ||b||``; infinite where shapes differ or a value is not finite."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm((a - b).astype(np.float64)) / max(float(np.linalg.norm(b.astype(np.float64))), 1e-12))


def check_component(artifact: Artifact, component: str, tolerance: float, limit: int | None = None) -> dict[str, float]:
    """Largest relative L2 error of each runnable target against torch on the same (decoded) weights.

    Where activations are rounded, `tolerance` is no smaller than ROUNDED: engines then differ as ties fall. A component
    whose float32 weights exceed `limit` bytes is compared at one shape, torch layer by layer and ONNX Runtime segment
    by segment; a target that cannot be run in parts is not in the result.

    Raises:
        ParityError: one exceeds `tolerance`; with the figures.
    """
    record = artifact.manifest.components[component]
    if record.quantization is not None:
        tolerance = max(tolerance, ROUNDED[record.quantization.activations])
    parts = limit if limit is not None and exceeds(record, limit) else None
    feeds = [
        random_feeds(record.inputs, sizes) for sizes in untraced_sizes(artifact.manifest.shapes)[: 1 if parts else 2]
    ]
    reference = torch_in_parts(artifact, component) if parts else load_engine("torch", artifact, component)
    wanted = [reference.run(f) for f in feeds]
    reference.close()
    if parts:
        return_freed()
    errors = {}
    for target, backend in RUNNABLE.items():
        if target not in record.targets or not installed(backend) or (parts and backend not in IN_PARTS):
            continue
        options = EngineOptions(settings=EXACT.get(backend, {}))
        engine: Engine = (
            in_segments(artifact, component, options, parts // SEGMENTS)
            if parts
            else load_engine(backend, artifact, component, options)
        )
        found = [engine.run(f) for f in feeds]
        engine.close()
        worst = max(relative_error(f[n], w[n]) for f, w in zip(found, wanted, strict=True) for n in w)
        errors[backend] = worst
        if not worst <= tolerance:
            raise ParityError(f"{component} on {backend} differs from torch by {worst:.2e}, allowed {tolerance:.0e}")
    return errors


def uncompared(parity: Mapping[str, Mapping[str, float]], records: Mapping[str, ComponentRecord]) -> list[str]:
    """A remark for each component and backend here that was left out of the comparison, being too large for it."""
    return [
        f"{name} on {backend} was not compared with torch: it does not fit in memory whole"
        for name, errors in parity.items()
        for target, backend in RUNNABLE.items()
        if target in records[name].targets and installed(backend) and backend not in errors
    ]


def exceeds(record: ComponentRecord, limit: int) -> bool:
    """Whether a component's weights in float32 are more than `limit` bytes."""
    return 4 * record.parameters > limit


def in_segments(artifact: Artifact, component: str, options: EngineOptions, limit: int) -> SegmentedEngine:
    """ONNX Runtime on segments; dynamic activations, which need an optimizing engine, are computed exactly there."""
    quantization = artifact.manifest.components[component].quantization
    exact = quantization is None or quantization.activations != "dynamic-per-token"
    folder = None if exact else artifact.component(component)
    return SegmentedEngine(artifact, component, options, limit, folder=folder)


def torch_in_parts(artifact: Artifact, component: str) -> Engine:
    """The reference that holds one layer at a time."""
    from intaglio.exporters.streamed import StreamedTorchEngine

    return StreamedTorchEngine(artifact, component)
