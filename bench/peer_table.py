"""Other tools: what is installed for each, what it exports, how it is loaded, and what a report must say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TORCH = "torch==2.13.0"  # a constraint of every environment: a plain newer torch brings gigabytes of CUDA


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One row of ENVIRONMENTS: what is installed, what is taken away again, and what must then import."""

    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


ENVIRONMENTS: Mapping[str, Environment] = {
    "optimum-intel": Environment(
        requirements=(
            *("optimum-intel==2.2.0", "optimum==2.3.0", "nncf==3.4.0", "openvino==2026.4.1"),
            *("openvino-tokenizers==2026.4.1.0", "diffusers==0.39.0", "transformers==5.5.4", "sentencepiece==0.2.3"),
            *(TORCH, "numpy==2.4.6", "pillow==13.0.0", "safetensors==0.8.0"),
        ),
        without=("torchvision",),  # PyPI's is built for another torch than a CPU's, and importing it fails
        modules=("optimum.intel", "openvino_tokenizers", "nncf"),
    ),
    "openvino-genai": Environment(
        requirements=(
            *("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"),
            *("numpy==2.4.6", "pillow==13.0.0"),
        ),
        modules=("openvino_genai",),
    ),
    "optimum-onnx": Environment(
        requirements=(
            *("optimum-onnx==0.1.0", "optimum==2.1.0", "onnxruntime==1.31.1", "onnx==1.23.2", "diffusers==0.39.0"),
            *("transformers==4.57.6", "sentencepiece==0.2.3", TORCH, "numpy==2.4.6", "pillow==13.0.0"),
        ),
        modules=("optimum.onnxruntime",),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One row of EXPORTS: what a tool must make of a checkpoint before it loads it, in an environment."""

    environment: str
    function: str
    options: Mapping[str, str] = field(default_factory=dict)


INTEL = "intaglio.bench.peer_optimum_intel:prepare"
EXPORTS: Mapping[str, Export] = {
    "openvino-fp32": Export(environment="optimum-intel", function=INTEL, options={"weights": "fp32"}),
    "openvino-int8": Export(environment="optimum-intel", function=INTEL, options={"weights": "int8"}),
    "openvino-int4": Export(environment="optimum-intel", function=INTEL, options={"weights": "int4"}),
    "onnx-fp32": Export(environment="optimum-onnx", function="intaglio.bench.peer_optimum_onnx:prepare"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One row of PEERS.

    Attributes:
        loader: of `intaglio.bench.cases.Case`; the peer's name is its backend.
        environment: of ENVIRONMENTS; empty for this interpreter.
        export: of EXPORTS; empty where the tool loads the checkpoint.
        families: those that were tried.
        options: what tells this row from others of the same loader.
        note: for the report: precision, caches, what the tool cannot be told.
    """

    loader: str
    environment: str
    families: tuple[str, ...]
    note: str
    export: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


FAMILIES = ("sd", "sdxl", "sd3", "flux")
OPENVINO = "float32 asked for (INFERENCE_PRECISION_HINT), one stream, no compilation cache"
NNCF = f"{OPENVINO}; weights by NNCF without data, activations as OpenVINO's defaults quantize them"
GENAI = (
    f"{OPENVINO}; what it computes in cannot be asked; pixels are cut, not rounded, to bytes (51 dB by itself); other "
    "pictures by its own arithmetic for SDXL unless square, FLUX.1-dev, and prompts that are cut off"
)
PEERS: Mapping[str, Peer] = {
    "diffusers": Peer(
        loader="intaglio.bench.peer_diffusers:load",
        environment="",
        families=FAMILIES,
        note="eager, float32, no cache; a safety checker is left out",
    ),
    "diffusers-compile": Peer(
        loader="intaglio.bench.peer_diffusers:load",
        environment="",
        families=FAMILIES,
        options={"compile": "true"},
        note="torch.compile of the denoiser and the VAE's decoder, float32; compiles within the first picture of a "
        "size, or takes what an earlier process left in inductor's cache",
    ),
    "optimum-intel": Peer(
        loader="intaglio.bench.peer_optimum_intel:load",
        environment="optimum-intel",
        families=FAMILIES,
        export="openvino-fp32",
        note=f"{OPENVINO}, checked after compilation; exported without weight compression",
    ),
    "optimum-intel-int8": Peer(
        loader="intaglio.bench.peer_optimum_intel:load",
        environment="optimum-intel",
        families=FAMILIES,
        export="openvino-int8",
        note=NNCF,
    ),
    "optimum-intel-int4": Peer(
        loader="intaglio.bench.peer_optimum_intel:load",
        environment="optimum-intel",
        families=FAMILIES,
        export="openvino-int4",
        note=f"{NNCF}; matrices in 4 bits, convolutions in 8",
    ),
    "openvino-genai": Peer(
        loader="intaglio.bench.peer_openvino_genai:load",
        environment="openvino-genai",
        families=FAMILIES,
        export="openvino-fp32",
        note=f"{GENAI}; TaylorSeer, which it switches on for SD3 and FLUX, is off",
    ),
    "openvino-genai-taylorseer": Peer(
        loader="intaglio.bench.peer_openvino_genai:load",
        environment="openvino-genai",
        families=("sd3", "flux"),
        export="openvino-fp32",
        options={"taylorseer": "true"},
        note=f"{GENAI}; TaylorSeer, by its defaults, predicts some steps of longer runs instead of computing them",
    ),
    "optimum-onnx": Peer(
        loader="intaglio.bench.peer_optimum_onnx:load",
        environment="optimum-onnx",
        families=FAMILIES,
        export="onnx-fp32",
        note="ONNX Runtime, float32, all graph optimizations; exported without slimming",
    ),
}
