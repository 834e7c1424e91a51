"""Every number format on every CPU backend, on the embedded checkpoint: what it saves, what it costs, what it keeps.

Every format is derived from one unquantized artifact and one file of recorded feeds; `formats_cells` times and draws.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.bench.cases import Case
from intaglio.bench.formats_cells import (
    CALLS,
    DENOISER,
    REFERENCE,
    SEED,
    TORCH,
    Cell,
    Pick,
    draw,
    find,
    picture,
    running,
    take_turns,
    timing,
)
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import Unsupported
from intaglio.quantize.formats import FORMATS, check_formats

if TYPE_CHECKING:
    from rich.progress import Progress

    from intaglio.exporters.emoji_data import TrainingSet

BACKENDS = ("onnxruntime", "openvino")
# Row of the table -> format of all components, further options of a build. fp32: weights as the checkpoint has them.
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    REFERENCE: ("none", {}),
    **{name: (name, {}) for name, row in FORMATS.items() if row.codec},
    "int4 awq": ("int4", {"quantize.method": "awq"}),
    "int4 rank 16": ("int4", {"quantize.rank": "16"}),
}
LOADER = "intaglio.bench.formats_cells:load_denoiser"
THREADS = 1  # as `make demo`: two hardly help so small a model, and torch's would wait for each other


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        formats: of VARIANTS; fp32 is always among them.
        names: a language for retrieval on OpenVINO; the slower backends draw every second.
        prompts: names, half in each language, whose pictures are compared with fp32's of the same noise.
        steps: of the sampler.
        rounds: timed images a cell.
        source: an unquantized artifact with IR; built where ``None``.
    """

    formats: tuple[str, ...] = tuple(VARIANTS)
    names: int = 100
    prompts: int = 32
    steps: int = 20
    rounds: int = 7
    source: Path | None = None


