"""What a family says about each of its components, and the table of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from intaglio.profiles.errors import CheckpointError
from intaglio.profiles.family import Contract, Family, load_family
from intaglio.profiles.registry import resolve, suggestion
from intaglio.profiles.spec import Range, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from intaglio.exporters.checkpoint import Checkpoint

FAMILIES = {
    "flux": "intaglio.exporters.flux",
    "flux2": "intaglio.exporters.flux2",
    "qwen_image": "intaglio.exporters.qwen_image",
    "sd": "intaglio.exporters.sd",
    "sd3": "intaglio.exporters.sd3",
    "sdxl": "intaglio.exporters.sdxl",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a pipeline that becomes one graph.

    Attributes:
        name: folder in the artifact, named as optimum's exports name it (``unet``, ``vae_decoder``).
        source: folder in the checkpoint (``vae``).
        model: makes the library's untrained model from ``config.json``.
        reference: loads the library's trained model, in float32, from the checkpoint.
        wrap: makes a model traceable: inputs positionally, outputs as a tensor or a tuple. The parameters of the
            wrapped model carry the checkpoint's names behind `prefix`.
        inputs, outputs: tensor facts, in call order; the module takes the inputs positionally.
        prefix: what the traceable module puts before the checkpoint's parameter names (``"model."``).
        rename: regular expressions from old checkpoints' parameter names to today's.
        contract: from the family's numerics of this component to this checkpoint's.
        ignore: regular expression of checkpoint keys that are not parameters of this component.
        transforms: regular expressions of parameters of which the graph has a part, with the name in
            `capture.TRANSFORMS`.
        repeats: lists of blocks, as `model` names them, whose equal members need not all be traced; the forward pass
            must not look at a block's place in the list.
    """

    name: str
    source: str
    model: Callable[[Mapping[str, Any]], Any]
    reference: Callable[[Checkpoint], Any]
    wrap: Callable[[Any], torch.nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    prefix: str = "model."
    rename: tuple[tuple[str, str], ...] = ()
    ignore: str = r"$^"
    contract: Callable[[Contract], Contract] = field(default=lambda contract: contract)
    transforms: tuple[tuple[str, str], ...] = ()
    repeats: tuple[str, ...] = ()


class FamilyExporter(Protocol):
    """The functions a family module ``exporters/X.py`` has.

    `options` are its ``--set FAMILY.KEY=VALUE`` choices at build time with a line of help each; the components find
    the values in ``checkpoint.options``.
    """

    options: Mapping[str, str]

    def components(self, checkpoint: Checkpoint) -> tuple[Component, ...]:
        """The components to export."""

    def shapes(self, checkpoint: Checkpoint, profile: Family) -> dict[str, Range]:
        """The profile's ranges, fitted to this checkpoint."""

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Constants the runtime needs to sample this checkpoint."""

    def copy_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Copy tokenizer and scheduler configuration into the artifact."""


def family_of(checkpoint: Checkpoint) -> tuple[FamilyExporter, Family]:
    """The family whose profile names the checkpoint's pipeline class.

    Raises:
        CheckpointError: no family does.
    """
    known: dict[str, str] = {}
    for name in FAMILIES:
        profile = load_family(name)
        known.update(dict.fromkeys(profile.pipelines, name))
    if checkpoint.pipeline_class not in known:
        near = suggestion(checkpoint.pipeline_class, known)
        raise CheckpointError(
            f"{checkpoint.folder / 'model_index.json'} is a {checkpoint.pipeline_class}, which is not supported; "
            f"allowed: {', '.join(sorted(known))}.{near}"
        )
    name = known[checkpoint.pipeline_class]
    exporter: FamilyExporter = resolve(FAMILIES[name] + ":EXPORTER")
    return exporter, load_family(name)
