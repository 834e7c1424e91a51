"""What decides the result of a build besides its inputs: versions of packages and this package's own code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

ROOMS = ("profiles", "runtimes", "quantize", "exporters")  # whose code decides what a build makes
PACKAGES = (
    *("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx"),
)


@functools.cache
def tools() -> tuple[str, ...]:
    """Versions of what a build calls, and the digest of this package's code and tables."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((Path(__file__).parent.parent / room).iterdir()):
            if path.suffix in (".py", ".toml", ".txt"):
                digest.update(f"{room}/{path.name}\0".encode() + path.read_bytes())
    return (platform.python_version(), *(f"{name} {version(name)}" for name in PACKAGES), digest.hexdigest())


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
