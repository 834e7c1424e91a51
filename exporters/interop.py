"""A folder that another tool loads, made of links to an artifact's files and the few that the tool wants otherwise.

The layout of an artifact is already that of optimum and OpenVINO GenAI: ``model_index.json``, ``scheduler/``,
``tokenizer*/`` and a folder a component with ``model.onnx`` or ``openvino_model.xml``, under the same names of inputs
and outputs. What differs is small and is written anew here, the weights are the artifact's own:

* GenAI reads tokenizers as OpenVINO models, which ``openvino-tokenizers`` makes of the artifact's.
* GenAI sets the UNet's ``timestep`` as int64; a Convert follows the input.
* All three take outputs of CLIPTextModel by position: ``last_hidden_state``, then ``pooler_output``.
* ONNX Runtime plans memory by names of axes; optimum feeds the UNet one timestep for all rows of the batch, so that
  axis must not be called ``batch``.
* transformers 4 loads ``tokenizer.json`` by the fast tokenizers' classes alone.
"""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.interop_xml import Tree, int64_input, result_first
from intaglio.exporters.tokenizer_files import load_tokenizer
from intaglio.profiles.artifact import Artifact, whole
from intaglio.profiles.errors import ArtifactError, Unsupported
from intaglio.profiles.registry import need, pick
from intaglio.profiles.staging import writing

if TYPE_CHECKING:
    import onnx

    from intaglio.profiles.spec import ComponentRecord

PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae_encoder", "vae_decoder")
XML, BIN, GRAPH, LOWERED = "openvino_model.xml", "openvino_model.bin", "model.onnx", "model.onnxruntime.onnx"
STATES, POOLED, TIMESTEP = "last_hidden_state", "pooler_output", "timestep"
FAST = {"CLIPTokenizer": "CLIPTokenizerFast", "T5Tokenizer": "T5TokenizerFast"}  # the same in transformers 5
OWN_AXIS = "timesteps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One row of TOOLS.

    Attributes:
        target: of the artifact, whose files the tool reads.
        families: those whose components it feeds as ours are fed.
        load: what the user types next; ``{folder}`` is what was made.
    """

    target: str
    families: tuple[str, ...]
    load: str


FAMILIES = ("sd", "sdxl", "sd3", "flux")
TOOLS: Mapping[str, Tool] = {
    "genai": Tool(
        target="openvino",
        families=FAMILIES,
        load="openvino_genai.Text2ImagePipeline({folder!r}, 'CPU', INFERENCE_PRECISION_HINT='f32')",
    ),
    "optimum-intel": Tool(
        target="openvino",
        families=FAMILIES,
        load="optimum.intel.OVDiffusionPipeline.from_pretrained({folder!r}, "
        "ov_config={{'INFERENCE_PRECISION_HINT': 'f32'}})",
    ),
    "optimum-onnx": Tool(
        target="onnx",
        families=FAMILIES,
        load="optimum.onnxruntime.ORTDiffusionPipeline.from_pretrained({folder!r})",
    ),
}
# Why the tools cannot run what these families' graphs are.
ELSEWHERE = {
    "flux2": "they read the VAE's latent statistics from its configuration, where an artifact has them in the graph",
    "qwen_image": "they feed the transformer two scalars, height and width, where an artifact's takes position ids",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """What was made.

    Attributes:
        folder: where it lies.
        written: files made anew, relative; the others are the artifact's.
        load: what to type next.
        notes: where the tool's pictures are known to be other than ours.
    """

    folder: Path
    written: tuple[str, ...]
    load: str
    notes: tuple[str, ...]


def arrange(artifact_folder: str | Path, into: Path, tool: str, *, copy: bool = False) -> Arranged:
    """Make `into`, whole or not at all, a folder that `tool` loads.

    Args:
        artifact_folder: of an artifact; it is verified, and must stay where it is unless `copy`.
        into: must not exist.
        tool: a name of TOOLS.
        copy: copy the weights in place of symbolic links. Hard links are never made: an artifact whose files have a
            second name is refused by its own readers.

    Raises:
        UsageError: no such tool; `into` exists or cannot be written.
        ArtifactError: the artifact is incomplete or altered, or was built without the target.
        Unsupported: the tool does not run this family.
        MissingDependency: openvino-tokenizers is not installed.
    """
    row = pick(TOOLS, tool, "tool")

    def make(artifact: Artifact) -> Arranged:
        check(artifact, tool)
        with writing(into) as folder:
            written = _Arrangement(artifact, folder, tool, into, copy=copy).make()
        load = row.load.format(folder=str(into))
        return Arranged(folder=into, written=tuple(written), load=load, notes=differences(artifact, tool))

    return whole(artifact_folder, make)


def check(artifact: Artifact, tool: str) -> None:
    """Refuse what the tool cannot load.

    Raises:
        Unsupported: the tool does not run this family.
        ArtifactError: the artifact was built without the target.
    """
    row, family = pick(TOOLS, tool, "tool"), artifact.manifest.family
    if family not in row.families:
        reason = ELSEWHERE.get(family, "their pipelines have no such family")
        raise Unsupported(f"{tool} does not run the family {family!r} of an artifact: {reason}")
    for name, record in artifact.manifest.components.items():
        if name in PARTS and row.target not in record.targets:
            raise ArtifactError(
                f"{artifact.component(name)} has no {row.target} graph; build the artifact with --target {row.target}"
            )


def differences(artifact: Artifact, tool: str) -> tuple[str, ...]:
    """Where the tool's pictures are not ours, whatever the graphs; measured with OpenVINO GenAI 2026.4.1."""
    if tool != "genai":
        return ()
    found = [
        "pixels are cut, not rounded, to bytes: 51 dB from ours by itself",
        "a prompt longer than the text encoder loses its end token: another picture",
    ]
    config = json.loads((artifact.folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    if artifact.manifest.family == "sdxl":
        found.append("width and height are told to SDXL in each other's place: other pictures unless they are square")
    if artifact.manifest.family == "flux" and config.get("use_dynamic_shifting"):
        found.append("noise levels of FLUX.1 are shifted by FLUX.2's formula: other pictures")
    return tuple(found)


class _Arrangement:
    """The folder being filled; `place` is where it will lie, from which links are counted."""

    def __init__(self, artifact: Artifact, folder: Path, tool: str, place: Path, *, copy: bool) -> None:
        self.artifact, self.folder, self.tool, self.copy = artifact, folder, tool, copy
        self.place = place.absolute()
        self.source = artifact.folder.resolve()
        self.written: list[str] = []

    def make(self) -> list[str]:
        """Fill the folder; returns what was written, sorted."""
        for name in self.artifact.manifest.files:
            part, slash, _ = name.partition("/")
            if not slash or part == "scheduler" or part.startswith("tokenizer"):
                self._copied(name)
        for name, record in self.artifact.manifest.components.items():
            if name in PARTS:
                self._copied(f"{name}/config.json")
                (self._onnx if self.tool == "optimum-onnx" else self._openvino)(name, record)
        if self.tool == "genai":
            self._tokenizers()
        if self.tool == "optimum-onnx":
            self.written += for_transformers_4(self.folder)
        return sorted(self.written)

    def _copied(self, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.source / name, target)

    def _weights(self, source: str, name: str) -> None:
        """A large file: a link counted from where the folder will lie, or a copy."""
        target = self.folder / name
        if self.copy:
            shutil.copyfile(self.source / source, target)
        else:
            target.symlink_to(os.path.relpath(self.source / source, (self.place / name).parent.resolve()))

    def _openvino(self, name: str, record: ComponentRecord) -> None:
        self._weights(f"{name}/{BIN}", f"{name}/{BIN}")
        int64 = self.tool == "genai" and name == "unet"
        if not (int64 or pooled_first(record)):
            self._copied(f"{name}/{XML}")
            return
        tree: Tree = ElementTree.parse(self.source / name / XML)  # of a verified artifact
        if int64:
            int64_input(tree, TIMESTEP)
        if pooled_first(record):
            result_first(tree, STATES)
        tree.write(self.folder / name / XML, encoding="utf-8", xml_declaration=True)
        self.written.append(f"{name}/{XML}")

    def _onnx(self, name: str, record: ComponentRecord) -> None:
        graph = LOWERED if (self.source / name / LOWERED).exists() else GRAPH
        if name != "unet" and not pooled_first(record):
            names = external_files(load_graph(self.source / name / graph))
            self._weights(f"{name}/{graph}", f"{name}/{GRAPH}")
            for file in names:  # ONNX Runtime follows links where graph and data lead into the same folder
                self._weights(f"{name}/{file}", f"{name}/{file}")
            return
        model = load_graph(self.source / name / graph)
        if name == "unet":
            own_axis(model, TIMESTEP)
        if pooled_first(record):
            outputs = sorted(model.graph.output, key=lambda output: output.name != STATES)
            del model.graph.output[:]
            model.graph.output.extend(outputs)
        (self.folder / name / GRAPH).write_bytes(model.SerializeToString())
        self.written.append(f"{name}/{GRAPH}")
        for file in external_files(model):  # and refuses data that a link leads to out of the graph's
            self._copied(f"{name}/{file}")
            self.written.append(f"{name}/{file}")

    def _tokenizers(self) -> None:
        openvino = need("openvino", extra="openvino")
        convert = need("openvino_tokenizers", extra="genai").convert_tokenizer
        for folder in sorted(p for p in self.folder.iterdir() if p.name.startswith("tokenizer")):
            made = convert(load_tokenizer(folder), with_detokenizer=True)
            for model, name in zip(made, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
                openvino.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)
                self.written += [f"{folder.name}/{name}.{end}" for end in ("xml", "bin")]


def for_transformers_4(folder: Path) -> list[str]:
    """Rewrite what transformers 5 wrote into a pipeline's folder and transformers 4 cannot read; names of the files."""
    written = ["model_index.json"]
    index: dict[str, Any] = json.loads((folder / written[0]).read_text(encoding="utf-8"))
    for name, value in index.items():
        if name.startswith("tokenizer") and value[1] in FAST:
            index[name] = [value[0], FAST[value[1]]]
    rewrite(folder / written[0], index)
    for path in sorted(folder.glob("tokenizer*/tokenizer_config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("extra_special_tokens") == []:  # transformers 4 wants a table there
            del config["extra_special_tokens"]
            rewrite(path, config)
            written.append(path.relative_to(folder).as_posix())
    return written


def rewrite(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file anew, in place of a link too."""
    path.unlink()
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def pooled_first(record: ComponentRecord) -> bool:
    """Whether it is a CLIPTextModel whose first output is not the one that others expect there."""
    return record.outputs[0].name == POOLED


def load_graph(path: Path) -> onnx.ModelProto:
    """A graph without its data."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def external_files(model: onnx.ModelProto) -> list[str]:
    """Names of the data files that a graph reads, beside it."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def own_axis(model: onnx.ModelProto, name: str) -> None:
    """Name the first axis of an input otherwise than the batch's, and forget what was inferred from the old name."""
    port = next(i for i in model.graph.input if i.name == name)
    port.type.tensor_type.shape.dim[0].dim_param = OWN_AXIS
    del model.graph.value_info[:]
