"""A whole pipeline in one safetensors file, in the CompVis/LDM layout of Dreambooth and the webuis.

diffusers' own key conversion runs on stand-ins that record what is done to them (`Trace`), so every parameter of a
component is known as a tensor of the file and a slice or transposition of it, and is read alone when it is needed.
Configuration and tokenizer are not in such a file: they come with this package (``profiles/single_file``) or from a
diffusers folder that fits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters.checkpoint import ROOT_FILES, Checkpoint
from intaglio.exporters.config_files import read_json
from intaglio.exporters.single_file_config import (
    CONFIGURATION_SUFFIXES,
    MERGES,
    SCHEDULER,
    bundled_folder,
    configured,
)
from intaglio.exporters.single_file_layouts import (
    INPUT_CHANNELS,
    PREDICTIONS,
    UNQUANTIZED,
    Layout,
    Part,
    input_channels,
    layout_of,
    stated_prediction,
    unknown_tensors,
)
from intaglio.exporters.untrusted import read_index
from intaglio.exporters.weights import Parameter, Step, Weights, read_header, read_metadata
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.registry import suggestion

if TYPE_CHECKING:
    import torch

PREFIX = "checkpoint."
OPTIONS = {"prediction_type": f"what the UNet of a single-file checkpoint predicts: {' or '.join(PREDICTIONS)}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleFile:
    """The weights of a checkpoint that are in one file.

    `configuration` is the folder its configuration was taken from, `bundled` its name where it is one of ours.
    """

    file: Path
    layout: Layout
    configuration: Path
    bundled: str | None
    parts: Mapping[str, Weights]
    remarks: tuple[str, ...]

    def sources(self) -> dict[str, Path]:
        """Every file that decides about an artifact, by a name that does not depend on where it lies."""
        place = self.bundled or "config"
        files = sorted(p for p in self.configuration.rglob("*") if p.is_file() and p.suffix in CONFIGURATION_SUFFIXES)
        named = {f"{place}/{p.relative_to(self.configuration).as_posix()}": p for p in files}
        merges = {MERGES: self.configuration.parent / MERGES} if self.bundled else {}
        return {"checkpoint.safetensors": self.file, **named, **merges}


def open_single_file(file: Path, *, config: Path | None = None, options: Mapping[str, str] | None = None) -> Checkpoint:
    """Open a single-file checkpoint.

    Args:
        file: in the layout of Stable Diffusion 1.x, 2.x, XL or the XL refiner.
        config: a diffusers folder whose configuration fits, for models of another size; without it one of ours.
        options: of `OPTIONS`, with `PREFIX`; other keys are somebody else's.

    Raises:
        CheckpointError: it is another kind of file, has tensors nobody takes, or does not fit the configuration.
        UsageError: an option is not allowed, or needed and not given.
        Unsupported: its weights are quantized already.
    """
    with file.open("rb") as stream:
        if stream.read(4) == b"GGUF" or file.suffix == ".gguf":
            raise Unsupported(f"{file} is GGUF, which is quantized already; {UNQUANTIZED}")
    header, metadata = read_header(file), read_metadata(file)
    layout = layout_of(file, header)
    asked, stated = check_options(options or {}), stated_prediction(file, header, metadata)
    bundled = None if config is not None else choose_configuration(file, layout, asked or stated)
    source = config if config is not None else bundled_folder(bundled or "")
    if not (source / "model_index.json").exists():
        raise CheckpointError(f"{source} has no model_index.json: it is no diffusers folder whose configuration fits")
    if config is not None:
        read_index(source, ROOT_FILES)
    current = read_json(source / SCHEDULER).get("prediction_type", "epsilon")
    if config is not None and asked is None and stated not in (None, current):
        raise CheckpointError(
            f"{file} states {stated}, {source / SCHEDULER} says {current}; add --set {PREFIX}prediction_type=TYPE"
        )
    prediction = asked or stated or current
    changes: dict[str, Any] = {} if prediction == current else {"prediction_type": prediction}
    if "ztsnr" in header and prediction == "v_prediction":
        changes["rescale_betas_zero_snr"] = True
    folder = configured(source, json.dumps(changes)) if bundled or changes else source
    check_channels(file, header, folder)
    parts = {part.name: convert(file, part, folder) for part in layout.parts}
    taken = {parameter.key for weights in parts.values() for parameter in weights.values()}
    unknown = unknown_tensors(header, taken)
    if unknown:
        raise CheckpointError(
            f"{file} is {layout.title} with {len(unknown)} tensors that no component takes: {', '.join(unknown[:3])}"
        )
    single = SingleFile(
        file=file,
        layout=layout,
        configuration=source,
        bundled=bundled,
        parts=parts,
        remarks=remarks(file, layout, bundled, prediction, header),
    )
    return Checkpoint(folder=folder, name=file.stem, index=read_json(folder / "model_index.json"), single=single)


def remarks(
    file: Path, layout: Layout, bundled: str | None, prediction: str, header: Mapping[str, Any]
) -> tuple[str, ...]:
    """What was decided for the user: the configuration, and EMA weights that stay behind."""
    said = []
    if bundled:
        said.append(f"{file.name} is {layout.title} ({prediction}); its configuration and tokenizer come with intaglio")
    if any(key.startswith("model_ema.") for key in header):
        said.append(f"{file.name} has EMA weights too (model_ema.*); they are left out, as diffusers does")
    return tuple(said)


def check_options(options: Mapping[str, str]) -> str | None:
    """The prediction type asked for.

    Raises:
        UsageError: an unknown key with our prefix, or an unknown value.
    """
    own = {key.removeprefix(PREFIX): value for key, value in options.items() if key.startswith(PREFIX)}
    for key in own:
        if key not in OPTIONS:
            allowed = ", ".join(PREFIX + k for k in OPTIONS)
            raise UsageError(f"--set {PREFIX}{key} is unknown; allowed: {allowed}.{suggestion(key, OPTIONS)}")
    asked = own.get("prediction_type")
    if asked is not None and asked not in PREDICTIONS:
        near = suggestion(asked, PREDICTIONS)
        raise UsageError(f"--set {PREFIX}prediction_type={asked} is not allowed: {', '.join(PREDICTIONS)}.{near}")
    return asked


def choose_configuration(file: Path, layout: Layout, prediction: str | None) -> str:
    """The bundled configuration for a layout and what is known of its prediction type.

    Raises:
        UsageError: it is not known and the layout has two; 2.x-base and 2.x-768-v have the same tensors.
    """
    if prediction is not None and prediction in layout.configurations:
        return layout.configurations[prediction]
    if len(layout.configurations) == 1:
        return next(iter(layout.configurations.values()))
    choices = " or ".join(f"--set {PREFIX}prediction_type={name}" for name in PREDICTIONS)
    raise UsageError(
        f"{file} is {layout.title}, and its tensors do not tell what it predicts; "
        f"add {choices} (epsilon: 2.x-base, 512 px; v_prediction: 2.x, 768 px)"
    )


def check_channels(file: Path, header: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path) -> None:
    """The UNet takes as many channels as its configuration says.

    Raises:
        Unsupported: naming the kind of model where there is one.
    """
    found, wanted = input_channels(header), read_json(folder / "unet/config.json")["in_channels"]
    if found != wanted:
        kind = INPUT_CHANNELS.get(found, "another")
        raise Unsupported(f"{file} is {kind} model ({found} input channels, allowed: {wanted}), which is not supported")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Stands for a tensor while diffusers converts names: it remembers what is done instead of doing it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    view: tuple[Step, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def T(self) -> Trace:
        """Transposed."""
        return Trace(key=self.key, dtype=self.dtype, shape=self.shape[::-1], view=(*self.view, "T"))

    def __getitem__(self, index: Any) -> Trace:
        indices = index if isinstance(index, tuple) else (index,)
        step = tuple(i if isinstance(i, int) else (i.start, i.stop) for i in indices)
        shape = np.broadcast_to(np.empty(()), self.shape)[indices].shape
        return Trace(key=self.key, dtype=self.dtype, shape=shape, view=(*self.view, step))

    def contiguous(self) -> Trace:
        """Itself: layout in memory is decided when values are read."""
        return self

    clone = detach = contiguous


def convert(file: Path, part: Part, folder: Path) -> Weights:
    """The parameters of one component under their diffusers names.

    Raises:
        CheckpointError: the names do not fit the configuration.
    """
    header = read_header(file)
    traces = {k: Trace(key=k, dtype=d, shape=s) for k, (d, s) in header.items() if k.startswith(part.prefixes)}
    config = folder / part.name / "config.json"
    try:
        converted = CONVERTERS[part.kind](traces, read_json(config), part.prefixes[0])
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(f"{file}: {part.name} does not fit {config} ({type(error).__name__}: {error})") from error
    entries = {
        name: Parameter(file=file, key=trace.key, dtype=trace.dtype, shape=trace.shape, view=trace.view)
        for name, trace in converted.items()
        if trace is not None
    }
    return Weights.of(file, entries)


Traces = dict[str, Trace]


def _library() -> Any:
    from diffusers.loaders import single_file_utils

    return single_file_utils


def convert_unet(traces: Traces, config: Mapping[str, Any], _: str) -> Traces:
    """Names of ``UNet2DConditionModel``."""
    converted: Traces = _library().convert_ldm_unet_checkpoint(traces, config)
    return converted


def convert_vae(traces: Traces, config: Mapping[str, Any], _: str) -> Traces:
    """Names of ``AutoencoderKL``."""
    converted: Traces = _library().convert_ldm_vae_checkpoint(traces, config)
    return converted


def convert_clip(traces: Traces, _: Mapping[str, Any], prefix: str) -> Traces:
    """Names of transformers' CLIP text models, from those of transformers 4."""
    converted: Traces = _library().convert_ldm_clip_checkpoint(traces, remove_prefix=prefix)
    return converted