def measure(settings: Settings | None = None) -> dict[str, Any]:
    """Rows of format and backend: bytes, seconds, peak memory, fidelity, retrieval; coverage per format.

    Raises:
        ToolError: any cell fails. A format that a backend refuses by the table of formats is a row that says so.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from intaglio.exporters.checkpoint import embedded_folder
    from intaglio.exporters.emoji_data import read_training_set

    chosen = settings or Settings()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as bars:
        place, data = Path(folder), read_training_set(embedded_folder("emoji"))
        artifacts, coverage, refused = make_artifacts(chosen, place, bars)
        picks = {backend: picked(data, chosen, 1 if backend == "openvino" else 2) for backend in (*BACKENDS, TORCH)}
        shared = compared(picks[TORCH], chosen.prompts)
        cells = make_cells(artifacts, refused, picks, data, chosen)
        with running(cells, bars, "load"):
            take_turns(cells, chosen.rounds, bars, "seconds an image")
            draw(cells, picks, place / "pictures", bars)
        alone = [Cell(format=c.format, backend=c.backend, case=denoiser_case(c.case, place)) for c in cells]
        with running(alone, bars, "load UNets"):
            take_turns(alone, chosen.rounds, bars, "seconds a UNet call")
        rows = [
            {
                **timing(cell, cells),
                **sizes(artifacts[cell.format], cell.backend),
                **fidelity(cell, cells, shared, place / "pictures"),
                "retrieval": retrieval(cell, picks[cell.backend], data, place / "pictures"),
                "denoiser": timing(lone, alone, CALLS),
            }
            for cell, lone in zip(cells, alone, strict=True)
        ]
    rows += [{"format": f, "backend": b, "status": "refused", "reason": text} for (f, b), text in refused.items()]
    facts = {"names": chosen.names, "prompts": len(shared), "steps": chosen.steps, "rounds": chosen.rounds}
    return {**facts, "threads": THREADS, "unet_calls": CALLS, "coverage": coverage, "rows": rows}


def make_artifacts(
    settings: Settings, place: Path, bars: Progress
) -> tuple[dict[str, Artifact], dict[str, dict[str, Any]], dict[tuple[str, str], str]]:
    """An artifact per format, the coverage of each, and what backends refuse, by format and backend."""
    from intaglio.exporters.build import build
    from intaglio.exporters.recipes import calibration_set
    from intaglio.quantize.feeds import record_feeds

    source = (
        Artifact.open(settings.source)
        if settings.source
        else build("emoji", place / REFERENCE, targets=("openvino",), options={"certificate.prompts": "0"})
    )
    record_feeds(source, tuple(source.manifest.components), calibration_set({}), place / "feeds.zip")
    artifacts, coverage, refused = {REFERENCE: source}, {}, {}
    for name in bars.track([n for n in settings.formats if n != REFERENCE], description="formats"):
        carried = []
        for backend in BACKENDS:
            try:
                check_formats([VARIANTS[name][0]], (backend,))
                carried.append(backend)
            except Unsupported as error:
                refused[name, backend] = str(error)
        artifacts[name], coverage[name] = derived(source, name, place, carried)
    return artifacts, coverage, refused


def derived(source: Artifact, name: str, place: Path, backends: Sequence[str]) -> tuple[Artifact, dict[str, Any]]:
    """A quantized artifact, sealed, and its coverage: of each component and of the whole."""
    from intaglio.exporters.derive import contract_of, derive
    from intaglio.exporters.quantization import calibrate_component, layers_of
    from intaglio.exporters.recipes import component_recipes, needs_feeds, rules_of
    from intaglio.profiles.artifact import BUILD_LOG, SUMS, seal
    from intaglio.profiles.manifest import MANIFEST
    from intaglio.profiles.strict import to_dict
    from intaglio.quantize import layers

    format_name, options = VARIANTS[name]
    components = tuple(source.manifest.components)
    contracts = {c: contract_of(source, c) for c in components}
    recipes = component_recipes({"*": format_name}, None, options, components, contracts)
    calibrated = {
        c: calibrate_component(source, c, recipes[c], contracts[c], place / "feeds.zip", lambda text: None)
        for c in components
        if needs_feeds(recipes[c])
    }
    targets = ("onnx", *(("openvino",) if "openvino" in backends else ()))
    made = derive(source, place / name.replace(" ", "-"), recipes, calibrated, targets)
    for file in (MANIFEST, BUILD_LOG, SUMS):  # the unquantized artifact's
        (made.folder / file).unlink()
    sealed = Artifact(folder=made.folder, manifest=seal(made.folder, made.manifest, {}))
    found, choices, macs = [], {}, {}
    for c in components:
        own = layers_of(source.component(c))
        choices.update({f"{c}/{k}": v for k, v in layers.assign(own, recipes[c], rules_of(contracts[c])).items()})
        found += [dataclasses.replace(layer, parameter=f"{c}/{layer.parameter}") for layer in own]
        macs.update({f"{c}/{k}": v for k, v in calibrated[c].macs.items()} if c in calibrated else {})
    whole = layers.coverage(found, choices, macs)
    records = {c: r.quantization.coverage for c, r in made.manifest.components.items() if r.quantization}
    shares = {c: {k: v for k, v in to_dict(r).items() if k != "exceptions"} for c, r in {**records, "": whole}.items()}
    return sealed, {"whole": shares.pop(""), "components": shares, "exceptions": whole.exceptions}


def picked(data: TrainingSet, settings: Settings, stride: int) -> list[Pick]:
    """Names to draw, spread over the training set, the same in each language."""
    from intaglio.bench.retrieval import LANGUAGES

    return [(language, index) for language in LANGUAGES for index in data.spread(settings.names)[::stride]]


def compared(picks: Sequence[Pick], prompts: int) -> list[Pick]:
    """`prompts` of the names, half in each language."""
    half = len(picks) // 2
    where = np.linspace(0, half - 1, prompts // 2).round().astype(int)
    return [picks[half * language + i] for language in range(2) for i in where]


def make_cells(
    artifacts: Mapping[str, Artifact],
    refused: Mapping[tuple[str, str], str],
    picks: Mapping[str, Sequence[Pick]],
    data: TrainingSet,
    settings: Settings,
) -> list[Cell]:
    """Torch in fp32, then every format on every backend that does not refuse it."""
    wanted = [(REFERENCE, TORCH), *((f, b) for f in artifacts for b in BACKENDS if (f, b) not in refused)]
    return [
        Cell(
            format=name,
            backend=backend,
            case=Case(
                artifact=str(artifacts[name].folder),
                label=f"{name} {backend}",
                backend=backend,
                threads=THREADS,
                steps=settings.steps,
                seed=SEED,
                prompts=tuple(data.names[index][language] for language, index in picks[backend]),
            ),
        )
        for name, backend in wanted
    ]


def denoiser_case(case: Case, place: Path) -> Case:
    """The same cell, its UNet alone."""
    settings = {"feeds": str(place / "feeds.zip")}
    return dataclasses.replace(case, loader=LOADER, settings=settings, prompts=case.prompts[:1])


def sizes(artifact: Artifact, backend: str) -> dict[str, int]:
    """Bytes of graphs and weights that the backend reads, of all components and of the UNet."""
    bytes_of = {c: read_bytes(artifact, backend, c) for c in artifact.manifest.components}
    by_source = {artifact.manifest.components[c].source: n for c, n in bytes_of.items()}
    # torch reads one file for both halves of the VAE
    return {
        "bytes": sum((by_source if backend == TORCH else bytes_of).values()),
        "denoiser_bytes": bytes_of[DENOISER],
    }


def read_bytes(artifact: Artifact, backend: str, component: str) -> int:
    """Bytes of one component: the IR, the ONNX graph with the tensors it names, or the checkpoint's own weights."""
    import onnx

    from intaglio.exporters.checkpoint import embedded_folder
    from intaglio.runtimes.engine_onnxruntime import PROVIDERS, graph_path

    if backend == "onnxruntime":
        path = graph_path(artifact, component, PROVIDERS["cpu"])
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        facts = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
        return path.stat().st_size + sum(int(f["length"]) for f in facts if f)
    folder, pattern = artifact.component(component), "openvino_model.*"
    if backend == TORCH:
        folder, pattern = embedded_folder("emoji") / artifact.manifest.components[component].source, "*.safetensors"
    return sum(path.stat().st_size for path in folder.glob(pattern))


