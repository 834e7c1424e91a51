"""What is measured: one case is one artifact on one backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import installed
from intaglio.quantize.formats import TARGETS as SUPPORTED
from intaglio.quantize.formats import check_formats

BACKENDS = {
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}  # backend -> module, tried by default
FLOATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TARGETS = {"openvino": "openvino", "tensorrt": "tensorrt"}  # ONNX Runtime computes in float32 on a CPU
BACKEND_FILES = {"onnxruntime": "model.onnx", "openvino": "openvino_model."}  # how the names of its files start
LOADER = "intaglio.runtimes.pipeline:load"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the benchmark. It crosses to the worker as JSON, so it holds plain data only.

    Attributes:
        artifact: folder of the artifact; `name` is what the report calls it.
        label: unique name of the row.
        backend: engine name; device and threads as `intaglio.load` takes them.
        size: width and height in pixels, None for the artifact's own.
        batch: pictures of a prompt at once.
        steps: sampling steps, None for the artifact's own.
        guidance_scale: None for the artifact's own.
        seed: of the initial noise, the same for every prompt, case and round.
        scheduler: name, None for the artifact's own.
        prompts: at least one; round r measures prompt r modulo their number, in every case the same.
        repeats: measured images, one a round.
        warmup: images made before the first round at least, beside the cold first one.
        checkpoint: where the torch backend finds the checkpoint; empty means by the manifest.
        loader: ``module:function`` with the signature of `intaglio.load`; another one measures a foreign pipeline.
        python: interpreter of the worker, where the foreign pipeline lives in an environment of its own.
        precision: of a foreign pipeline; empty: the artifact's.
        note: what a reader must know of a foreign pipeline.
        bytes: that a foreign pipeline reads; None: those of the artifact.
    """

    artifact: str
    label: str
    backend: str
    prompts: tuple[str, ...]
    name: str = ""
    device: str = "cpu"
    threads: int = 0
    size: tuple[int, int] | None = None
    batch: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    scheduler: str | None = None
    repeats: int = 5
    warmup: int = 1
    checkpoint: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    loader: str = LOADER
    python: str = ""
    precision: str = ""
    note: str = ""
    bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse a case that would measure nothing."""
        if not self.prompts:
            message = "a benchmark needs at least one prompt; add --prompt"
            raise UsageError(message)
        if self.repeats < 1 or self.warmup < 0:
            message = f"--rounds is {self.repeats}; at least 1 is needed"
            raise UsageError(message)

    def prompt(self, turn: int) -> int:
        """Index of the prompt that round `turn` measures."""
        return turn % len(self.prompts)

    @property
    def picture(self) -> tuple[Any, ...]:
        """What decides the picture apart from who computes it: cases that share it are compared with each other."""
        return (self.size, self.batch, self.steps, self.guidance_scale, self.scheduler, self.seed, self.prompts)


def names_of(artifacts: Sequence[Artifact]) -> list[str]:
    """A short unique name per artifact: its folder's, with the parent's and then a number where two are alike."""
    folders = [a.folder.resolve() for a in artifacts]
    names = [f.name for f in folders]
    counts = Counter(names)
    names = [f"{f.parent.name}-{n}" if counts[n] > 1 else n for f, n in zip(folders, names, strict=True)]
    counts = Counter(names)
    return [f"{n}-{i + 1}" if counts[n] > 1 else n for i, n in enumerate(names)]


def precision_of(artifact: Artifact, backend: str = "") -> str:
    """``int8``, ``fp32`` or a mixture such as ``fp32+int8``: the recipe's formats.

    Unquantized components are named by what they are computed in.
    """
    found = set()
    for name, format_name in artifact.manifest.recipe.items():
        computed = artifact.manifest.dtypes.get(TARGETS.get(backend, ""), {}).get(name, "float32")
        found.add(format_name if format_name != "none" else FLOATS[computed])
    return "+".join(sorted(found)) or "unknown"


def support_labels(artifact: Artifact, backend: str) -> list[str]:
    """What the table of support says of an artifact's formats on a backend: ``smaller, not faster`` and why."""
    formats = {b.format for r in artifact.manifest.components.values() for b in r.weights.values()}
    return check_formats(formats, (backend,)) if backend in SUPPORTED else []


def backend_bytes(artifact: Artifact, backend: str) -> int:
    """Bytes of the graphs and weights that a backend reads: its share of an artifact that serves several.

    The torch backend reads the checkpoint; what it would read of the artifact is the shared graph with the codes.
    """
    wanted = BACKEND_FILES.get(backend, BACKEND_FILES["onnxruntime"])
    files = (n for n in artifact.manifest.files if n.rpartition("/")[2].startswith(wanted))
    return sum(artifact.manifest.files[n].size for n in files)


def unquantized(artifact: Artifact) -> bool:
    """Whether every component keeps the checkpoint's own numbers."""
    return all(f == "none" for f in artifact.manifest.recipe.values())


def default_backends() -> tuple[str, ...]:
    """The backends that are installed, torch first.

    Raises:
        UsageError: none is.
    """
    found = tuple(name for name, module in BACKENDS.items() if installed(module))
    if not found:
        message = f"no backend is installed; run: pip install 'intaglio[onnxruntime]' (or {', '.join(BACKENDS)})"
        raise UsageError(message)
    return found
