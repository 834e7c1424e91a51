"""torch module to ONNX graph, on the meta device: shapes and operators are captured, weights never materialise."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters.checkpoint import Parameter, Weights
from intaglio.exporters.component import Component
from intaglio.exporters.graph_cache import cached, graph_key
from intaglio.exporters.repeat import KEPT, NotRepeatable, expand, find_runs, put, shorten
from intaglio.profiles.errors import CheckpointError, ToolError
from intaglio.profiles.spec import Range, TensorSpec, split_axis
from intaglio.quantize.layers import PARAMETER
from intaglio.quantize.rewrite import TRANSFORM
from intaglio.quantize.tensors import WeightView

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSET = 23
TRACE_BATCH = 2
# From a checkpoint's tensor to the part of it that a component's module has.
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # A causal 3D convolution on one frame: of [M, C, T, kH, kW] only the last T meets it, the others meet zeros.
    "last_frame": lambda kernel: kernel[:, :, -1] if kernel.ndim == 5 else kernel,
}
STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A component that is ready to be traced: its module on the meta device, and what its graph will be bound to.

    Attributes:
        key: of all its graph may depend on.
    """

    component: Component
    module: torch.nn.Module
    parameters: Mapping[str, Parameter]
    buffers: Mapping[str, np.ndarray]
    shapes: Mapping[str, Range]
    key: str


def prepare(component: Component, config: Mapping[str, Any], weights: Weights, shapes: Mapping[str, Range]) -> Prepared:
    """Build the component's module without weights and match it with the checkpoint's parameters.

    Args:
        component: what to build and its tensor facts.
        config: the component's ``config.json``.
        weights: the component's parameters.
        shapes: ranges of the axes; the trace happens off their bounds.

    Raises:
        CheckpointError: the library refuses the configuration; parameters are missing, left over, or of another shape.
    """
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), torch.no_grad():
        try:
            untrained = component.model(config)
        except ToolError:
            raise
        except Exception as error:  # each library refuses configurations with exceptions of its own
            place = weights.files[0].parent / "config.json"
            raise CheckpointError(f"{place} does not describe a model: {error}") from error
        module = component.wrap(untrained)
    buffers = {name: b.numpy().copy() for name, b in module.named_buffers()}
    return Prepared(
        component=component,
        module=module,
        parameters=match_parameters(component, module, weights),
        buffers=buffers,
        shapes=shapes,
        key=graph_key(component, module, config, shapes),
    )


def capture(made: Prepared) -> ir.Model:
    """The component's graph at opset 23 with symbolic axes; parameters are initializers that read on demand."""
    unbound = (*made.parameters, *made.buffers)
    model = cached(made.key, unbound, lambda: export(made.component, made.module.to("meta").eval(), made.shapes))
    bind(model, made.component, made.parameters, made.buffers)
    name_axes(model, made.component)
    return model


def export(component: Component, module: torch.nn.Module, shapes: Mapping[str, Range]) -> ir.Model:
    """The graph of a module on the meta device, as torch gives it; equal blocks in `Component.repeats` traced once."""
    runs = find_runs(module, [component.prefix + path for path in component.repeats])
    model = None
    if any(run.count > KEPT for run in runs):
        whole = shorten(module, runs)
        try:
            model = traced(component, module, shapes)
            expand(model, runs)
        except NotRepeatable:
            model = None
        finally:
            for path, blocks in whole.items():
                put(module, path, blocks)
    model = traced(component, module, shapes) if model is None else model
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():  # stack traces with this computer's paths
            node.metadata_props.clear()
            node.doc_string = None
    return model


def traced(component: Component, module: torch.nn.Module, shapes: Mapping[str, Range]) -> ir.Model:
    """The graph of a module as torch gives it."""
    import torch

    with quiet(), torch.no_grad():
        program = torch.export.export(
            module,
            tuple(trace_input(s, shapes) for s in component.inputs),
            dynamic_shapes=dynamic_shapes(component, shapes),
            strict=False,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[s.name for s in component.inputs],
            output_names=[s.name for s in component.outputs],
            verbose=False,
        )
    model: ir.Model = exported.model
    return model


