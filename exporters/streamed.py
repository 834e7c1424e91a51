"""The reference for a component beyond memory: the library's own module, each layer's weights read when it runs.

accelerate's hooks put a module's parameters on the CPU before its forward pass and back on the meta device after it
(``attach_align_device_hook``). Values are what `TorchEngine` takes too: the checkpoint's with LoRAs fused, and decoded
codes where the artifact is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from intaglio.exporters.capture import match_parameters
from intaglio.exporters.component import Component
from intaglio.exporters.engine_torch import TorchEngine, attach_static_input, no_progress_bar, source_of
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.spec import ComponentRecord
from intaglio.quantize.decode import StoredWeights, checkpoint_layout
from intaglio.runtimes.engine import EngineOptions

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.weights import Weights


class StreamedTorchEngine(TorchEngine):
    """A component in float32 eager mode on the CPU that holds the weights of one layer at a time."""

    def __init__(self, artifact: Artifact, component: str, options: EngineOptions | None = None) -> None:
        import torch

        self.record: ComponentRecord = artifact.manifest.components[component]
        self.device = torch.device("cpu")
        self.module = streamed_module(artifact, component, (options or EngineOptions()).checkpoint).eval()

    def memory(self) -> dict[str, int | None]:
        """Nothing is held between layers."""
        return {"weight_bytes": 0, "device_peak_bytes": None}


def streamed_module(artifact: Artifact, name: str, place: str = "") -> torch.nn.Module:
    """The traceable module of a component with hooks that read its parameters."""
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    checkpoint, component = source_of(artifact, name, place)
    with init_empty_weights(include_buffers=False), no_progress_bar():
        module = component.wrap(component.model(checkpoint.config(component.source)))
    values = Values(module, component, checkpoint.weights(component.source), StoredWeights(artifact, name))
    values.attach_static_inputs(module)
    attach_align_device_hook(module, execution_device="cpu", offload=True, weights_map=values)
    return module


class Values(Mapping[str, "torch.Tensor"]):
    """Parameter name in the module to its float32 value, read anew each time."""

    def __init__(self, module: torch.nn.Module, component: Component, weights: Weights, stored: StoredWeights) -> None:
        self.parameters = match_parameters(component, module, weights)
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.stored = {component.prefix + name: name for name in stored}
        self.quantized = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        if name not in self.stored:
            value = self.parameters[name].read().astype(np.float32).reshape(self.shapes[name])
            return torch.from_numpy(np.ascontiguousarray(value))
        weight = self.quantized[self.stored[name]]
        value = checkpoint_layout(weight)
        if weight.binding.transform == "last_frame":  # the other frames meet zeros
            whole = self.parameters[name].read().astype(np.float32)
            whole[:, :, -1] = value.reshape(whole.shape[:2] + whole.shape[3:])
            value = whole
        return torch.from_numpy(np.ascontiguousarray(value.reshape(self.shapes[name])))

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def attach_static_inputs(self, module: torch.nn.Module) -> None:
        """Give the layers of static formats the quantization of their inputs."""
        for name, parameter in self.stored.items():
            if self.quantized.record.weights[parameter].activation is not None:
                attach_static_input(module, name, self.quantized[parameter], len(self.shapes[name]))
