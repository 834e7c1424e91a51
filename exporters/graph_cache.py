"""Graphs that torch exported, kept per user: the same module is not traced again for other weights.

Tracing is the slow part of capturing a graph, and depends on the module, the axes and the tools, not on the weights.
A cached graph has no weights: the caller binds them, as it does after tracing. Both ways pass through the same bytes,
so that a build from the cache is a build without it. A file that is damaged or cannot be written counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters.tools import tools
from intaglio.profiles.cache import cache_folder
from intaglio.profiles.spec import Range
from intaglio.profiles.strict import to_dict

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from intaglio.exporters.component import Component

LIMIT_BYTES = 512 << 20  # of all graphs; the ones unused for longest go first
DIGEST = 64  # hexadecimal digits in front of the graph's bytes
HIDDEN = ("_modules", "_parameters", "_buffers")  # of a module: they have rows of their own
NOTES = ("_use_default_values", "_name_or_path")  # in a library's configuration: a set's order, and a place
FROM_CACHE = "from_cache"  # in a model's `meta`: whether it was not traced


def graphs_folder() -> Path:
    """``$XDG_CACHE_HOME/intaglio/graphs``."""
    return cache_folder() / "graphs"


def cached(key: str, unbound: Iterable[str], export: Callable[[], ir.Model]) -> ir.Model:
    """The graph of `key`: from the cache, or what `export` makes, kept for the next time.

    Args:
        key: of `graph_key`.
        unbound: initializers that the caller gives data to; they have a shape and no data in what is returned.
        export: traces the module.
    """
    import onnx_ir as ir

    path = graphs_folder() / key
    body = _read(path)
    hit = body is not None
    if body is None:
        body = _bytes(export(), unbound)
        _write(path, body)
    model = ir.from_proto(_parsed(body))
    model.meta[FROM_CACHE] = hit
    return model


def graph_key(
    component: Component, module: torch.nn.Module, config: Mapping[str, Any], shapes: Mapping[str, Range]
) -> str:
    """sha256 over all a traced graph may depend on: the module's parts and plain attributes, axes, tools, this code."""
    facts = {
        "component": [component.name, component.prefix, component.transforms],
        "tensors": [to_dict(spec) for spec in (*component.inputs, *component.outputs)],
        "config": described(config),
        "shapes": {axis: to_dict(bounds) for axis, bounds in shapes.items()},
        "modules": [[name, described(part)] for name, part in module.named_modules()],
        "parameters": [[name, tuple(p.shape), str(p.dtype)] for name, p in module.named_parameters()],
        "buffers": [[name, digest_of(b.numpy())] for name, b in module.named_buffers()],
        "tools": tools(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def digest_of(array: np.ndarray) -> str:
    """Of values, shape and dtype."""
    facts = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(facts + np.ascontiguousarray(array).tobytes()).hexdigest()


def described(value: Any, depth: int = 4) -> Any:
    """A value as plain data: numbers and strings as they are, objects by class and attributes, functions by name and
    what they closed over.

    Modules, parameters and buffers inside a module are left to their own rows.
    """
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor | types.ModuleType | logging.Logger):  # of this process, not of the graph
        return type(value).__qualname__
    if isinstance(value, Mapping):
        rows = {str(k): v for k, v in value.items() if k not in NOTES}
        return {k: described(v, depth - 1) for k, v in rows.items()} if depth else len(value)
    if isinstance(value, list | tuple | set | frozenset):
        parts = [described(v, depth - 1) for v in value] if depth else [len(value)]
        return sorted(parts, key=str) if isinstance(value, set | frozenset) else parts
    kind = value if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")) else type(value)
    name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"
    if not depth:
        return name
    if kind is value:
        return [name, closed_over(value, depth)]
    rows = {k: v for k, v in vars(value).items() if k not in NOTES} if hasattr(value, "__dict__") else {}
    if not isinstance(value, torch.nn.Module):
        return [name, {k: described(v, depth - 1) for k, v in rows.items()}]
    rows = {k: v for k, v in rows.items() if k not in HIDDEN and not isinstance(v, torch.nn.Module)}
    return [name, {k: described(v, depth - 1) for k, v in rows.items()}, closed_over(kind.forward, depth)]


def closed_over(function: Any, depth: int) -> list[Any]:
    """What a function took from the function that defined it, such as the layers a wrapper reads; modules by class."""
    import torch

    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    return [type(c).__qualname__ if isinstance(c, torch.nn.Module) else described(c, depth - 1) for c in cells]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not assigned yet
        return False


def _bytes(model: ir.Model, unbound: Iterable[str]) -> bytes:
    import onnx_ir as ir

    for name in set(unbound) & set(model.graph.initializers):
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            location="unbound", offset=None, length=None, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=name
        )
    body: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return body


def _parsed(body: bytes) -> Any:
    import onnx

    proto = onnx.ModelProto()
    proto.ParseFromString(body)
    return proto


def _read(path: Path) -> bytes | None:
    try:
        stored = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    body = stored[DIGEST:]
    return body if hashlib.sha256(body).hexdigest().encode() == stored[:DIGEST] else None


def _write(path: Path, body: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(hashlib.sha256(body).hexdigest().encode() + body)
        temporary.replace(path)
        _prune(path.parent)
    except OSError:
        return


def _prune(folder: Path) -> None:
    """Remove the graphs unused for longest until the rest fits."""
    facts = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.iterdir()), reverse=True)
    total = 0
    for _, size, path in facts:
        total += size
        if total > LIMIT_BYTES:
            path.unlink(missing_ok=True)
