"""Every case of every family: components, latents, decode, picture against diffusers; TensorRT plans built ahead."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from intaglio.bench.evidence import ROOT
from intaglio.profiles.errors import ToolError
from intaglio.profiles.family import Contract, load_family

SM = "sm89"
PLANNED = ("unet", "transformer", "vae_decoder")


def measure() -> dict[str, Any]:
    """Figures per case; the cases and the way to run them are those of ``tests/test_families.py``."""
    sys.path.insert(0, str(ROOT / "tests"))
    families, tiny = importlib.import_module("families"), importlib.import_module("tiny")
    figures: dict[str, Any] = {}
    key, built, plans = None, None, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in track(families.by_artifact(tiny.CASES), "cases", console=Console(stderr=True)):
            case, place = tiny.CASES[name], Path(folder) / "case"
            if families.artifact_key(case) != key or built is None:
                if built is not None:
                    built.close()
                shutil.rmtree(place, ignore_errors=True)
                families.build_case(case, place, ("openvino",), {})
                key, built = families.artifact_key(case), families.Built(case, place)
                plans = tensorrt(built.artifact, place)
            figures[name] = {**case_figures(families, case, built), "tensorrt": plans}
    return figures


def case_figures(families: Any, case: Any, built: Any) -> dict[str, Any]:
    """What one case measured."""
    run = families.Run(case, built)
    measured = {
        backend: {
            "alone": rounded(run.figures(built.pipeline(backend), families.PROMPT)),
            "batch": rounded(run.figures(built.pipeline(backend), families.PROMPTS)),
        }
        for backend in families.BACKENDS
    }
    return {
        "family": case.family,
        "pipeline": case.pipeline,
        "task": "reference images" if case.request.get("images") else "text to image",
        "components": {component: rounded(errors) for component, errors in built.parity().items()},
        **measured,
        "disturbed_1e-6_psnr": round(families.disturbed_psnr(run), 1),
    }


def rounded(values: dict[str, float]) -> dict[str, float | None]:
    """Three digits are enough; JSON has no infinity, which is the PSNR of pictures that are identical."""
    return {name: float(f"{value:.3g}") if math.isfinite(value) else None for name, value in values.items()}


def tensorrt(artifact: Any, scratch: Path) -> dict[str, str]:
    """Build the denoiser's and the VAE decoder's plan in the contract's dtype; ``built``, or why not."""
    from intaglio.exporters.lower_tensorrt import LOWERING
    from intaglio.exporters.lowering import Job

    contracts, result = load_family(artifact.manifest.family).contract, {}
    for name in (n for n in PLANNED if n in artifact.manifest.components):
        record, place = artifact.manifest.components[name], scratch / "plan" / name
        shutil.copytree(artifact.component(name), place)
        contract = contracts.get(name, Contract())
        job = Job(
            folder=place,
            component=name,
            inputs=record.inputs,
            outputs=record.outputs,
            shapes=artifact.manifest.shapes,
            contract=contract,
            dtype=contract.dtype,
            format=record.format,
            packed_bytes=(place / "model.onnx.data").stat().st_size,
            options={"sm": SM, "profiles": "range"},
        )
        try:
            (plan,) = LOWERING.lower(job).engines.values()
            result[name] = f"built for {SM} in {contract.dtype}, {plan['bytes']} bytes"
        except ToolError as error:
            result[name] = f"refused: {error}"
        shutil.rmtree(place)
    return result
