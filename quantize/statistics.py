"""What the layers of a graph meet on recorded feeds: the peak and the mean square of every channel, and samples.

The graph runs on ONNX Runtime in float32 with these as further outputs, so that no activation leaves it whole. With a
limit it runs segment by segment, each on all feeds; what crosses from one to the next lies on disk meanwhile.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from intaglio.profiles.errors import NumericsError
from intaglio.quantize.probes import FRACTIONS, Probes, find_watched, fractions
from intaglio.quantize.segments import cut, late_casts, open_session, run_once, serialized
from intaglio.runtimes.engine_onnxruntime import return_freed_memory

GRAPH = "model.onnx"
MOST_ROWS = 2048  # kept of each tensor


@dataclass(slots=True)
class InputStatistics:
    """What one tensor took over all calls.

    Attributes:
        peak: largest absolute value of each channel, float32 [K].
        samples: rows drawn from all calls, float32 [n, K].
        rows: rows (tokens, pixels) of the largest call, as the layer multiplies them.
        square: sum of squares of each channel, float64 [K], over `count` rows.
    """

    peak: np.ndarray
    square: np.ndarray
    count: int = 0
    rows: int = 0
    parts: list[np.ndarray] = field(default_factory=list)

    @property
    def samples(self) -> np.ndarray:
        """All sampled rows."""
        return np.concatenate(self.parts)

    @property
    def mean_square(self) -> np.ndarray:
        """float32 [K]."""
        return np.asarray(self.square / max(self.count, 1), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Statistics of the inputs of layers.

    Attributes:
        inputs: by the name of the tensor.
        tensor: parameter to the name of its input.
        macs: parameter to multiply-accumulates of the largest call.
        segments: bytes of the weights, as stored, of each segment the graph was run in.
    """

    inputs: dict[str, InputStatistics]
    tensor: dict[str, str]
    macs: dict[str, int]
    segments: tuple[int, ...] = ()

    def of(self, parameter: str) -> InputStatistics:
        """The input of one layer."""
        return self.inputs[self.tensor[parameter]]