def convert_open_clip(traces: Traces, config: Mapping[str, Any], prefix: str) -> Traces:
    """Names of transformers' CLIP text models, from OpenCLIP's with their fused projections."""
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    converted: Traces = _library().convert_open_clip_checkpoint(model, traces, prefix=prefix)
    return converted


CONVERTERS: Mapping[str, Callable[[Traces, Mapping[str, Any], str], Traces]] = {
    "unet": convert_unet,
    "vae": convert_vae,
    "clip": convert_clip,
    "open_clip": convert_open_clip,
}


def library_model(single: SingleFile, folder: Path, kind: Any, part: str) -> torch.nn.Module:
    """The trained model in float32 as diffusers itself reads it from the file: all of it, by values.

    Args:
        single: the file.
        folder: its configuration.
        kind: a class of diffusers with ``from_single_file``, or a CLIP text model of transformers.
        part: the component.
    """
    library, place = _library(), {"config": str(folder), "subfolder": part, "local_files_only": True}
    if hasattr(kind, "from_single_file"):
        model = kind.from_single_file(str(single.file), **place)
    else:
        state = library.load_single_file_checkpoint(str(single.file), local_files_only=True)
        model = library.create_diffusers_clip_model_from_ldm(kind, state, **place)
    trained: torch.nn.Module = model.float()
    return trained
