"""Read quantized weights back out of an artifact, as float32 in the checkpoint's layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.quantize.formats import codec

GRAPH = "model.onnx"


def quantized_weights(artifact: Artifact, component: str) -> Iterator[tuple[str, str, np.ndarray, np.ndarray, int]]:
    """Parameter, format, codes, scales and channel axis of every quantized weight, as stored in the ONNX file."""
    import onnx_ir as ir

    record = artifact.manifest.components[component]
    if record.format == "none":
        return
    initializers = ir.load(artifact.component(component) / GRAPH).graph.initializers
    for parameter, binding in record.weights.items():
        if binding.format == "none":
            continue
        values = [initializers[name].const_value for name in (binding.initializer, binding.scale)]
        codes, scale = (np.asarray(v.numpy()) for v in values)
        yield parameter, binding.format, codes, scale, 1 if codes.ndim == 2 else 0


def decoded_weights(artifact: Artifact, component: str) -> Iterator[tuple[str, np.ndarray]]:
    """Parameter name and decoded float32 value of every quantized weight, one at a time, linear weights as [N, K]."""
    weights = artifact.manifest.components[component].weights
    for parameter, name, codes, scale, axis in quantized_weights(artifact, component):
        value = codec(name).decode(codes, scale, axis)
        yield parameter, np.ascontiguousarray(value.T) if weights[parameter].transform == "transpose" else value


def codes_digest(artifact: Artifact, component: str) -> str:
    """sha256 over every code in parameter order: equal digests are equal codes."""
    digest = hashlib.sha256()
    for parameter, _, codes, _, _ in sorted(quantized_weights(artifact, component), key=lambda row: row[0]):
        digest.update(parameter.encode() + codes.tobytes())
    return digest.hexdigest()
