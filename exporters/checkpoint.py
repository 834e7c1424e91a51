"""Open a checkpoint: class, configurations, safetensors headers. Nothing is unpickled, nothing downloaded.

A checkpoint is a diffusers pipeline folder, one of those in Hugging Face's cache, or one file (`single_file`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.config_files import read_json
from intaglio.exporters.config_files import write_config as write_config
from intaglio.exporters.hub import cached_folder, is_repository
from intaglio.exporters.licence import FILES as LICENCE_FILES
from intaglio.exporters.licence import licence_of
from intaglio.exporters.lora import Loras
from intaglio.exporters.single_file_layouts import UNQUANTIZED, refuse_quantized
from intaglio.exporters.textual_inversion import Inversions
from intaglio.exporters.untrusted import NOT_EXPORTED, read_index
from intaglio.exporters.weights import PICKLES, read_header, read_metadata, weight_files
from intaglio.exporters.weights import WEIGHT_FILES as WEIGHT_FILES
from intaglio.exporters.weights import Parameter as Parameter
from intaglio.exporters.weights import Weights as Weights
from intaglio.profiles.artifact import SUMS, sha256
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.manifest import MANIFEST
from intaglio.profiles.registry import suggestion

if TYPE_CHECKING:
    from intaglio.exporters.preview_vae import PreviewVae
    from intaglio.exporters.single_file import SingleFile

SINGLE_FILES = (".safetensors", ".gguf")  # the second is refused by name
PREVIEW = "vae_preview"  # the component that is not in the checkpoint's folder
ROOT_FILES = ("model_index.json", "sampling_defaults.json", "README.md", *LICENCE_FILES)  # beside the parts' folders
SMALL_FILES = (".json", ".txt", ".model", ".jinja")
EMBEDDED = ("emoji",)  # checkpoints that ship with the package, by name
LEAVE_OUT = {"text_encoder_3": "; to build without it add --set sd3.t5=false"}  # parts a pipeline can go without


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A pipeline: configuration, tokenizers and, unless they are in a single file, weights.

    Attributes:
        folder: in diffusers' layout. For a single file it holds no weights and goes when the process ends.
        name: what the user calls it.
        index: ``model_index.json``.
        options: the family's build options.
        single: the file that holds the weights, if one does.
        loras, inversions, preview: what a build adds; `weights` and `config` have it.
    """

    folder: Path
    name: str
    index: Mapping[str, Any]
    options: Mapping[str, str] = field(default_factory=dict)
    single: SingleFile | None = None
    loras: Loras = field(default_factory=Loras)
    inversions: Inversions = field(default_factory=Inversions)
    preview: PreviewVae | None = None

    @property
    def pipeline_class(self) -> str:
        """The ``_class_name`` of ``model_index.json``."""
        return str(self.index["_class_name"])

    def component_class(self, part: str) -> str | None:
        """The class ``model_index.json`` gives a component; ``None`` where the pipeline goes without it."""
        library_and_class = self.index.get(part)
        return library_and_class[1] if isinstance(library_and_class, list) else None

    @property
    def location(self) -> Path:
        """The folder or file that the user gave."""
        return self.folder if self.single is None else self.single.file

    @property
    def licence(self) -> str | None:
        """What the checkpoint itself says its licence is, in one line; ``None`` where it says nothing."""
        if self.single is not None:
            return read_metadata(self.single.file).get("modelspec.license")
        return licence_of(self.folder)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was decided for the user when the checkpoint was opened."""
        return () if self.single is None else self.single.remarks

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """A component's JSON configuration.

        Raises:
            CheckpointError: it is missing or not JSON.
        """
        if part == PREVIEW and self.preview is not None:
            return self.preview.config()
        self._check_part(part)
        found = read_json(self.folder / part / file)
        return self.inversions.config(part, found) if file == "config.json" else found

    def weights(self, part: str) -> Weights:
        """The parameters of a component, with what a build adds to them.

        Raises:
            CheckpointError: they are missing, incomplete or a pickle.
            Unsupported: they are quantized already.
        """
        if part == PREVIEW and self.preview is not None:
            return self.preview.weights()
        stored = self._stored(part) if self.single is None else self.single.parts[part]
        return self.inversions.apply(part, self.loras.apply(part, stored))

    def _stored(self, part: str) -> Weights:
        self._check_part(part)
        return stored_weights(self.folder / part)

    def _check_part(self, part: str) -> None:
        kind = self.component_class(part)
        if kind is not None and not (self.folder / part).is_dir():
            raise CheckpointError(
                f"{self.folder / 'model_index.json'} names {part} ({kind}), but {self.folder / part} is missing; "
                f"the checkpoint is incomplete, fetch it again{LEAVE_OUT.get(part, '')}"
            )


def stored_weights(folder: Path) -> Weights:
    """The parameters of a model's folder.

    Raises:
        CheckpointError: they are missing, incomplete or a pickle.
        Unsupported: they are quantized already.
    """
    configuration = folder / "config.json"
    quantized = read_json(configuration).get("quantization_config") if configuration.exists() else None
    if quantized is not None:
        method = dict(quantized).get("quant_method", "a quantization_config")
        raise Unsupported(f"{configuration} says that its weights are quantized already ({method}); {UNQUANTIZED}")
    weights = Weights(files=weight_files(folder))
    for file in weights.files:
        refuse_quantized(file, read_header(file))
    return weights


def open_checkpoint(
    source: str | Path | Checkpoint, *, config: str | Path | None = None, options: Mapping[str, str] | None = None
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: a diffusers folder, a safetensors file in the CompVis/LDM layout, the name of an embedded checkpoint,
            ``ORG/NAME`` or ``ORG/NAME@REVISION`` in Hugging Face's cache, or a checkpoint that is open already.
        config: for a file: a diffusers folder whose configuration fits, where none of ours does.
        options: ``--set`` values; those that begin with ``checkpoint.`` are about a single file.

    Raises:
        CheckpointError: missing, a pickle, not a pipeline, or not what `untrusted` lets in; the message says what would
            be accepted.
        UsageError: an option that does not go with this checkpoint, or one that is needed.
        Unsupported: the weights are quantized already, or it is a kind of model nobody runs here.
    """
    if isinstance(source, Checkpoint):
        return source
    path = Path(source)
    if path.is_file() and path.suffix in SINGLE_FILES:
        from intaglio.exporters.single_file import open_single_file

        return open_single_file(path, config=None if config is None else Path(config), options=options)
    opened = _open_folder(str(source))
    if config is not None:
        raise UsageError(f"--config {config} goes with a single file; {opened.folder} has its own configuration")
    for key in options or {}:
        if key.startswith("checkpoint."):
            raise UsageError(f"--set {key} goes with a single file; {opened.folder} has its own configuration")
    return opened


