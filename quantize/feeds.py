"""Record what the components are fed in the real sampling loop, in one file with one digest.

The file is a zip: every array once, named by its digest (``numpy.lib.format``), and ``index.json``, one record a call.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from intaglio.profiles.artifact import Artifact, sha256
from intaglio.profiles.errors import ArtifactError, UsageError
from intaglio.quantize.segments import SegmentedEngine
from intaglio.runtimes.engine import Engine, EngineOptions
from intaglio.runtimes.pipeline import LoadedEngines, Pipeline
from intaglio.runtimes.probe import Place, last_feeds, memory_of, replaced, sample

INDEX, SCHEMA = "index.json", 1
PROMPT_FILE = "calibration_prompts.txt"
COUNT, RECORDS, SEED = 8, 8, 20_000  # prompts, recorded steps a prompt at most, seed of the first


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """What calibration samples: prompt k with the seed ``seed + k``.

    Attributes:
        prompts: at least one.
        steps: of the sampler; ``None`` for the artifact's own.
        records: denoiser calls kept of each prompt at most, spread evenly from the first step to the last.
        memory: bytes that the weights of a component may take; ``None``: half of what is available.
    """

    prompts: tuple[str, ...]
    steps: int | None = None
    records: int = RECORDS
    seed: int = SEED
    memory: int | None = None

    def __post_init__(self) -> None:
        """Refuse an empty set.

        Raises:
            UsageError: no prompt, or nothing would be recorded.
        """
        if not self.prompts:
            raise UsageError(
                "the calibration set is empty; give a file with one prompt a line (--set calibration.prompts=FILE)"
            )
        if self.records < 1:
            raise UsageError(f"calibration.records {self.records} is not allowed: 1 or more")

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        text = "\n".join(self.prompts).encode()
        return {
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(text).hexdigest(),
            "seed": self.seed,
            "steps": self.steps,
            "records": self.records,
        }


def read_prompts(path: str | Path | None, count: int | None = None) -> tuple[str, ...]:
    """The lines of a prompt file, or the first `count` of our own set; empty lines and ``#`` comments are left out.

    Raises:
        UsageError: the file cannot be read or has no prompt; fewer than `count` are there.
    """
    try:
        text = (
            (resources.files("intaglio.quantize") / PROMPT_FILE).read_text(encoding="utf-8")
            if path is None
            else Path(path).read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration prompts {path} cannot be read ({error}); one prompt a line") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"{path} has no prompt; the calibration set is empty: one prompt a line is needed")
    wanted = count or (COUNT if path is None else len(prompts))
    if wanted > len(prompts):
        raise UsageError(
            f"calibration.count {wanted} is not allowed: {path or 'our own set'} has {len(prompts)} prompts"
        )
    return tuple(prompts[:wanted])


class Recorder:
    """Writes records to a zip; equal arrays are stored once."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self.known: set[str] = set()
        self.records: list[dict[str, Any]] = []

    def add(self, component: str, place: Place, feeds: Mapping[str, np.ndarray]) -> None:
        """Keep one call."""
        names = {name: self._store(np.ascontiguousarray(array)) for name, array in feeds.items()}
        self.records.append({"component": component, "prompt": place.prompt, "step": place.step, "feeds": names})

    def _store(self, array: np.ndarray) -> str:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, allow_pickle=False)
        key = hashlib.sha256(buffer.getbuffer()).hexdigest()[:32]
        if key not in self.known:
            self.known.add(key)
            self.zip.writestr(zipfile.ZipInfo(f"{key}.npy"), buffer.getbuffer())
        return key

    def close(self) -> None:
        """Write the index and close the file."""
        text = json.dumps({"schema": SCHEMA, "records": self.records}, ensure_ascii=False, indent=1)
        self.zip.writestr(zipfile.ZipInfo(INDEX), text)
        self.zip.close()


class RecordingEngine:
    """One of `HeldEngines` that keeps what it is fed, at the steps that are wanted; without a recorder nothing."""

    def __init__(
        self, held: HeldEngines, component: str, place: Place, recorder: Recorder | None, records: int
    ) -> None:
        self.held, self.component, self.place = held, component, place
        self.recorder, self.records = recorder, records

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        if self.recorder is not None and self.place.step in spread(self.place.total, self.records):
            self.recorder.add(self.component, self.place, feeds)
        return self.held[self.component].run(feeds)

    def memory(self) -> dict[str, int | None]:
        """Not said."""
        return memory_of(self)

    def close(self) -> None:
        """Leave that to who opened the engine."""


