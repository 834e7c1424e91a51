"""NNCF's int8 and int4 beside ours: the same graph, the same layers, the same loop and engine.

What differs is the quantizer alone. NNCF compresses our unquantized IR of the embedded checkpoint, exactly the layers
that our artifact has in each format (its ``ignored_scope`` names all others), in the environment of the peer
``optimum-intel``; a copy of the unquantized artifact with that IR then runs like any other. Activations stay float.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.bench import peer_nncf
from intaglio.bench.evidence_formats import Settings as FormatSettings
from intaglio.bench.evidence_formats import (
    compared,
    denoiser_case,
    fidelity,
    make_artifacts,
    make_cells,
    picked,
    sizes,
)
from intaglio.bench.formats_cells import CALLS, DENOISER, REFERENCE, Cell, draw, find, running, take_turns, timing
from intaglio.bench.peers import python_of
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError
from intaglio.profiles.registry import need
from intaglio.quantize.feeds import read_feeds
from intaglio.quantize.formats import FORMATS
from intaglio.runtimes.engine import EngineOptions, load_engine
from intaglio.runtimes.engine_openvino import XML
from intaglio.runtimes.fidelity import relative_l2

if TYPE_CHECKING:
    pass

PEER, BACKEND = "optimum-intel", "openvino"
OURS = ("int8", "int4")
THEIRS = "NNCF "
# Our format -> NNCF's mode: symmetric, a scale an output channel or a block of input channels, as ours.
MODES = {"int8": "int8_sym", "int4": "int4_sym", "int4-32": "int4_sym", "int4-128": "int4_sym"}
WEIGHTED = ("MatMul", "Convolution", "GroupConvolution", "Gather")
DECOMPRESSION = ("Convert", "Subtract", "Multiply", "Reshape")
STORED = {"i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"}  # OpenVINO's types of codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured; see `evidence_formats.Settings`."""

    prompts: int = 32
    steps: int = 20
    rounds: int = 9
    source: Path | None = None


def layers_of_ir(path: Path) -> dict[str, tuple[str, str]]:
    """Name of an operation with a weight -> the name of the weight's constant, and the type its values are stored in.

    Decompression (Convert, Subtract, Multiply, Reshape) between the two is looked through; of the constants that an
    operation then has, codes, scales and zero points, the largest is the weight.
    """
    openvino = need("openvino", extra="openvino")
    found: dict[str, tuple[int, str, str]] = {}
    for op in openvino.Core().read_model(path).get_ordered_ops():
        if op.get_type_name() != "Constant" or len(op.get_output_shape(0)) < 2:
            continue
        reader = reader_of(op)
        size = int(np.prod(op.get_output_shape(0)))
        if reader is not None and size > found.get(reader, (0,))[0]:
            found[reader] = size, op.get_friendly_name(), op.get_element_type().get_type_name()
    return {reader: (constant, kind) for reader, (_, constant, kind) in found.items()}


def reader_of(constant: Any) -> str | None:
    """The operation with a weight that a constant is read by, decompression aside; ``None`` where it is no weight."""
    node = constant
    while len(readers := list(node.output(0).get_target_inputs())) == 1:
        node = readers[0].get_node()
        if node.get_type_name() in WEIGHTED:
            return str(node.get_friendly_name())
        if node.get_type_name() not in DECOMPRESSION:
            return None
    return None


