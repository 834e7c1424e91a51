"""What every layer that a family keeps high buys: the picture with it as the family says, and at the nominal format."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.runtimes.engine import EngineOptions
from intaglio.runtimes.fidelity import psnr
from intaglio.runtimes.pipeline import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

DENOISER, FORMATS = "unet", ("int8", "w8a8", "int4")
PROMPTS = ("watch", "rabbit", "purple heart", "world map", "下雪", "乐谱", "男孩", "扳手")  # none of calibration's
BACKEND, STEPS, SEED = "openvino", 20, 7


def measure(source: Path | None = None) -> dict[str, Any]:
    """By format: median PSNR in dB against fp32 by the family's rules, and what each exception adds to it."""
    from intaglio.exporters.build import build
    from intaglio.exporters.derive import contract_of
    from intaglio.exporters.recipes import calibration_set
    from intaglio.quantize.feeds import record_feeds

    figures: dict[str, Any] = {"prompts": len(PROMPTS), "steps": STEPS, "backend": BACKEND, "formats": {}}
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bars:
        place = Path(name)
        plain = (
            Artifact.open(source)
            if source
            else build("emoji", place / "fp32", targets=("openvino",), options={"certificate.prompts": "0"})
        )
        record_feeds(plain, (DENOISER,), calibration_set({}), place / "feeds.zip")
        reference = pictures(plain)
        contract = contract_of(plain, DENOISER)
        for format_name in bars.track(FORMATS, description="exceptions"):
            # An int8 recipe has nothing to gain from a floor of int8.
            patterns = (*contract.keep, *(contract.int8 if format_name != "int8" else ()))
            base = fidelity(plain, place, format_name, {}, reference)
            rows = {p: fidelity(plain, place, format_name, {p: format_name}, reference) for p in patterns}
            figures["formats"][format_name] = {
                "psnr": round(base["psnr"], 2),
                "bytes": base["bytes"],
                "exceptions": {
                    p: {"buys_db": round(base["psnr"] - r["psnr"], 2), "costs_bytes": base["bytes"] - r["bytes"]}
                    for p, r in rows.items()
                },
            }
    return figures


def fidelity(
    plain: Artifact, place: Path, name: str, layers: dict[str, str], reference: Sequence[Image]
) -> dict[str, Any]:
    """Median PSNR in dB and stored bytes of the denoiser in one recipe."""
    from intaglio.exporters.derive import contract_of, derive
    from intaglio.exporters.quantization import calibrate_component
    from intaglio.exporters.recipes import completed, needs_feeds, rules_of
    from intaglio.exporters.store import DATA

    contract = contract_of(plain, DENOISER)
    recipe = completed(DENOISER, ComponentRecipe(format=name, layers=layers), rules_of(contract))
    calibrated = {}
    if needs_feeds(recipe):
        calibrated[DENOISER] = calibrate_component(
            plain, DENOISER, recipe, contract, place / "feeds.zip", lambda text: None
        )
    folder = place / "variant"
    made = derive(plain, folder, {DENOISER: recipe}, calibrated, ("onnx", "openvino"))
    both = zip(pictures(made), reference, strict=True)
    values = [psnr(np.asarray(mine), np.asarray(theirs)) for mine, theirs in both]
    stored = (made.component(DENOISER) / DATA).stat().st_size
    shutil.rmtree(folder)
    return {"psnr": float(np.median(values)), "bytes": stored}


def pictures(artifact: Artifact) -> list[Image]:
    """One picture a prompt, all from the same noise."""
    pipeline = Pipeline(artifact, BACKEND, dataclasses.replace(EngineOptions(), threads=1))
    made = [pipeline(prompt, seed=SEED, num_inference_steps=STEPS).images[0] for prompt in PROMPTS]
    pipeline.close()
    return made
