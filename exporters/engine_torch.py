"""The ``torch`` engine: the libraries' own modules on the checkpoint's weights. It is the reference.

For a quantized artifact the weights are ``decode(codes)``, read back from the artifact: the truth per format.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters.checkpoint_index import find_checkpoint
from intaglio.exporters.component import family_of
from intaglio.exporters.lora import fuse_module
from intaglio.exporters.preview_vae import with_preview
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.profiles.registry import need, pick
from intaglio.profiles.spec import ComponentRecord
from intaglio.quantize.decode import StoredWeight, decoded_weights
from intaglio.quantize.formats import FORMATS
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint
    from intaglio.exporters.component import Component


DTYPES = ("float32", "float64")


class TorchEngine:
    """One component in eager mode, on CPU or CUDA: in float32, or float64 (``dtype``) to see what rounding does."""

    double: bool = False

    def __init__(self, artifact: Artifact, component: str, options: EngineOptions) -> None:
        need("torch", extra="export")
        need("diffusers", extra="export")
        refuse_leftovers("torch", options.settings, ("dtype",))
        self.double = pick({d: d for d in DTYPES}, options.settings.get("dtype", DTYPES[0]), "torch.dtype") == DTYPES[1]
        self.record: ComponentRecord = artifact.manifest.components[component]
        self.device = torch_device(options.device)
        self.module = self._load(artifact, component, options).to(self.device).eval()
        if self.double:
            self.module.double()
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)

    @staticmethod
    def _load(artifact: Artifact, name: str, options: EngineOptions) -> torch.nn.Module:

        checkpoint, component = source_of(artifact, name, options.checkpoint)
        with no_progress_bar():
            model = component.reference(checkpoint)
            checkpoint.inversions.extend_model(component.source, model)
            module = component.wrap(model)
        fuse_module(module, component, checkpoint.weights(component.source))
        for weight, value in decoded_weights(artifact, name):
            put_quantized(module, component.prefix + weight.parameter, weight, value)
        return module

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        import torch

        arrays = check_feeds(self.record, feeds)
        with torch.inference_mode():
            tensors = [torch.from_numpy(arrays[s.name]).to(self.device) for s in self.record.inputs]
            if self.double:
                tensors = [t.double() if t.is_floating_point() else t for t in tensors]
            outputs = self.module(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {s.name: o.float().cpu().numpy() for s, o in zip(self.record.outputs, outputs, strict=True)}

    def memory(self) -> dict[str, int | None]:
        """Bytes of the parameters, and torch's own peak on CUDA."""
        import torch

        weights = sum(p.numel() * p.element_size() for p in self.module.parameters())
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {"weight_bytes": weights, "device_peak_bytes": peak}

    def close(self) -> None:
        """Drop the module."""
        del self.module


def put_quantized(module: torch.nn.Module, parameter: str, weight: StoredWeight, value: np.ndarray) -> None:
    """Give a parameter its decoded value, and its layer the static quantization of its input."""
    import torch

    target = module.get_parameter(parameter)
    with torch.no_grad():
        # Of a causal 3D kernel the graph has the last frame: the others meet zeros.
        part = target[:, :, -1] if weight.binding.transform == "last_frame" and target.ndim == 5 else target
        part.copy_(torch.from_numpy(value).reshape(part.shape))
    if weight.activation is not None:
        attach_static_input(module, parameter, weight, target.ndim)


def source_of(artifact: Artifact, name: str, place: str) -> tuple[Checkpoint, Component]:
    """The checkpoint an artifact was built from (at `place`, or where it was last seen), and one of its components."""
    checkpoint = find_checkpoint(artifact.manifest.provenance, place)
    exporter, profile = family_of(checkpoint)
    components = with_preview(exporter.components(checkpoint), checkpoint, profile.name)
    return checkpoint, next(c for c in components if c.name == name)


def attach_static_input(module: torch.nn.Module, parameter: str, weight: StoredWeight, rank: int) -> None:
    """Quantize the input of the layer that has this parameter of `rank` dimensions."""
    layer = module.get_submodule(parameter.rpartition(".")[0])
    arithmetic = StaticInput(weight, channels_first=rank > 2)
    layer.register_forward_pre_hook(arithmetic.before)
    layer.register_forward_hook(arithmetic.after)


class StaticInput:
    """Rounds a layer's input as QuantizeLinear and DequantizeLinear do, between smoothing and its inverse.

    A low-rank branch reads the input before it is rounded.
    """

    def __init__(self, weight: StoredWeight, *, channels_first: bool) -> None:
        import torch

        self.fp8 = FORMATS[weight.binding.format].activations == "FLOAT8E4M3FN"
        self.scale, self.channels_first = float(weight.activation or 1), channels_first
        self.factor = None if weight.smooth is None else torch.tensor(weight.smooth)
        self.low_rank = [torch.from_numpy(m.astype(np.float32)) for m in weight.low_rank or ()]
        self.held: list[torch.Tensor] = []

    def before(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The input as the codes meet it, divided by the smoothing factor that is in the weight."""
        import torch

        x, factor = inputs[0], None
        if self.factor is not None:
            factor = self.factor.to(x.device)
            factor = factor.reshape(-1, *[1] * (x.ndim - 2)) if self.channels_first else factor
            x = x * factor
        if self.low_rank:
            self.held.append(x)
        steps = x / self.scale
        if self.fp8:
            x = steps.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * self.scale
        else:
            x = steps.round().clamp(-128, 127) * self.scale
        return (x if factor is None else x / factor, *inputs[1:])

    def after(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The output with the low-rank branch added."""
        if not self.low_rank:
            return output
        x = self.held.pop()
        x = x.movedim(1, -1) if self.channels_first else x
        for matrix in self.low_rank:
            x = x @ matrix.to(x.device)
        return output + (x.movedim(-1, 1) if self.channels_first else x)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing its own bar over ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def torch_device(name: str) -> torch.device:
    """The device asked for.

    Raises:
        UsageError: it is neither ``cpu`` nor ``cuda`` nor ``cuda:N``.
        Unsupported: CUDA was asked for and is not there; there is no fallback.
    """
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device {name!r} is unknown to torch; allowed: cpu, cuda, cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise Unsupported(f"device {name!r}: torch {torch.__version__} sees no CUDA GPU; use --device cpu")
    return torch.device(name)