def _open_folder(source: str) -> Checkpoint:
    folder = embedded_folder(source) if source in EMBEDDED else Path(source)
    name = source if source in EMBEDDED else folder.resolve().name
    if folder.suffix in PICKLES and not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a pickle ({folder.suffix}) and can run code when it is read; "
            f"convert it to safetensors first: intaglio convert {folder} -o {folder.with_suffix('.safetensors')}"
        )
    if not folder.is_dir():
        if not is_repository(source):
            near = suggestion(source, EMBEDDED)
            raise CheckpointError(
                f"{source} is not a folder; allowed: a diffusers pipeline folder or {', '.join(EMBEDDED)}, "
                f"a .safetensors file of Stable Diffusion, ORG/NAME in Hugging Face's cache.{near}"
            )
        folder, name = cached_folder(source), source.partition("@")[0]
    if all((folder / file).is_file() for file in (MANIFEST, SUMS)):
        raise CheckpointError(
            f"{folder} is an artifact, not a checkpoint; build from the checkpoint it was made of, which "
            f"'intaglio inspect {folder}' names: intaglio build CHECKPOINT -o {folder}"
        )
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder} has no model_index.json, so it is not a diffusers pipeline folder")
    # What came with the package was installed with it, perhaps as hard links into a cache of the installer.
    index = read_json(folder / "model_index.json") if source in EMBEDDED else read_index(folder, ROOT_FILES)
    if "_class_name" not in index:
        raise CheckpointError(f"{folder / 'model_index.json'} has no _class_name")
    return Checkpoint(folder=folder, name=name, index=index)


def embedded_folder(name: str) -> Path:
    """The folder of an embedded checkpoint, as a real path."""
    folder = Path(str(resources.files("intaglio.profiles"))) / name
    if not (folder / "model_index.json").exists():
        raise CheckpointError(
            f"the embedded checkpoint {name!r} is not installed; reinstall intaglio with its package data"
        )
    return folder


def source_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of every file the build may read, by a relative path that does not depend on where it lies.

    A repository's other files (a single-file copy of the same weights, a second precision, parts that are not
    exported) are not read, and do not count.
    """
    names = source_files(checkpoint)
    return {name: sha256(names[name]) for name in sorted(names)}


def source_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Every file the build may read, by the name it has in `source_digests`."""
    if checkpoint.single is not None:
        return dict(checkpoint.single.sources())
    return {p.relative_to(checkpoint.folder).as_posix(): p for p in _files_read(checkpoint)}


def _files_read(checkpoint: Checkpoint) -> Iterator[Path]:
    yield from (p for p in checkpoint.folder.iterdir() if p.is_file() and p.name in ROOT_FILES)
    for part in checkpoint.index:
        folder = checkpoint.folder / part
        if part in NOT_EXPORTED or checkpoint.component_class(part) is None or not folder.is_dir():
            continue
        yield from (p for p in folder.rglob("*") if p.is_file() and p.suffix in SMALL_FILES)
        if any(folder.glob("*.safetensors")):
            yield from weight_files(folder)
