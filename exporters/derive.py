"""A quantized artifact from an unquantized one: the graphs and codes a build would make, without the checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from intaglio.exporters.lowering import Job, lowering
from intaglio.exporters.quantization import Calibrated, quantization_record, quantize_component
from intaglio.exporters.recipes import is_quantized
from intaglio.exporters.store import DATA, GRAPH, save_component, stored_tensors, weight_bindings
from intaglio.profiles.artifact import SIGNATURE, Artifact
from intaglio.profiles.errors import UsageError
from intaglio.profiles.family import Contract
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.profiles.spec import ComponentRecord
from intaglio.profiles.strict import from_dict


def contract_of(artifact: Artifact, component: str) -> Contract:
    """The numerics an artifact was built with."""
    return from_dict(Contract, artifact.manifest.contract[component], f"{artifact.folder}: contract.{component}")


def check_unquantized(artifact: Artifact) -> None:
    """Refuse an artifact that has codes already.

    Raises:
        UsageError: naming its first quantized component.
    """
    for name, record in artifact.manifest.components.items():
        if record.quantization is not None:
            raise UsageError(
                f"{artifact.folder}: {name} is {record.format} already, and codes are not quantized twice; "
                "build the checkpoint without --quant first"
            )


def derive(
    source: Artifact,
    folder: Path,
    recipes: Mapping[str, ComponentRecipe],
    calibrated: Mapping[str, Calibrated],
    targets: Sequence[str] = ("onnx",),
) -> Artifact:
    """Quantize the components of `recipes` into a new folder; the others, and all other files, are copied.

    The result has no sums: it is for measuring, and a build makes the one to keep. A target that the source was not
    built for computes in float32.

    Raises:
        UsageError: `source` is quantized already; a layer pattern matches nothing.
    """
    check_unquantized(source)
    left = {*source.manifest.components, SIGNATURE}
    shutil.copytree(source.folder, folder, ignore=lambda _, names: [n for n in names if n in left])
    records: dict[str, ComponentRecord] = {}
    for name, record in source.manifest.components.items():
        recipe = recipes.get(name)
        if recipe is None or not is_quantized(recipe):
            shutil.copytree(source.component(name), folder / name)
            records[name] = record
        else:
            records[name] = derive_component(source, folder, name, recipe, calibrated.get(name))
            lower(source, folder, name, records[name], targets)
            records[name] = dataclasses.replace(records[name], targets=tuple(targets))
    manifest = dataclasses.replace(
        source.manifest,
        components=records,
        recipe={name: record.format for name, record in records.items()},
        dtypes={**{t: dict.fromkeys(records, "float32") for t in targets}, **source.manifest.dtypes},
    )
    return Artifact(folder=folder, manifest=manifest)


def derive_component(
    source: Artifact, folder: Path, name: str, recipe: ComponentRecipe, calibrated: Calibrated | None = None
) -> ComponentRecord:
    """Write one quantized component; returns its record."""
    import onnx_ir as ir

    model = ir.load(source.component(name) / GRAPH)
    made = quantize_component(name, model, recipe, contract_of(source, name), calibrated)
    save_component(model, folder / name, lambda text: None)
    shutil.copy(source.component(name) / "config.json", folder / name)
    return dataclasses.replace(
        source.manifest.components[name],
        format=recipe.format,
        tensors=stored_tensors(folder / name),
        weights=weight_bindings(model),
        quantization=quantization_record(recipe, made, calibrated),
    )


def lower(source: Artifact, folder: Path, name: str, record: ComponentRecord, targets: Sequence[str]) -> None:
    """Lower a component that was just written."""
    for target in targets:
        job = Job(
            folder=folder / name,
            component=name,
            inputs=record.inputs,
            outputs=record.outputs,
            shapes=source.manifest.shapes,
            contract=contract_of(source, name),
            dtype=source.manifest.dtypes.get(target, {}).get(name, "float32"),
            format=record.format,
            packed_bytes=(folder / name / DATA).stat().st_size,
            options={},
            activations=record.quantization.activations if record.quantization else "exact",
        )
        lowering(target).lower(job)
