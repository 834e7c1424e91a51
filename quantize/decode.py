"""Read quantized weights back out of an artifact, as float32 in the checkpoint's layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.spec import WeightBinding
from intaglio.quantize.arrays import transposed_copy
from intaglio.quantize.formats import FORMATS, codec
from intaglio.quantize.tensors import values_of
from intaglio.quantize.weight import along_inputs

GRAPH = "model.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One quantized weight as the ONNX file holds it.

    Attributes:
        parameter: its name in the checkpoint.
        binding: what the manifest says of it.
        tensors: by role, ``codes`` first; the low-rank branch is in `low_rank`.
        shape, axis: of the weight as it was encoded, and its output channels.
        smooth: factor [K] the input is multiplied with.
        activation: static scale of the input.
    """

    parameter: str
    binding: WeightBinding
    tensors: dict[str, np.ndarray]
    low_rank: tuple[np.ndarray, np.ndarray] | None
    shape: tuple[int, ...]
    axis: int
    smooth: np.ndarray | None
    activation: float | None

    def decode(self) -> np.ndarray:
        """The float32 weight the layer multiplies its (smoothed) input with; linear weights as [K, N].

        With a static scale the low-rank branch stands apart: it multiplies the input before that is rounded.
        """
        value = codec(self.binding.format).decode(self.tensors, self.shape, self.axis)
        if self.low_rank is not None and self.activation is None:
            value = value + self.low_rank[0].astype(np.float32) @ self.low_rank[1].astype(np.float32)
        return value


class StoredWeights(Mapping[str, StoredWeight]):
    """A component's quantized weights by parameter; each is read when it is asked for and not kept."""

    def __init__(self, artifact: Artifact, component: str) -> None:
        import onnx_ir as ir

        self.record = artifact.manifest.components[component]
        self._bindings = {p: b for p, b in self.record.weights.items() if b.format != "none"}
        self._values: Any = ir.load(artifact.component(component) / GRAPH).graph.initializers if self._bindings else {}

    def __getitem__(self, parameter: str) -> StoredWeight:
        return _stored(self._values, parameter, self._bindings[parameter])

    def __iter__(self) -> Iterator[str]:
        return iter(self._bindings)

    def __len__(self) -> int:
        return len(self._bindings)


def quantized_weights(artifact: Artifact, component: str) -> Iterator[StoredWeight]:
    """Every quantized weight of a component, one at a time."""
    yield from StoredWeights(artifact, component).values()


def _stored(initializers: Any, parameter: str, binding: WeightBinding) -> StoredWeight:
    def read(name: str) -> np.ndarray:
        array = values_of(initializers[name].const_value)
        return array.astype(np.int8) if array.dtype.name == "int4" else array

    tensors = {"codes": read(binding.initializer), **{role: read(name) for role, name in binding.parts.items()}}
    low_rank = (tensors.pop("low_rank_a"), tensors.pop("low_rank_b")) if "low_rank_a" in tensors else None
    (use,) = initializers[binding.initializer].uses()
    node = use.node
    if FORMATS[binding.format].storage == "UINT8":
        shape, axis = (node.attributes["K"].as_int(), node.attributes["N"].as_int()), 1
    else:
        shape = tensors["codes"].shape
        (reader,) = node.outputs[0].uses()
        axis = 1 if reader.node.op_type == "MatMul" else 0
    return StoredWeight(
        parameter=parameter,
        binding=binding,
        tensors=tensors,
        low_rank=low_rank,
        shape=shape,
        axis=axis,
        smooth=read(binding.smooth).reshape(-1) if binding.smooth else None,
        activation=float(read(binding.activation)) if binding.activation else None,
    )


def decoded_weights(artifact: Artifact, component: str) -> Iterator[tuple[StoredWeight, np.ndarray]]:
    """Every quantized weight with its float32 value in the checkpoint's layout, the input's smoothing folded in.

    Linear weights are [N, K]. The layer's input is then taken as it is; a static scale applies to the smoothed input.
    """
    for weight in quantized_weights(artifact, component):
        yield weight, checkpoint_layout(weight)


def checkpoint_layout(weight: StoredWeight) -> np.ndarray:
    """Its float32 value as the checkpoint has it: linear weights [N, K], the input's smoothing folded in."""
    value = weight.decode()
    if weight.smooth is not None:
        value = value * along_inputs(weight.smooth, value.ndim)
    return transposed_copy(value) if weight.binding.transform == "transpose" else value


def codes_digest(artifact: Artifact, component: str) -> str:
    """sha256 over every code in parameter order: equal digests are equal codes."""
    digest = hashlib.sha256()
    for weight in sorted(quantized_weights(artifact, component), key=lambda w: w.parameter):
        digest.update(weight.parameter.encode() + weight.tensors["codes"].tobytes())
    return digest.hexdigest()