def spread(total: int, records: int) -> set[int]:
    """Steps to keep of 0 to `total`: text (0), `records` denoiser calls from first to last, decoding (`total`)."""
    return {0, *(int(v) for v in np.linspace(0, max(total - 1, 0), min(records, max(total, 1))).round()), total}


class HeldEngines:
    """An artifact's engines: all at once where their weights fit into `limit`, else one at a time, or segments of one.

    Args:
        folders: components that run in segments, and where to read them; others do that too where they do not fit.
    """

    def __init__(
        self, artifact: Artifact, names: Sequence[str], limit: int | None, folders: Mapping[str, Path]
    ) -> None:
        sizes = {name: weight_bytes(artifact, name) for name in names}
        keep = limit is None or (sum(sizes.values()) <= limit and not folders)
        self.engines = LoadedEngines(artifact, "onnxruntime", EngineOptions(), keep=keep)
        self.segmented: dict[str, Engine] = {}
        if limit is not None:
            large = {name: artifact.component(name) for name, size in sizes.items() if size > limit} | dict(folders)
            for name, folder in large.items():
                self.segmented[name] = SegmentedEngine(artifact, name, EngineOptions(), limit, folder=folder)

    def __getitem__(self, name: str) -> Engine:
        """The engine of a component; others are unloaded where memory is short."""
        self.engines.release(*(other for other in list(self.engines.loaded) if other != name))
        return self.segmented[name] if name in self.segmented else self.engines[name]


def weight_bytes(artifact: Artifact, component: str) -> int:
    """Bytes of a component's weights as ONNX Runtime holds them: in float32."""
    return artifact.manifest.components[component].parameters * 4


def record_feeds(
    artifact: Artifact,
    components: Sequence[str],
    settings: CalibrationSet,
    path: Path,
    *,
    limit: int | None = None,
    folders: Mapping[str, Path] = MappingProxyType({}),
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """Sample the prompts on ONNX Runtime and keep what `components` are fed; returns the file's sha256.

    Args:
        artifact: to sample.
        components: to record.
        settings: prompts, steps, seeds.
        path: of the file to write.
        limit: bytes that weights may take; ``None``: any.
        folders: components that run in segments of at most `limit` bytes, and where to read them.
        note: told what is run.

    Raises:
        NumericsError: the artifact itself returns NaN.
    """
    place, recorder = Place(), Recorder(path)
    pipeline = Pipeline(artifact, "onnxruntime", EngineOptions(), residency="low")
    whole = any(not name.startswith("text_encoder") for name in components)
    names = tuple(dict.fromkeys((*components, *pipeline.sampler.components)))
    held = HeldEngines(artifact, names, limit, folders)
    engines = {
        name: RecordingEngine(held, name, place, recorder if name in components else None, settings.records)
        for name in names
    }
    for number, prompt in enumerate(settings.prompts):
        note(f"prompt {number + 1} of {len(settings.prompts)}")
        with replaced(pipeline, engines):
            result = sample(pipeline, prompt, place, whole=whole, steps=settings.steps, seed=settings.seed + number)
        if result is not None:
            last_feeds({name: engines[name] for name in components}, result)
    held.engines.close()
    recorder.close()
    return sha256(path)


def read_feeds(path: str | Path, component: str) -> Iterator[dict[str, np.ndarray]]:
    """The recorded calls of one component, in order.

    Raises:
        ArtifactError: it is not a file of feeds, or has none of this component.
    """
    try:
        with zipfile.ZipFile(path) as file:
            index = json.loads(file.read(INDEX))
            rows = [r for r in index["records"] if r["component"] == component]
            if index["schema"] != SCHEMA or not rows:
                raise ArtifactError(f"{path} has no recorded feeds of {component}; record them again")
            for row in rows:
                yield {name: _read(file, key) for name, key in row["feeds"].items()}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is not a file of recorded feeds ({error}); record them again") from error


def _read(file: zipfile.ZipFile, key: str) -> np.ndarray:
    return np.asarray(np.lib.format.read_array(io.BytesIO(file.read(f"{key}.npy")), allow_pickle=False))
