"""optimum-intel: a checkpoint exported to OpenVINO by it, run by diffusers' loop on OpenVINO. In its environment."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.bench.peer_checkpoint import readable
from intaglio.bench.peer_common import exported, need_cpu, opened
from intaglio.bench.peer_diffusers import DiffusersPipeline
from intaglio.profiles.errors import ToolError, Unsupported
from intaglio.profiles.registry import pick
from intaglio.runtimes.engine_openvino import compile_settings

# Arguments of OVWeightQuantizationConfig; no data and no mixing by sensitivity. Empty: not compressed.
WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": False, "group_size": 32, "ratio": 1.0},
}
CODES = {"fp32": (), "int8": ("u8", "i8"), "int4": ("u4", "i4")}  # what the denoiser's weights are then stored in
DENOISERS = ("unet", "transformer")


def prepare(checkpoint: Path, folder: Path, *, weights: str) -> dict[str, Any]:
    """Export a checkpoint into `folder`, tokenizers for GenAI included; returns the bytes of its constants by type.

    Raises:
        ToolError: the denoiser's weights are not stored as they were to be.
    """
    chosen = pick(WEIGHTS, weights, "weight format")
    if not chosen:
        export(checkpoint, folder)
        return {"constants": checked(folder, weights)}
    from optimum.intel import OVDiffusionPipeline, OVWeightQuantizationConfig

    with tempfile.TemporaryDirectory(prefix="intaglio-peer-") as scratch:
        # main_export is silent about a quantization_config and writes float32; the pipeline heeds it.
        export(checkpoint, Path(scratch))
        pipe = OVDiffusionPipeline.from_pretrained(
            scratch,
            export=False,
            compile=False,
            quantization_config=OVWeightQuantizationConfig(**chosen),
            safety_checker=None,
            local_files_only=True,
        )
        pipe.save_pretrained(folder)
    return {"constants": checked(folder, weights)}


def export(checkpoint: Path, folder: Path) -> None:
    """In float32, uncompressed."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    with readable(checkpoint) as place:
        main_export(
            model_name_or_path=str(place),
            output=folder,
            task="text-to-image",
            library_name="diffusers",
            ov_config=OVConfig(dtype="fp32"),  # without one it compresses what has more than a milliard parameters
            convert_tokenizer=True,
            local_files_only=True,
        )


def checked(folder: Path, weights: str) -> dict[str, dict[str, int]]:
    """Bytes of the constants of every component by element type.

    Raises:
        ToolError: the denoiser has none of the type that `weights` says, or is mostly float where it is to be coded.
            With int4 NNCF codes matrices in 4 bits and convolutions in 8.
    """
    import openvino

    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*/openvino_model.xml")):
        counts: dict[str, int] = {}
        for op in openvino.Core().read_model(path).get_ops():
            if op.get_type_name() == "Constant":
                kind = op.get_element_type().get_type_name()
                counts[kind] = counts.get(kind, 0) + int(op.get_byte_size())
        found[path.parent.name] = counts
    for name in (n for n in DENOISERS if n in found):
        counts = found[name]
        floats = sum(counts.get(kind, 0) for kind in ("f32", "f16", "bf16"))
        coded = sum(counts.get(kind, 0) for kind in ("u8", "i8", "u4", "i4"))
        present = any(counts.get(kind) for kind in CODES[weights])
        if (weights == "fp32" and coded) or (weights != "fp32" and (floats > coded or not present)):
            raise ToolError(f"optimum-intel stored {name} as {counts}, which is not {weights}; there is no such row")
    return found


def load(
    artifact: str | Path,
    *,
    backend: str,
    device: str = "cpu",
    threads: int = 0,
    checkpoint: str = "",
    settings: Mapping[str, str] | None = None,
    verify: bool = True,
) -> DiffusersPipeline:
    """OVDiffusionPipeline on the export of a checkpoint; arguments as of `intaglio.load`.

    Raises:
        UsageError: there is no export.
        Unsupported: another device than the CPU, or OpenVINO does not compute in float32.
    """
    from optimum.intel import OVDiffusionPipeline

    need_cpu(backend, device)
    found, _, told = opened(artifact, backend, settings)
    options = compile_settings("CPU", threads, "f32", None)
    pipe = OVDiffusionPipeline.from_pretrained(
        str(exported(backend, checkpoint, told)),
        export=False,
        compile=False,
        ov_config=options,
        safety_checker=None,
        local_files_only=True,
    )
    seconds = {}
    for name, component in pipe.components.items():
        start = time.perf_counter()
        component.compile()
        seconds[name] = time.perf_counter() - start
        check(component.request, name)
    made = DiffusersPipeline(found, pipe)
    made.compile_seconds = seconds
    return made


def check(compiled: Any, name: str) -> None:
    """Refuse another arithmetic than was asked for.

    Raises:
        Unsupported: OpenVINO computes in another dtype.
    """
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision != "f32":
        raise Unsupported(f"OpenVINO computes {name} in {precision} for optimum-intel instead of f32")