def fidelity(cell: Cell, cells: Sequence[Cell], shared: Sequence[Pick], folder: Path) -> dict[str, Any]:
    """Median and worst PSNR, SSIM and FLIP against fp32 on the same backend; of fp32 itself against torch."""
    from PIL import Image

    from intaglio.bench.metrics import METRICS
    from intaglio.bench.metrics import measure as compare

    if cell.backend == TORCH:
        return {}
    other = find(cells, REFERENCE, TORCH if cell.format == REFERENCE else cell.backend)
    both = [[np.asarray(Image.open(picture(folder, c, pick)).convert("RGB")) for c in (cell, other)] for pick in shared]
    rows = [compare(mine, theirs) for mine, theirs in both]
    result: dict[str, Any] = {"identical": sum(row["identical"] for row in rows)}
    for name, metric in METRICS.items():
        if any(name in row["reasons"] for row in rows):  # such as a picture smaller than the metric needs
            continue
        values = [np.inf if row[name] is None else row[name] for row in rows]
        made = {"median": np.median(values), "worst": (min if metric.higher_is_better else max)(values)}
        result[name] = {k: round(float(v), 5) if np.isfinite(v) else None for k, v in made.items()}
    return result


def retrieval(cell: Cell, picks: Sequence[Pick], data: TrainingSet, folder: Path) -> dict[str, Any]:
    """Shares of pictures whose right emoji is the nearest, and within the five nearest: of all, and per language."""
    from PIL import Image

    from intaglio.bench.retrieval import LANGUAGES, TOP, share_within

    found = [(pick[0], data.rank(Image.open(picture(folder, cell, pick)), pick[1])) for pick in picks]
    groups = {"all": LANGUAGES, **{language: (language,) for language in LANGUAGES}}
    ranks = {name: [rank for language, rank in found if language in group] for name, group in groups.items()}
    shares = {n: {"top1": share_within(r, 1), "top5": share_within(r, TOP)} for n, r in ranks.items()}
    return {"pictures": len(found), **shares.pop("all"), **shares}
