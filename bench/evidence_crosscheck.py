"""The denoiser's seconds by our worker, beside OpenVINO's own ``benchmark_app`` and a bare ONNX Runtime loop.

All sides run the same graph file on the same recorded feeds with the same settings, each time in a new process, warmed
up, in turns whose order is reversed every round (ABBA), so that a machine that slows down meets both alike.

What a side's seconds hold: the worker's are `Engine.run`, NumPy in and NumPy out, with feeds checked and outputs
copied. ``benchmark_app`` reports ``InferRequest.latency``, without Python, inputs and outputs; `excess` measures that
difference. The bare loop's are ``session.run``, NumPy in and NumPy out.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.bench.benchmark_app import APP, Run, output_of, run_app
from intaglio.bench.cases import Case
from intaglio.bench.formats_cells import CALLS, DENOISER, TIMEOUT
from intaglio.bench.run import SETTLE
from intaglio.bench.statistics import as_json, compared
from intaglio.bench.worker import Client, WorkerError, to_json
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError
from intaglio.profiles.registry import need
from intaglio.runtimes import engine_onnxruntime, engine_openvino
from intaglio.runtimes.engine import EngineOptions, check_feeds, load_engine

if TYPE_CHECKING:
    from rich.progress import Progress

OURS, FIXED, LOOP = "worker", "benchmark_app, fixed shapes", "bare loop"
LOADER = "intaglio.bench.formats_cells:load_denoiser"
PROMPT, STEPS = "red heart", 2  # one recorded step with guidance: a batch of 2
PARTS = 50  # calls whose parts `excess` times


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: by backend, of every side, a new process each; they differ by 2 %, so more where 3 % is to be seen.
        calls: timed in a process, a multiple of the worker's `CALLS`.
        warmup: calls before them, in a process of ours; ``benchmark_app`` has its own, of one call.
        threads: each is measured apart.
        source: an unquantized artifact with IR; built where ``None``.
    """

    rounds: Mapping[str, int] = field(default_factory=lambda: {"openvino": 6, "onnxruntime": 10})
    calls: int = 50
    warmup: int = 2 * CALLS
    threads: tuple[int, ...] = (1, 2)
    source: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all processes of one backend and number of threads share; `feeds` are also in `place`."""

    artifact: Artifact
    place: Path
    feeds: Mapping[str, np.ndarray]
    settings: Settings
    backend: str
    threads: int

    @property
    def options(self) -> EngineOptions:
        """Those of the engine."""
        return EngineOptions(threads=self.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One process: its median, and facts that must be the same on both sides."""

    seconds: float
    facts: dict[str, Any]


def measure(settings: Settings | None = None) -> dict[str, Any]:
    """Rows of backend and threads: medians of every round and side, ratios of ours to each other side.

    Raises:
        ToolError: a side failed, or did not run with the settings of the other.
    """
    from rich.console import Console
    from rich.progress import Progress

    from intaglio.exporters.build import build
    from intaglio.quantize.feeds import CalibrationSet, read_feeds, record_feeds

    chosen = settings or Settings()
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bars:
        place = Path(name)
        artifact = (
            Artifact.open(chosen.source)
            if chosen.source
            else build("emoji", place / "fp32", targets=("openvino",), options={"certificate.prompts": "0"})
        )
        record_feeds(
            artifact, (DENOISER,), CalibrationSet(prompts=(PROMPT,), steps=STEPS, records=1), place / "feeds.zip"
        )
        feeds = next(read_feeds(place / "feeds.zip", DENOISER))
        np.savez(place / "feeds.npz", **feeds)  # type: ignore[arg-type]
        common: dict[str, Any] = {"artifact": artifact, "place": place, "feeds": feeds, "settings": chosen}
        rows = [
            row_of(Setup(backend=backend, threads=threads, **common), bars)
            for backend in SIDES
            for threads in chosen.threads
        ]
    facts = {k: v for k, v in asdict(chosen).items() if k != "source"}
    return {**facts, "shapes": {k: list(v.shape) for k, v in feeds.items()}, "rows": rows}


def row_of(setup: Setup, bars: Progress) -> dict[str, Any]:
    """All rounds of one backend and number of threads."""
    sides = SIDES[setup.backend]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    facts: dict[str, dict[str, Any]] = {}
    turns = order(tuple(sides), setup.settings.rounds[setup.backend])
    for side in bars.track(turns, description=f"{setup.backend}, threads: {setup.threads}"):
        time.sleep(SETTLE)
        timed = sides[side](setup)
        seconds[side].append(timed.seconds)
        if facts.setdefault(side, timed.facts) != timed.facts:
            raise ToolError(f"{side} on {setup.backend}: {timed.facts} in one round and {facts[side]} in another")
    row = {"backend": setup.backend, "threads": setup.threads, **summed(seconds)}
    return {**row, **CHECKED[setup.backend](setup, facts)}


def order(sides: Sequence[str], rounds: int) -> list[str]:
    """Every side once a round, forwards and backwards in turn."""
    return [side for turn in range(rounds) for side in (sides if turn % 2 == 0 else sides[::-1])]