def match_parameters(component: Component, module: torch.nn.Module, weights: Weights) -> dict[str, Parameter]:
    """Graph parameter name to checkpoint tensor, complete and without leftovers.

    Raises:
        CheckpointError: with the first names that do not match.
    """
    found = {n: p for n, p in weights.renamed(component.rename).items() if not re.search(component.ignore, n)}
    shapes = {n.removeprefix(component.prefix): tuple(p.shape) for n, p in module.named_parameters()}
    missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    where = weights.files[0]
    if missing or extra:
        raise CheckpointError(
            f"{where} does not fit its config.json: {len(missing)} parameters missing {missing[:2]}, "
            f"{len(extra)} unknown {extra[:2]}"
        )
    for name, shape in shapes.items():
        stored = transform(component, name)(np.broadcast_to(np.float32(0), found[name].shape)).shape
        if stored != shape and int(np.prod(stored)) != int(np.prod(shape)):
            raise CheckpointError(f"{where}: {name} has shape {found[name].shape}, config.json implies {shape}")
        if found[name].dtype not in STORED_DTYPES:
            raise CheckpointError(f"{where}: {name} is {found[name].dtype}; allowed: {', '.join(STORED_DTYPES)}")
    return {component.prefix + name: found[name] for name in shapes}


def trace_input(spec: TensorSpec, shapes: Mapping[str, Range]) -> torch.Tensor:
    """A meta tensor of the trace size: batch 2, sides different from each other and from every bound."""
    import torch

    sizes = spec.sizes({axis: trace_size(axis, r) for axis, r in shapes.items()})
    return torch.zeros(sizes, dtype=getattr(torch, spec.dtype), device="meta")


def trace_size(axis: str, bounds: Range) -> int:
    """A size strictly inside the range; torch.export specialises on bounds, on 1 and on equal axes."""
    if axis == "batch":
        return TRACE_BATCH
    offset = {"height": 3, "width": 5}.get(axis, 2)
    steps = (bounds.max - bounds.min) // bounds.multiple
    return bounds.min + bounds.multiple * min(offset, max(steps - 1, 0))


def dynamic_shapes(component: Component, shapes: Mapping[str, Range]) -> tuple[dict[int, Any], ...]:
    """torch.export Dims of every input axis; pixel axes are multiples of the latent ones."""
    import torch

    bases: dict[str, Any] = {}

    def dim(expression: str) -> Any:
        axis, divisor = split_axis(expression)
        bounds = shapes[axis]
        name = axis if bounds.multiple == 1 else f"{axis}_steps"
        base = bases.setdefault(
            axis, torch.export.Dim(name, min=bounds.min // bounds.multiple, max=bounds.max // bounds.multiple)
        )
        factor = bounds.multiple // divisor
        return base if factor == 1 else factor * base

    return tuple({i: dim(d) for i, d in enumerate(s.shape) if isinstance(d, str)} for s in component.inputs)


def bind(
    model: ir.Model, component: Component, parameters: Mapping[str, Parameter], buffers: Mapping[str, np.ndarray]
) -> None:
    """Give every initializer its data: parameters lazily from the checkpoint, buffers and constants by value."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if name in parameters:
            parameter, bound = parameters[name], name.removeprefix(component.prefix)
            shape = tuple(int(d) for d in value.const_value.shape)
            value.const_value = lazy(parameter, shape, transform(component, bound))
            value.metadata_props[PARAMETER] = bound
            if (label := transform_name(component, bound)) is not None:
                value.metadata_props[TRANSFORM] = label
            value.dtype = ir.DataType.FLOAT
        elif name in buffers:
            value.const_value = ir.tensor(buffers[name], name=name)


def transform_name(component: Component, parameter: str) -> str | None:
    """The transform of a parameter, where it has one."""
    return next((name for pattern, name in component.transforms if re.search(pattern, parameter)), None)


def transform(component: Component, parameter: str) -> Callable[[np.ndarray], np.ndarray]:
    """From the checkpoint's tensor to the module's."""
    name = transform_name(component, parameter)
    return (lambda tensor: tensor) if name is None else TRANSFORMS[name]


def lazy(parameter: Parameter, shape: tuple[int, ...], part: Callable[[np.ndarray], np.ndarray]) -> WeightView:
    """A float32 view of (a part of) a checkpoint tensor that is read when it is needed and not kept."""
    import onnx_ir as ir

    tensor = WeightView(lambda: part(parameter.read()).reshape(shape), dtype=ir.DataType.FLOAT, shape=shape)
    tensor.metadata_props["stored"] = STORED_DTYPES[parameter.dtype]
    return tensor


def name_axes(model: ir.Model, component: Component) -> None:
    """Write the tensor facts' axis names on the graph's inputs and outputs."""
    import onnx_ir as ir

    for values, specs in ((model.graph.inputs, component.inputs), (model.graph.outputs, component.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's export chatter; errors still raise."""
    loggers = [
        logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch.onnx._internal.exporter._registration")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