def collect(
    folder: Path,
    parameters: Iterable[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    limit: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Statistics:
    """Run ``model.onnx`` of a component folder on `feeds` and watch the inputs of these parameters' layers.

    The graph may have int8 weights. The results are the same bits with every `limit`.

    Args:
        folder: of the component; with a limit also for temporary files.
        parameters: names in the checkpoint.
        feeds: read once.
        limit: bytes of weights, as they are stored, that are loaded at a time; ``None``: all.
        note: told what is run.

    Raises:
        NumericsError: an input is not finite; with its name.
    """
    wanted = set(parameters)
    model = ir.load(folder / GRAPH)
    late_casts(model)
    layers = [layer for layer in find_watched(model) if layer.parameter in wanted]
    found: dict[str, InputStatistics] = {}
    sizes: dict[str, int] = {}
    segments = cut(model, limit)
    with Crossing(folder if limit is not None else None) as crossing:
        for index, part in enumerate(segments):
            needed = {str(value.name) for later in segments[index + 1 :] for value in later.inputs}
            probes = Probes([layer for layer in layers if layer.reader in part.nodes], known=found)
            session = open_session(serialized(model, probes.instrumented(part)), folder)
            for number, values in enumerate(crossing.calls() if index else feeds):
                note(f"segment {index + 1} of {len(segments)}, call {number + 1}" if index else f"call {number + 1}")
                results = run_once(session, part, {**values, FRACTIONS: fractions(number)})
                take(results, probes, found, sizes)
                crossing.keep(number, {**values, **results}, needed)
            del session
            crossing.spill(found)
            crossing.drop(needed)
            return_freed_memory()
    sizes |= {la.parameter: found[str(la.value.name)].rows for la in layers if la.reader.op_type != "Conv"}
    return Statistics(
        inputs=found,
        tensor={la.parameter: str(la.value.name) for la in layers},
        macs={la.parameter: sizes[la.parameter] * la.elements for la in layers},
        segments=tuple(part.weight_bytes for part in segments),
    )


def take(
    results: Mapping[str, np.ndarray], probes: Probes, found: dict[str, InputStatistics], sizes: dict[str, int]
) -> None:
    """Take one call's figures in: of inputs in `found`, the rows that convolutions make in `sizes`.

    Raises:
        NumericsError: they are not finite.
    """
    for key, tensor in probes.inputs.items():
        add(found, tensor, *(results[f"{key}.{kind}"] for kind in ("peak", "square", "rows", "samples")))
    for parameter, key in probes.products.items():
        sizes[parameter] = max(sizes.get(parameter, 0), int(results[key]))


def add(
    found: dict[str, InputStatistics],
    tensor: str,
    peak: np.ndarray,
    square: np.ndarray,
    rows: np.ndarray,
    samples: np.ndarray,
) -> None:
    """Take one call's figures in.

    Raises:
        NumericsError: they are not finite.
    """
    if not np.isfinite(peak).all():
        raise NumericsError(f"calibration: {tensor} has NaN or infinity; the checkpoint itself overflows")
    if tensor not in found:
        found[tensor] = InputStatistics(np.zeros_like(peak), np.zeros(peak.shape, np.float64))
    entry = found[tensor]
    np.maximum(entry.peak, peak, out=entry.peak)
    entry.square += square.astype(np.float64)
    entry.count += int(rows)
    entry.rows = max(entry.rows, int(rows))
    if sum(len(p) for p in entry.parts) < MOST_ROWS:
        entry.parts.append(samples)


class Crossing:
    """What crosses from a segment to later ones, of every call, and samples: in temporary files beside the weights.

    Not where temporary files usually are: that may be memory. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.parent, self.count = folder, 0
        self.numbers: dict[str, int] = {}  # tensor to its part of the files' names
        self.free = itertools.count()
        self.spilled: set[str] = set()

    def __enter__(self) -> Crossing:
        """Make the folder."""
        self.held = tempfile.TemporaryDirectory(prefix=".calibration-", dir=self.parent) if self.parent else None
        self.folder = Path(self.held.name) if self.held else Path()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        if self.held:
            self.held.cleanup()

    def keep(self, call: int, values: Mapping[str, np.ndarray], needed: Iterable[str]) -> None:
        """Store those that are `needed` and not there yet."""
        self.count = max(self.count, call + 1)
        for name in values.keys() & set(needed):
            path = self.folder / f"{self.numbers.setdefault(name, next(self.free))}.{call}.npy"
            if not path.exists():
                np.save(path, values[name], allow_pickle=False)

    def calls(self) -> Iterator[dict[str, np.ndarray]]:
        """What every call has now, in order."""
        rows = dict(self.numbers)
        for call in range(self.count):
            yield {name: np.load(self.folder / f"{n}.{call}.npy", allow_pickle=False) for name, n in rows.items()}

    def drop(self, needed: Iterable[str]) -> None:
        """Remove the others."""
        for name in self.numbers.keys() - set(needed):
            for path in self.folder.glob(f"{self.numbers.pop(name)}.*.npy"):
                path.unlink()

    def spill(self, found: Mapping[str, InputStatistics]) -> None:
        """Map the samples of new tensors from one file, which lasts as long as they do, instead of holding them."""
        fresh = [entry for name, entry in found.items() if name not in self.spilled] if self.held else []
        self.spilled |= found.keys()
        if not fresh:
            return
        with tempfile.TemporaryFile(dir=self.parent) as file:
            for entry in fresh:
                file.write(np.ascontiguousarray(entry.samples, np.float32).tobytes())
            file.flush()
            mapped = np.memmap(file, np.float32, "r")
        start = 0
        for entry in fresh:
            rows, width = sum(len(part) for part in entry.parts), entry.parts[0].shape[1]
            entry.parts = [mapped[start : start + rows * width].reshape(rows, width)]
            start += rows * width