def summed(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians of the sides and ratios of ours to the others, above 1: ours is slower; with intervals from 5 rounds."""
    return {
        "seconds": {side: [float(f"{v:.5g}") for v in values] for side, values in seconds.items()},
        "median": {side: float(f"{statistics.median(values):.5g}") for side, values in seconds.items()},
        "ratios": {side: as_json(compared(values, seconds[OURS])) for side, values in seconds.items() if side != OURS},
    }


def by_worker(setup: Setup) -> Timed:
    """The benchmark's own way: its worker, its loader, its request for a run."""
    case = Case(
        artifact=str(setup.artifact.folder),
        label=OURS,
        backend=setup.backend,
        threads=setup.threads,
        prompts=(PROMPT,),
        loader=LOADER,
        settings={"feeds": str(setup.place / "feeds.zip")},
    )
    client = Client(case, timeout=TIMEOUT)
    try:
        client.ask("load", case=to_json(case))
        for _ in range(setup.settings.warmup // CALLS):
            client.ask("run", prompt=0)
        runs = [client.ask("run", prompt=0) for _ in range(setup.settings.calls // CALLS)]
    except WorkerError as error:
        raise ToolError(f"{OURS} on {setup.backend}: {error}") from error
    finally:
        client.close()
    return Timed(
        seconds=statistics.median(s for run in runs for s in run["steps"]), facts={"digest": runs[0]["digest"]}
    )


def by_app(setup: Setup, *, fixed: bool = False) -> Timed:
    """OpenVINO's tool on the IR as it is, with the settings our engine compiles with."""
    graph = setup.artifact.component(DENOISER) / engine_openvino.XML
    chosen = engine_openvino.compile_settings("CPU", setup.threads, "f32", 0)
    asked = Run(graph=graph, feeds=setup.feeds, calls=setup.settings.calls, settings=chosen, fixed=fixed)
    seconds, properties = run_app(asked, setup.place)
    return Timed(seconds=seconds, facts=properties)


def by_app_fixed(setup: Setup) -> Timed:
    """The same compiled for these shapes alone."""
    return by_app(setup, fixed=True)


def by_loop(setup: Setup) -> Timed:
    """ONNX Runtime without us: the options of our session, a process and a loop of its own."""
    ort = need("onnxruntime", extra="onnxruntime")
    provider = engine_onnxruntime.PROVIDERS["cpu"]
    record = setup.artifact.manifest.components[DENOISER]
    ours = engine_onnxruntime.session_options(ort, record, setup.options, provider)
    keys = (engine_onnxruntime.ACCURACY_KEY,)  # the other one is for static recipes only
    asked = {
        "graph": str(engine_onnxruntime.graph_path(setup.artifact, DENOISER, provider)),
        "feeds": str(setup.place / "feeds.npz"),
        "options": {k: getattr(ours, k) for k in ("intra_op_num_threads", "enable_mem_pattern", "log_severity_level")},
        "entries": {key: ours.get_session_config_entry(key) for key in keys},
        "provider": provider,
        "warmup": setup.settings.warmup,
        "calls": setup.settings.calls,
    }
    command = [sys.executable, "-m", "intaglio.bench.plain_onnxruntime", json.dumps(asked)]
    answer = json.loads(output_of(command, LOOP, TIMEOUT).splitlines()[-1])
    facts = {"digest": answer["digest"], "options": asked["options"], "entries": asked["entries"]}
    return Timed(seconds=statistics.median(answer["seconds"]), facts=facts)


def openvino_checked(setup: Setup, facts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """`excess` of `Engine.run` over the inference that benchmark_app times.

    Raises:
        ToolError: benchmark_app compiled with other properties than our engine.
    """
    engine: Any = load_engine("openvino", setup.artifact, DENOISER, setup.options)
    try:
        ours = {str(k): str(engine.compiled.get_property(k)) for k in facts[APP]}
        for side in (APP, FIXED):
            differ = {k: (v, ours[k]) for k, v in facts[side].items() if v != ours.get(k)}
            if differ:
                raise ToolError(f"{side} and our engine differ in {differ}")
        return {"properties": ours, "excess": excess(engine, setup.feeds)}
    finally:
        engine.close()


def excess(engine: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Medians of one call's seconds: ``run``, the ``inference`` in it, the ``rest``, and ``check_feeds`` of the rest.

    What remains of the rest is OpenVINO's Python layer, which binds three arrays and answers with one.
    """
    parts: dict[str, list[float]] = {"run": [], "inference": [], "rest": [], "check_feeds": []}
    for _ in range(2 * CALLS):
        engine.run(feeds)
    for _ in range(PARTS):
        start = time.perf_counter()
        engine.run(feeds)
        run, inference = time.perf_counter() - start, engine.request.latency / 1e3
        start = time.perf_counter()
        check_feeds(engine.record, feeds)
        checked = time.perf_counter() - start
        for name, value in zip(parts, (run, inference, run - inference, checked), strict=True):
            parts[name].append(value)
    return {name: float(f"{statistics.median(values):.4g}") for name, values in parts.items()}


def onnxruntime_checked(setup: Setup, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether both sides computed the same bits; the options are in the row."""
    import hashlib

    engine = load_engine("onnxruntime", setup.artifact, DENOISER, setup.options)
    made = b"".join(array.tobytes() for array in engine.run(setup.feeds).values())
    engine.close()
    bare, ours = facts[LOOP], facts[OURS]["digest"]  # the worker's is of latents and of the picture, here one array
    same = hashlib.sha256(made).hexdigest() == bare["digest"] and hashlib.sha256(made + made).hexdigest() == ours
    return {"same_bits": same, "options": {**bare["options"], **bare["entries"]}}


SIDES: dict[str, dict[str, Callable[[Setup], Timed]]] = {
    "openvino": {OURS: by_worker, APP: by_app, FIXED: by_app_fixed},
    "onnxruntime": {OURS: by_worker, LOOP: by_loop},
}
CHECKED: dict[str, Callable[[Setup, Mapping[str, Mapping[str, Any]]], dict[str, Any]]] = {
    "openvino": openvino_checked,
    "onnxruntime": onnxruntime_checked,
}
