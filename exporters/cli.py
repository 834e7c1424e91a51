"""The verbs ``build`` and ``inspect``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import MissingDependency, UsageError
from intaglio.profiles.family import parse_assignments
from intaglio.profiles.registry import installed
from intaglio.profiles.strict import to_dict

EXPORT_MODULES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ml_dtypes",
)


def configure_build(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio build``."""
    configure_inputs(parser)
    parser.add_argument("-o", "--output", required=True, metavar="ARTIFACT", help="folder to write")
    parser.add_argument(
        "--accept-fidelity",
        action="store_true",
        help="keep an artifact whose pictures miss their thresholds, and record it",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing artifact")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def configure_inputs(parser: argparse.ArgumentParser) -> None:
    """Arguments that decide what is built."""
    parser.add_argument(
        "checkpoint", help="a diffusers folder, a .safetensors file, ORG/NAME in HF's cache, or 'emoji'"
    )
    parser.add_argument("--target", action="append", default=[], help="onnx (always), openvino, tensorrt; repeatable")
    parser.add_argument(
        "--quant",
        action="append",
        default=[],
        metavar="[COMPONENT=]FORMAT[,…]",
        help="none, int8, w8a8, int4, nf4, fp8, …; repeatable",
    )
    parser.add_argument("--profile", metavar="RECIPE", help="a recipe.X.toml: formats per component and layer")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example tensorrt.sm=sm89,sm120"
    )
    parser.add_argument(
        "--dtype", action="append", default=[], metavar="[TARGET=]DTYPE[,…]", help="compute in fp16, bf16 or fp32"
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="a LoRA to fuse into the weights; repeatable",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="PATH[:TOKEN]",
        help="a textual inversion to add; repeatable",
    )
    parser.add_argument(
        "--preview-vae", metavar="FOLDER", help="a diffusers AutoencoderTiny (taesd, taef1, …) to add as a fast decoder"
    )
    parser.add_argument(
        "--config", metavar="FOLDER", help="for a single file: a diffusers folder whose configuration fits"
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="private memory the build may hold, for example 2GiB; refused if too little",
    )


def parse_quant(values: list[str]) -> dict[str, str]:
    """``["int8", "unet=none,vae_decoder=int8"]`` as component to format, ``*`` for all.

    Raises:
        UsageError: an empty name or format.
    """
    recipe: dict[str, str] = {}
    for part in (p.strip() for value in values for p in value.split(",")):
        component, equals, name = part.partition("=")
        if not part or (equals and not (component and name)):
            raise UsageError(
                f"--quant {part!r} is not [COMPONENT=]FORMAT; for example --quant int8 or --quant unet=int8"
            )
        recipe[component if equals else "*"] = name if equals else part
    return recipe


def inputs_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `configure_inputs` read, as keywords of `make_plan` and `build`."""
    return {
        "targets": args.target,
        "quant": parse_quant(args.quant),
        "recipe": args.profile,
        "dtype": args.dtype,
        "config": args.config,
        "options": parse_assignments(args.set),
        "loras": args.lora,
        "embeddings": args.embedding,
        "preview_vae": args.preview_vae,
        "max_memory": args.max_memory,
    }


def run_build(args: argparse.Namespace) -> int:
    """Build and say what was made.

    Raises:
        MissingDependency: a package that reads or traces checkpoints is not installed.
    """
    for module in EXPORT_MODULES:
        if not installed(module):
            raise MissingDependency(f"{module} is not installed; run: pip install 'intaglio[export]'")
    from intaglio.exporters.build import build

    artifact = build(
        args.checkpoint,
        args.output,
        **inputs_of(args),
        accept_fidelity=args.accept_fidelity,
        force=args.force,
    )
    log = json.loads((artifact.folder / "build.json").read_text())
    for remark in log["remarks"]:
        say(f"note: {remark}")
    summary = {
        "artifact": str(artifact.folder),
        "digest": artifact.manifest.digest,
        "bytes": artifact.size_bytes(),
        "seconds": log["seconds"],
        "peak_bytes": log["peak_bytes"],
        "parity_relative_l2": log["parity_relative_l2"],
        "quantization": {
            name: {"format": r.format, **to_dict(r.quantization)}
            for name, r in artifact.manifest.components.items()
            if r.quantization
        },
        "engines": sorted(artifact.manifest.engines),
    }
    print(json.dumps(summary, indent=1) if args.json else summary_text(summary))
    return 0


def summary_text(summary: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [f"{summary['artifact']}: {summary['bytes'] / 1e6:.1f} MB in {summary['seconds']:.0f} s"]
    if summary["peak_bytes"]:
        lines[0] += f", peak {summary['peak_bytes'] / 1e6:.0f} MB"
    for component, errors in summary["parity_relative_l2"].items():
        lines.append(
            f"  {component:<13} " + "  ".join(f"{b} {e:.1e}" for b, e in errors.items()) + "  (relative L2 to torch)"
        )
    for component, facts in summary["quantization"].items():
        lines.append(f"  {component:<13} {quantized_text(facts)}")
    lines += [f"  {name}" for name in summary["engines"]]
    return "\n".join([*lines, f"manifest {summary['digest'][:16]}"])


def quantized_text(facts: Mapping[str, Any]) -> str:
    """``w8a8 (static), 99.8% of MatMul weights, 99.1% of multiplications, …`` of a component's record."""
    covered, low_rank = facts["coverage"], facts["low_rank"]
    parts = [f"{facts['format']} ({facts['activations']})", f"{covered['weights']:.1%} of MatMul weights"]
    if covered["macs"] is not None:
        parts.append(f"{covered['macs']:.1%} of multiplications")
    if low_rank:
        parts.append(
            f"rank {facts['recipe']['rank']}: weight error {low_rank['without']:.4f} to {low_rank['with']:.4f}"
        )
    high = sum(text.startswith("none") for text in covered["exceptions"].values())
    return ", ".join([*parts, *([f"{high} layers stay high"] if high else [])])


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio inspect``."""
    parser.add_argument("artifact")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run_inspect(args: argparse.Namespace) -> int:
    """Show components, formats, sizes, ranges and engines."""
    from intaglio.exporters.inspection import describe, describe_text

    facts = describe(args.artifact)
    print(json.dumps(facts, indent=1, ensure_ascii=False) if args.json else describe_text(facts))
    return 0


BUILD = Verb(configure_build, run_build)
INSPECT = Verb(configure_inspect, run_inspect)
