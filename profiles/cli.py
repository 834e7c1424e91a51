"""The verbs ``doctor`` and ``sign``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.command import Verb
from intaglio.profiles.errors import UsageError
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
    "model-signing": "sign",
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


def configure_sign(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio sign``."""
    parser.add_argument("artifact")
    parser.add_argument("--private-key", required=True, metavar="PEM", help="elliptic-curve key: P-256, P-384 or P-521")
    parser.add_argument("--password-file", metavar="FILE", help="its first line is the key's password")
    parser.add_argument("--force", action="store_true", help="replace a signature that is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def read_password(file: str | None) -> bytes | None:
    """The first line of a file.

    Raises:
        UsageError: it cannot be read or is empty.
    """
    if file is None:
        return None
    try:
        password = Path(file).read_bytes().split(b"\n")[0].removesuffix(b"\r")
    except OSError as error:
        raise UsageError(f"--password-file {file} cannot be read ({error.strerror}); name a text file") from error
    if not password:
        raise UsageError(f"--password-file {file} has an empty first line; leave the option out for a key without one")
    return password


def run_sign(args: argparse.Namespace) -> int:
    """Verify every file, then sign.

    Raises:
        ToolError: see `intaglio.profiles.signing.sign`.
    """
    from intaglio.profiles.signing import sign

    password = read_password(args.password_file)
    artifact = Artifact.open(args.artifact, verify=False)
    file = sign(artifact, Path(args.private_key), password=password, force=args.force)
    print(json.dumps({"signature": str(file), "digest": artifact.manifest.digest}, indent=1) if args.json else file)
    return 0


SIGN = Verb(configure_sign, run_sign)
DOCTOR = Verb(configure_doctor, run_doctor)