def plan_of(source: Artifact, ours: Artifact, component: str, output: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The plan for `peer_nncf`, and the format that each of its operations has in our artifact."""
    path = source.component(component) / XML
    readers = {constant: reader for reader, (constant, _) in layers_of_ir(path).items()}
    plain, own = (a.manifest.components[component].weights for a in (source, ours))
    chosen = {
        readers[record.initializer]: own[name].format
        for name, record in plain.items()
        if record.initializer in readers and own[name].format != "none"
    }
    passes = [
        {
            "mode": MODES[form],
            "group_size": FORMATS[form].block or None,
            "names": sorted(name for name, f in chosen.items() if f == form),
        }
        for form in sorted(set(chosen.values()), key=lambda f: FORMATS[f].bits)
    ]
    facts = {"model": str(path), "output": str(output), "layers": sorted(set(readers.values())), "passes": passes}
    return facts, chosen


def by_nncf(source: Artifact, ours: Artifact, folder: Path) -> tuple[Artifact, dict[str, Any]]:
    """A copy of the unquantized artifact whose IR NNCF compressed at our layers, and what it did.

    Raises:
        ToolError: NNCF failed.
    """
    shutil.copytree(source.folder, folder)
    done: dict[str, Any] = {}
    for component in source.manifest.components:
        made = folder / component / "nncf.xml"
        plan, chosen = plan_of(source, ours, component, made)
        if not chosen:
            continue
        file = folder / "plan.json"
        file.write_text(json.dumps(plan), encoding="utf-8")
        command = [python_of(PEER), str(Path(peer_nncf.__file__).resolve()), str(file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ToolError(f"NNCF failed on {component}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
        stored = {reader: STORED.get(kind, kind) for reader, (_, kind) in layers_of_ir(made).items()}
        for suffix in (".xml", ".bin"):
            made.with_suffix(suffix).replace(folder / component / Path(XML).with_suffix(suffix))
        asked = {name: form.partition("-")[0] for name, form in chosen.items()}
        done[component] = {
            "layers": len(chosen),
            "as_ours": sum(stored.get(name) == form for name, form in asked.items()),
            "otherwise": {name: stored.get(name) for name, form in sorted(asked.items()) if stored.get(name) != form},
            "beyond": sorted(name for name, kind in stored.items() if kind in ("int8", "int4") and name not in chosen),
        }
    (folder / "plan.json").unlink(missing_ok=True)
    return dataclasses.replace(source, folder=folder, generation=None), done


def denoiser_errors(artifacts: Mapping[str, Artifact], feeds: Path) -> dict[str, dict[str, float]]:
    """Relative L2 of the denoiser's output on recorded steps, from the unquantized one's: median and worst."""
    truth: list[np.ndarray] = []
    found = {}
    for name in (REFERENCE, *(n for n in artifacts if n != REFERENCE)):
        engine = load_engine(BACKEND, artifacts[name], DENOISER, EngineOptions(threads=1))
        outputs = [next(iter(engine.run(step).values())) for step in read_feeds(str(feeds), DENOISER)]
        engine.close()
        truth = truth or outputs
        errors = [relative_l2(mine, theirs) for mine, theirs in zip(outputs, truth, strict=True)]
        found[name] = {"median": float(np.median(errors)), "worst": float(max(errors))}
    return found


def measure(settings: Settings | None = None) -> dict[str, Any]:
    """Rows of format and quantizer on OpenVINO: bytes, seconds, error of the denoiser, fidelity of pictures.

    Raises:
        UsageError: the peer's environment is not made: ``python -m intaglio.bench.peers make optimum-intel``.
        ToolError: NNCF or a case failed.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from intaglio.exporters.checkpoint import embedded_folder
    from intaglio.exporters.emoji_data import read_training_set

    chosen = settings or Settings()
    python_of(PEER)  # at once, not after the builds
    base = FormatSettings(
        formats=OURS, names=chosen.prompts, prompts=chosen.prompts, steps=chosen.steps, source=chosen.source
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as bars:
        place, data = Path(folder), read_training_set(embedded_folder("emoji"))
        artifacts, _, _ = make_artifacts(base, place, bars)
        layers = {}
        for name in bars.track(OURS, description="NNCF"):
            made, layers[name] = by_nncf(artifacts[REFERENCE], artifacts[name], place / f"nncf-{name}")
            artifacts[THEIRS + name] = made
        errors = denoiser_errors(artifacts, place / "feeds.zip")
        picks = dict.fromkeys((BACKEND, "torch", "onnxruntime"), picked(data, base, 1))
        cells = [c for c in make_cells(artifacts, {}, picks, data, base) if c.backend in (BACKEND, "torch")]
        with running(cells, bars, "load"):
            take_turns(cells, chosen.rounds, bars, "seconds an image")
            draw(cells, picks, place / "pictures", bars)
        alone = [Cell(format=c.format, backend=c.backend, case=denoiser_case(c.case, place)) for c in cells]
        with running(alone, bars, "load UNets"):
            take_turns(alone, chosen.rounds, bars, "seconds a UNet call")
        shared = compared(picks[BACKEND], chosen.prompts)
        rows = [
            {
                **timing(cell, cells),
                **sizes(artifacts[cell.format], cell.backend),
                **fidelity(cell, cells, shared, place / "pictures"),
                "denoiser_error": errors[cell.format] if cell.backend == BACKEND else None,
                "denoiser": {**timing(lone, alone, CALLS), **beside(lone, alone)},
                **beside(cell, cells),
            }
            for cell, lone in zip(cells, alone, strict=True)
        ]
    facts = {"prompts": chosen.prompts, "steps": chosen.steps, "rounds": chosen.rounds, "peer": versions()}
    return {**facts, "layers": layers, "rows": rows}


def beside(cell: Cell, cells: Sequence[Cell]) -> dict[str, Any]:
    """Our seconds over NNCF's, of our rows."""
    if cell.format not in OURS:
        return {}
    return {"seconds_ratio_to_nncf": cell.against(find(cells, THEIRS + cell.format, cell.backend))}


def versions() -> dict[str, str]:
    """What the peer's environment has installed of what matters here."""
    code = (
        "import json, nncf, openvino; print(json.dumps({'nncf': nncf.__version__, 'openvino': openvino.__version__}))"
    )
    result = subprocess.run([python_of(PEER), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(result.stdout.strip().splitlines()[-1])
    return found
