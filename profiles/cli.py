"""The verb ``doctor``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

from intaglio.profiles.command import Verb
from intaglio.profiles.registry import installed

PACKAGES = {
    "torch": "export",
    "diffusers": "export",
    "transformers": "export",
    "onnx": "export",
    "onnx-ir": "export",
    "onnxscript": "export",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "cuda",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx_cu13_bindings": "tensorrt",
    "flip-evaluator": "bench",
}
BACKENDS = {
    "torch": ("torch", "export"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt_rtx_bindings", "tensorrt"),
}


def configure_doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio doctor``."""
    parser.add_argument("--json", action="store_true")


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or ``None``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """Versions, backends that can be used, and problems with the way out of each."""
    versions = {name: package_version(name) for name in PACKAGES}
    problems = []
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "run: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'intaglio[onnxruntime]' (or [cuda])"
        )
    backends = {
        name: "ready" if installed(module) else f"missing; run: pip install 'intaglio[{extra}]'"
        for name, (module, extra) in BACKENDS.items()
    }
    return {"python": platform.python_version(), "packages": versions, "backends": backends, "problems": problems}


def run_doctor(args: argparse.Namespace) -> int:
    """Print the examination; exit 1 when there is a problem."""
    facts = examine()
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"Python {facts['python']}")
        for name, version in facts["packages"].items():
            print(f"  {name:<28} {version or '-'}")
        for name, state in facts["backends"].items():
            print(f"  {name:<12} {state}")
        for problem in facts["problems"]:
            print(f"problem: {problem}")
    return 1 if facts["problems"] else 0


DOCTOR = Verb(configure_doctor, run_doctor)
